"""The README from end to end, on the commands a user types: digits to shards to codes to a transformer to images.

One run is killed outright in the middle and started again; it must end with the losses of one that was left alone.
Then what a user can get wrong: each is one line on stderr and a non-zero exit code.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import VAR_CONFIG, write_public_files

from launchers.loading import load_tokenizer
from models.var import VAR
from training.model_on_disk import describe, write_model

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "digits"
SHORT = ["loop.epochs=1", "loop.validate_every=0.25", "loop.checkpoint_every=4", "loop.log_every=1"]
PACK = ["source=digits", "out=data/digits/images", "val_fraction=0.2"]
TOKENIZER = ["--config", str(CONFIGS / "tokenizer.yaml"), "loop.epochs=0.2"]
ENCODE = ["tokenizer=runs/digits/tokenizer", "images=data/digits/images", "out=data/digits/codes", "views=2"]


@dataclass(frozen=True)
class Project:
    """A folder with packed digits, a barely trained tokenizer and its codes."""

    folder: Path

    def command(self, name: str, *arguments: str, ranks: int = 0) -> list[str]:
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)] if ranks else []
        return [*(launcher or [sys.executable]), str(ROOT / "launchers" / f"{name}.py"), *arguments]

    def run(self, name: str, *arguments: str, ranks: int = 0, env: dict[str, str] | None = None) -> Any:
        return subprocess.run(
            self.command(name, *arguments, ranks=ranks),
            cwd=self.folder,
            env=os.environ | {"DS_ACCELERATOR": "cpu"} | (env or {}),
            capture_output=True,
            text=True,
            timeout=300,
        )

    def succeed(self, name: str, *arguments: str, ranks: int = 0) -> str:
        done = self.run(name, *arguments, ranks=ranks)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def fail(self, name: str, *arguments: str) -> str:
        """Run a command that must end with exit code 64 and one line on stderr; that line.

        In this process: what is wrong is found before anything starts, and starting Python takes longer than that.
        """
        main = importlib.import_module(f"launchers.{name}").main
        said = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said), pytest.raises(SystemExit) as left:
            patch.chdir(self.folder)
            patch.setattr(sys, "argv", [f"{name}.py", *arguments])
            main()
        assert left.value.code == 64, (left.value.code, said.getvalue()[-2000:])
        return single_error(said.getvalue())

    def fail_as_rank(self, name: str, *arguments: str, env: dict[str, str]) -> str:
        """The same in a process of its own, with an environment of its own."""
        done = self.run(name, *arguments, env=env)
        assert done.returncode == 64, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
        return single_error(done.stderr)

    def records(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]


def single_error(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr[-2000:]
    return lines[0]


def train_arguments(run: str, *more: str) -> list[str]:
    return ["--config", str(CONFIGS / "d2.yaml"), f"run={run}", "tracking.mlflow=false", *SHORT, *more]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("project"))
    project.succeed("pack_images", *PACK)
    project.succeed("train_tokenizer", *TOKENIZER)
    project.succeed("encode_codes", *ENCODE)
    return project


@pytest.fixture(scope="module")
def trained(project: Project) -> Project:
    project.succeed("train", *train_arguments("runs/whole"), ranks=2)
    return project


@pytest.fixture
def public(tmp_path: Path) -> Path:
    write_public_files(tmp_path)
    return tmp_path


def lasting(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    clock = ("images_per_second", "tokens_per_second", "data_wait_share", "time")
    return [{name: value for name, value in record.items() if name not in clock} for record in records]


def test_a_run_starts_at_the_entropy_of_the_codes_and_records_every_step(trained: Project) -> None:
    train = [record for record in trained.records("runs/whole") if record["kind"] == "train"]
    assert [record["step"] for record in train] == list(range(1, 24))
    assert train[0]["loss_avg"] == pytest.approx(np.log(64), abs=0.1)
    assert train[-1]["loss_avg"] < train[0]["loss_avg"]
    numbers = ("loss_last", "error_avg", "error_last", "learning_rate", "gradient_norm", "tokens_per_second", "pflop")
    for name in numbers:
        assert all(np.isfinite(record[name]) for record in train), name
    assert len(train[0]["loss"]) == 3  # one per scale


def test_a_killed_run_goes_on_with_the_same_command_and_the_same_losses(trained: Project) -> None:
    command = trained.command("train", *train_arguments("runs/killed"), ranks=2)
    process = subprocess.Popen(
        command,
        cwd=trained.folder,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    record = trained.folder / "runs/killed/metrics.jsonl"
    wait_for(lambda: record.exists() and len(record.read_text().splitlines()) > 5, seconds=120)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (trained.folder / "runs/killed/checkpoints/step-00000023").exists()
    said = trained.succeed("train", *train_arguments("runs/killed"), ranks=2)
    assert "resuming from" in said
    assert lasting(trained.records("runs/killed")) == lasting(trained.records("runs/whole"))


def wait_for(condition: Any, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_images_do_not_depend_on_ranks_batch_or_format(trained: Project) -> None:
    """Two ranks draw into the evaluator's npz what one draws into PNG files, bit for bit."""
    two_each = ["--run", "runs/whole", "--per-class", "2"]
    trained.succeed("sample", *two_each, "--batch", "3", "--out", "pngs")
    said = trained.succeed("sample", *two_each, "--batch", "4", "--out", "npz", "--format", "npz", ranks=2)
    assert said.count("20 images in npz/samples.npz") == 1
    with np.load(trained.folder / "npz" / "samples.npz") as found:
        images, labels = found["arr_0"], found["labels"]
    assert images.shape == (20, 16, 16, 3) and images.dtype == np.uint8
    for label in range(10):
        pictures = [Image.open(path) for path in (trained.folder / "pngs" / "png" / f"{label:05d}").iterdir()]
        pixels = [np.asarray(picture).tobytes() for picture in pictures]
        assert sorted(pixels) == sorted(image.tobytes() for image in images[labels == label])
    grids = [(trained.folder / out / "samples.png").read_bytes() for out in ("pngs", "npz")]
    assert grids[0] == grids[1]


def test_the_papers_figures_are_drawn_of_a_run_and_its_tokenizer(trained: Project) -> None:
    stages = ["--stages", "0.2", "0.6", "1.0", "--classes", "0", "1", "2", "3"]
    said = trained.succeed("compare_sizes", "--runs", "runs/whole", *stages, "--out", "figures/7.png")
    assert [name in said for name in ("step-00000005", "step-00000014", "step-00000023")] == [True] * 3
    images = ["--images", "data/digits/images/val", "--num-images", "2"]
    trained.succeed("plot_dependencies", "--tokenizer", "runs/digits/tokenizer", *images, "--out", "figures/9.png")
    assert sorted(path.name for path in (trained.folder / "figures").iterdir()) == ["7.png", "9.json", "9.png"]
    [logged] = (trained.folder / "runs" / "mlflow_artifacts").rglob("pictures/9.png")  # the tokenizer's run is tracked
    assert logged.read_bytes() == (trained.folder / "figures" / "9.png").read_bytes()


def test_mlflow_shows_what_metrics_jsonl_holds(project: Project) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{project.folder}/runs/mlflow.db")
    state = json.loads((project.folder / "runs/digits/tokenizer/mlflow.json").read_text())
    points = {point.step: point.value for point in client.get_metric_history(state["run_id"], "loss/train_loss")}
    records = [record for record in project.records("runs/digits/tokenizer") if record["kind"] == "train"]
    assert points == {record["step"]: record["loss"] for record in records}
    assert client.get_run(state["run_id"]).info.status == "FINISHED"


def test_stage_2_trains_from_images_as_well(project: Project) -> None:
    images = ["data.train=data/digits/images/train", "data.validation=data/digits/images/val", "loop.epochs=0.1"]
    project.succeed("train", *train_arguments("runs/online", *images))
    assert [record["step"] for record in project.records("runs/online") if record["kind"] == "train"] == [1, 2, 3]


def test_packing_and_encoding_again_do_nothing(project: Project) -> None:
    said = project.succeed("pack_images", *PACK)
    said += project.succeed("encode_codes", *ENCODE)
    assert said.count("nothing to do") == 3


def test_a_dry_run_allocates_no_model_and_needs_no_data(project: Project) -> None:
    for name, count in {"d16": "310,283,520", "d30": "2,010,020,356", "d36_512": "2,353,893,904"}.items():
        config = str(ROOT / f"configs/{name}.yaml")
        said = project.succeed("train", "--config", config, "--dry-run", "--world-size", "8")
        assert count in said and "not there yet" in said
    assert "one batch of codes (32, 21)" in project.succeed("train", *train_arguments("runs/dry"), "--dry-run")


@pytest.fixture(scope="module")
def released(trained: Project) -> list[str]:
    """The trained run as files of the public code: the options that name transformer and tokenizer."""
    trained.succeed("export_weights", "--run", "runs/whole", "--out", "public", "--format", "reference")
    return ["public/var_d2.pth", "--tokenizer", "public/tokenizer/vae_ch32v64z16.pth", "--patch-nums", "1", "2", "4"]


def test_weights_that_went_out_in_the_public_format_come_back_the_same_and_training_starts_from_them(
    trained: Project, released: list[str]
) -> None:
    said = trained.succeed("import_weights", "--var", *released, "--out", "imports/d2")
    assert "d2, " in said and "V = 64" in said and "wrote imports/d2" in said
    newest = trained.folder / "runs/whole/checkpoints/step-00000023/weights/model.safetensors"
    assert (trained.folder / "imports/d2/model.safetensors").read_bytes() == newest.read_bytes()
    said = trained.succeed("train", *train_arguments("runs/warm", "--init-from", "imports/d2", "loop.epochs=0.1"))
    first, whole = trained.records("runs/warm")[0], trained.records("runs/whole")[0]
    assert first["loss_avg"] < whole["loss_avg"] - 0.1


def test_the_readmes_two_commands_work_on_a_run_and_on_public_files_alike(
    trained: Project, released: list[str]
) -> None:
    """A grid of one class and an in-painted picture, the same from the run as from files in the public format."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(trained.folder / "photo.png")
    for name, model in (("run", ["runs/whole"]), ("files", released)):
        grid = ["--classes", "7", "--per-class", "4", "--cfg", "4", "--top-p", "0.95", "--out", f"grid_{name}"]
        trained.succeed("sample", "--run", *model, *grid)
        box = ["--task", "inpaint", "--box", "0", "15", "20", "25", "--out", f"edit_{name}"]
        trained.succeed("edit", "--run", *model, "--image", "photo.png", *box)
    for picture in ("grid_{}/samples.png", "edit_{}/panel.png", "edit_{}/seed-00003.png"):
        of_run, of_files = ((trained.folder / picture.format(name)).read_bytes() for name in ("run", "files"))
        assert of_run == of_files, picture


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
        assert shard.name in project.fail("train", *train_arguments("runs/x"), "data.train=cut")

    def test_codes_of_another_tokenizer(self, project: Project) -> None:
        shutil.copytree(project.folder / "data/digits/codes/train", project.folder / "foreign")
        index = project.folder / "foreign" / "index.json"
        meta = json.loads(index.read_text())
        meta["meta"]["tokenizer_sha256"] = "0" * 64
        index.write_text(json.dumps(meta))
        line = project.fail("train", *train_arguments("runs/x"), "data.train=foreign")
        assert "0000" in line and "encode_codes.py" in line

    def test_batch_not_divisible_by_the_world(self, project: Project) -> None:
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

    def test_corrupt_image_is_skipped_counted_and_named(self, project: Project) -> None:
        for label in ("cat", "dog"):
            (project.folder / "photos" / label).mkdir(parents=True)
            for number in range(4):
                picture = Image.fromarray(np.full((20, 24, 3), 40 * number, np.uint8))
                picture.save(project.folder / "photos" / label / f"{number}.png")
        (project.folder / "photos/cat/broken.jpg").write_bytes(b"\xff\xd8\xff not a photograph")
        said = project.succeed("pack_images", "source=photos", "out=photo_shards", "val_fraction=0.25")
        assert "1 skipped" in said and "broken.jpg" in said
