"""What a user can get wrong: each is one line on stderr that says what and what to do, and exit code 64 or 65."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from project import ForkedProject, Project, train_arguments
from tiny import VAR_CONFIG, write_public_files

from launchers.setup.loading import load_tokenizer
from models.var import VAR
from training.checkpoints.model_on_disk import describe, write_model


@pytest.fixture
def public(tmp_path: Path) -> Path:
    write_public_files(tmp_path)
    return tmp_path


class TestBadInput:
    """One line that names the thing, what was found and what to do; exit code 64."""

    def test_unknown_key(self, project: Project) -> None:
        line = project.fail("train", *train_arguments("runs/x"), "model.dept=4")
        assert "model.dept" in line and "did you mean 'model.depth'" in line

    def test_wrong_type(self, project: Project) -> None:
        line = project.fail("train", *train_arguments("runs/x"), "model.depth=deep")
        assert "depth" in line and "deep" in line

    def test_missing_config(self, project: Project) -> None:
        assert "nowhere.yaml: no such config file" in project.fail("train", "--config", "nowhere.yaml")

    def test_missing_tokenizer(self, project: Project) -> None:
        line = project.fail("train", *train_arguments("runs/x"), "tokenizer=nowhere")
        assert "nowhere: no such file or folder" in line

    def test_empty_folder(self, project: Project) -> None:
        (project.folder / "empty").mkdir()
        assert "empty" in project.fail("pack_images", "source=empty", "out=packed")

    def test_truncated_shard(self, project: Project) -> None:
        shutil.copytree(project.folder / "data/digits/codes/train", project.folder / "cut")
        shard = next((project.folder / "cut").glob("*.tar"))
        shard.write_bytes(shard.read_bytes()[:-1000])
        assert shard.name in project.fail("train", *train_arguments("runs/x"), "data.train=cut", code=65)

    def test_codes_of_another_tokenizer(self, project: Project) -> None:
        shutil.copytree(project.folder / "data/digits/codes/train", project.folder / "foreign")
        index = project.folder / "foreign" / "index.json"
        meta = json.loads(index.read_text())
        meta["meta"]["tokenizer_sha256"] = "0" * 64
        index.write_text(json.dumps(meta))
        line = project.fail("train", *train_arguments("runs/x"), "data.train=foreign")
        assert "0000" in line and "encode_codes.py" in line

    def test_batch_not_divisible_by_the_world(self, project: ForkedProject) -> None:
        world = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        line = project.fail_as_rank("train", *train_arguments("runs/x"), env=world)
        assert "global_batch 64 is not divisible by the world size 3" in line

    def test_another_number_of_classes(self, project: Project) -> None:
        line = project.fail("train", *train_arguments("runs/x"), "model.num_classes=5")
        assert "has 10 classes, model.num_classes is 5" in line

    def test_checkpoint_of_another_seed(self, trained: Project) -> None:
        line = trained.fail("train", *train_arguments("runs/whole"), "seed=9")
        assert "seed is 0, this run has 9" in line

    def test_another_tokenizer_to_sample_with(self, trained: Project) -> None:
        other, _ = load_tokenizer(str(trained.folder / "runs/digits/tokenizer"))
        other.quantizer.codebook += 1
        write_model(trained.folder / "runs/other", other.state_dict(), describe(other.config))
        assert "was trained with tokenizer" in trained.fail("sample", "run=runs/whole", "tokenizer=runs/other")

    def test_checkpoint_of_another_model(self, trained: Project) -> None:
        line = trained.fail("train", *train_arguments("runs/whole"), "model.depth=3")
        assert "depth is 2, this run has 3" in line

    def test_a_stage_that_no_checkpoint_was_kept_of(self, trained: Project) -> None:
        line = trained.fail("compare_sizes", "--runs", "runs/whole", "--stages", "0.4", "--out", "figures/x.png")
        assert "no checkpoint within 0.05 of stage 0.4" in line and "loop.keep_at" in line

    def test_missing_run_to_compare(self, project: Project) -> None:
        assert "nowhere: no such file or folder" in project.fail("compare_sizes", "--runs", "nowhere", "--out", "x.png")

    def test_codes_to_plot_the_dependencies_of(self, project: Project) -> None:
        codes = ["--images", "data/digits/codes/val", "--out", "x.png"]
        line = project.fail("plot_dependencies", "--tokenizer", "runs/digits/tokenizer", *codes)
        assert "holds codes, expected images" in line

    def test_an_option_that_does_not_exist(self, project: Project) -> None:
        line = project.fail("import_weights", "--no-such-thing", "x", "--out", "o")
        assert "unknown option '--no-such-thing'" in line

    def test_import_of_a_file_that_is_not_there(self, project: Project) -> None:
        assert "gone.pth: no such file" in project.fail("import_weights", "--var", "gone.pth", "--out", "o")

    def test_import_of_damaged_and_of_wrong_files(self, project: Project, public: Path) -> None:
        (public / "cut.pth").write_bytes((public / "var_d1.pth").read_bytes()[:-1000])
        torch.save({"weights": [torch.zeros(2)]}, public / "list.pth")
        wanted = {"cut.pth": "get it again", "list.pth": "a flat state dict", "vae_ch32v16z4.pth": "no pos_1LC"}
        for name, message in wanted.items():
            line = project.fail("import_weights", "--var", str(public / name), "--out", "o")
            assert name in line and message in line

    def test_import_with_a_name_missing(self, project: Project, public: Path) -> None:
        weights = torch.load(public / "var_d1.pth")
        torch.save({name: value for name, value in weights.items() if name != "head.bias"}, public / "no_head.pth")
        arguments = ["--var", str(public / "no_head.pth"), "--patch-nums", "1", "2", "--out", "o"]
        assert "missing head.bias" in project.fail("import_weights", *arguments)

    def test_import_with_a_schedule_that_is_unknown_or_does_not_fit(self, project: Project, public: Path) -> None:
        arguments = ["--var", str(public / "var_d1.pth"), "--out", "o"]
        assert "add --patch-nums" in project.fail("import_weights", *arguments)
        assert "5 positions" in project.fail("import_weights", *arguments, "--patch-nums", "1", "3")

    def test_import_and_export_to_a_folder_in_use(self, project: Project, public: Path) -> None:
        arguments = ["--tokenizer", str(public / "vae_ch32v16z4.pth"), "--patch-nums", "1", "2"]
        assert "data: is not empty" in project.fail("import_weights", *arguments, "--out", "data")
        run = ["--run", "runs/digits/tokenizer"]
        assert "data: is not empty" in project.fail("export_weights", *run, "--out", "data")
        assert not (project.folder / "o").exists()

    def test_export_in_an_unknown_format_and_of_nothing(self, project: Project) -> None:
        arguments = ["--run", "runs/digits/tokenizer", "--out", "o", "--format", "onnx"]
        assert "accepted: safetensors, reference" in project.fail("export_weights", *arguments)
        assert "nowhere: no such file or folder" in project.fail("export_weights", "--run", "nowhere", "--out", "o")

    def test_training_from_a_public_file_and_from_a_model_of_other_sizes(self, project: Project, public: Path) -> None:
        line = project.fail("train", *train_arguments("runs/x"), "--init-from", str(public / "var_d1.pth"))
        assert "launchers/import_weights.py --var" in line
        write_model(public / "d1", VAR(VAR_CONFIG).state_dict(), describe(VAR_CONFIG))
        line = project.fail("train", *train_arguments("runs/x"), "--init-from", str(public / "d1"))
        assert "its depth is 1, this run has 2" in line

    def test_corrupt_image_is_skipped_counted_and_named(self, project: ForkedProject) -> None:
        for label in ("cat", "dog"):
            (project.folder / "photos" / label).mkdir(parents=True)
            for number in range(4):
                picture = Image.fromarray(np.full((20, 24, 3), 40 * number, np.uint8))
                picture.save(project.folder / "photos" / label / f"{number}.png")
        (project.folder / "photos/cat/broken.jpg").write_bytes(b"\xff\xd8\xff not a photograph")
        said = project.forked("pack_images", "source=photos", "out=photo_shards", "val_fraction=0.25")
        assert "1 skipped" in said and "broken.jpg" in said
