"""The README from end to end, on the commands a user types: digits to shards to codes to a transformer to images.

One run is killed outright in the middle and started again; it must end with the losses of one that was left alone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image
from project import ENCODE, PACK, ROOT, ForkedProject, train_arguments


def lasting(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    clock = ("images_per_second", "tokens_per_second", "data_wait_share", "goodput", "time")
    return [{name: value for name, value in record.items() if name not in clock} for record in records]


def test_a_run_starts_at_the_entropy_of_the_codes_and_records_every_step(trained: ForkedProject) -> None:
    train = [record for record in trained.records("runs/whole") if record["kind"] == "train"]
    assert [record["step"] for record in train] == list(range(1, 24))
    assert train[0]["loss_avg"] == pytest.approx(np.log(64), abs=0.1)
    assert train[-1]["loss_avg"] < train[0]["loss_avg"]
    numbers = ("loss_last", "error_avg", "error_last", "learning_rate", "gradient_norm", "tokens_per_second", "pflop")
    for name in numbers:
        assert all(np.isfinite(record[name]) for record in train), name
    assert len(train[0]["loss"]) == 3  # one per scale


@pytest.mark.faults
def test_a_killed_run_goes_on_with_the_same_command_and_the_same_losses(trained: ForkedProject) -> None:
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


def test_images_do_not_depend_on_ranks_batch_or_format(trained: ForkedProject) -> None:
    """Two ranks draw into the evaluator's npz what one draws into PNG files, bit for bit."""
    two_each = ["--run", "runs/whole", "--per-class", "2"]
    trained.forked("sample", *two_each, "--batch", "3", "--out", "pngs")
    said = trained.forked("sample", *two_each, "--batch", "4", "--out", "npz", "--format", "npz", ranks=2)
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


def test_the_papers_figures_are_drawn_of_a_run_and_its_tokenizer(trained: ForkedProject) -> None:
    stages = ["--stages", "0.2", "0.6", "1.0", "--classes", "0", "1", "2", "3"]
    said = trained.forked("compare_sizes", "--runs", "runs/whole", *stages, "--out", "figures/7.png")
    assert [name in said for name in ("step-00000005", "step-00000014", "step-00000023")] == [True] * 3
    images = ["--images", "data/digits/images/val", "--num-images", "2", "--tracking-uri", "sqlite:///runs/mlflow.db"]
    trained.forked("plot_dependencies", "--tokenizer", "runs/digits/tokenizer", *images, "--out", "figures/9.png")
    assert sorted(path.name for path in (trained.folder / "figures").iterdir()) == ["7.png", "9.json", "9.png"]
    [logged] = (trained.folder / "runs" / "mlflow_artifacts").rglob("pictures/9.png")  # the tokenizer's run is tracked
    assert logged.read_bytes() == (trained.folder / "figures" / "9.png").read_bytes()


def test_mlflow_shows_what_metrics_jsonl_holds(project: ForkedProject) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{project.folder}/runs/mlflow.db")
    state = json.loads((project.folder / "runs/digits/tokenizer/mlflow.json").read_text())
    points = {point.step: point.value for point in client.get_metric_history(state["run_id"], "loss/train_loss")}
    records = [record for record in project.records("runs/digits/tokenizer") if record["kind"] == "train"]
    assert points == {record["step"]: record["loss"] for record in records}
    assert client.get_run(state["run_id"]).info.status == "FINISHED"


def test_stage_2_trains_from_images_as_well(project: ForkedProject) -> None:
    images = ["data.train=data/digits/images/train", "data.validation=data/digits/images/val", "loop.epochs=0.1"]
    project.forked("train", *train_arguments("runs/online", *images))
    assert [record["step"] for record in project.records("runs/online") if record["kind"] == "train"] == [1, 2, 3]


def test_packing_and_encoding_again_do_nothing(project: ForkedProject) -> None:
    said = project.forked("pack_images", *PACK)
    said += project.forked("encode_codes", *ENCODE)
    assert said.count("nothing to do") == 3


def test_a_dry_run_allocates_no_model_and_needs_no_data(project: ForkedProject) -> None:
    for name, count in {"d16": "310,283,520", "d30": "2,010,020,356", "d36_512": "2,353,893,904"}.items():
        config = str(ROOT / f"configs/{name}.yaml")
        said = project.forked("train", "--config", config, "--dry-run", "--world-size", "8")
        assert count in said and "not there yet" in said
    assert "one batch of codes (32, 21)" in project.forked("train", *train_arguments("runs/dry"), "--dry-run")


@pytest.fixture(scope="module")
def released(trained: ForkedProject) -> list[str]:
    """The trained run as files of the public code: the options that name transformer and tokenizer."""
    trained.forked("export_weights", "--run", "runs/whole", "--out", "public", "--format", "reference")
    return ["public/var_d2.pth", "--tokenizer", "public/tokenizer/vae_ch32v64z16.pth", "--patch-nums", "1", "2", "4"]


def test_weights_that_went_out_in_the_public_format_come_back_the_same_and_training_starts_from_them(
    trained: ForkedProject, released: list[str]
) -> None:
    said = trained.forked("import_weights", "--var", *released, "--out", "imports/d2")
    assert "d2, " in said and "V = 64" in said and "wrote imports/d2" in said
    newest = trained.folder / "runs/whole/checkpoints/step-00000023/weights/model.safetensors"
    assert (trained.folder / "imports/d2/model.safetensors").read_bytes() == newest.read_bytes()
    said = trained.forked("train", *train_arguments("runs/warm", "--init-from", "imports/d2", "loop.epochs=0.1"))
    first, whole = trained.records("runs/warm")[0], trained.records("runs/whole")[0]
    assert first["loss_avg"] < whole["loss_avg"] - 0.1


def test_the_readmes_two_commands_work_on_a_run_and_on_public_files_alike(
    trained: ForkedProject, released: list[str]
) -> None:
    """A grid of one class and an in-painted picture, the same from the run as from files in the public format."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(trained.folder / "photo.png")
    for name, model in (("run", ["runs/whole"]), ("files", released)):
        grid = ["--classes", "7", "--per-class", "4", "--cfg", "4", "--top-p", "0.95", "--out", f"grid_{name}"]
        trained.forked("sample", "--run", *model, *grid)
        box = ["--task", "inpaint", "--box", "0", "15", "20", "25", "--out", f"edit_{name}"]
        trained.forked("edit", "--run", *model, "--image", "photo.png", *box)
    for picture in ("grid_{}/samples.png", "edit_{}/panel.png", "edit_{}/seed-00003.png"):
        of_run, of_files = ((trained.folder / picture.format(name)).read_bytes() for name in ("run", "files"))
        assert of_run == of_files, picture
