"""launchers/sampling/files.py: what is written is found again, and the npz is what the evaluator wants."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launchers.sampling import files as sample_files
from launchers.sampling.files import NpzFiles, PngFiles, claim_folder, draw_grid, grid_layout, open_files, write_npz
from launchers.sampling.plan import SamplePlan

PLAN = SamplePlan(classes=(2, 0, 7), per_class=3, batch=4)  # 9 images in units of 4, 4 and 1
SETTINGS = {"cfg": 1.5, "classes": (2, 0, 7), "batch": 4}


def picture(image: int) -> np.ndarray:
    """An image that says which it is: (4, 4, 3) uint8."""
    return np.full((4, 4, 3), 10 * image + 5, np.uint8)


def write(files: Any, *units: int) -> None:
    for unit in units:
        files.write(unit, np.stack([picture(image) for image in PLAN.unit(unit).tolist()]))


@pytest.mark.parametrize("format", ["png", "npz"])
class TestBothFormats:
    def test_what_is_written_is_no_longer_pending(self, tmp_path: Path, format: str) -> None:
        files = open_files(tmp_path, PLAN, format=format)
        assert files.pending() == [0, 1, 2]
        write(files, 1)
        assert files.pending() == [0, 2]
        write(files, 0, 2)
        assert files.pending() == [] and not files.is_finished()

    def test_what_is_written_is_read_again(self, tmp_path: Path, format: str) -> None:
        files = open_files(tmp_path, PLAN, format=format)
        write(files, 0, 1, 2)
        for image in range(9):
            assert np.array_equal(files.read(image), picture(image))

    def test_a_finished_folder_stays_finished(self, tmp_path: Path, format: str) -> None:
        files = open_files(tmp_path, PLAN, format=format)
        write(files, 0, 1, 2)
        draw_grid(files, tmp_path)
        assert files.commit().exists()
        assert files.is_finished() and files.pending() == []
        assert open_files(tmp_path, PLAN, format=format).is_finished()

    def test_a_file_that_was_cut_off_counts_as_nothing_and_is_cleared(self, tmp_path: Path, format: str) -> None:
        files = open_files(tmp_path, PLAN, format=format)
        claim_folder(tmp_path, SETTINGS)
        write(files, 0)
        for path in [path for path in tmp_path.rglob("*") if path.suffix in (".png", ".npy")]:
            path.rename(path.with_name(f".{path.name}.tmp-123"))
        (tmp_path / ".samples.npz.tmp-123").write_bytes(b"half")
        assert files.pending() == [0, 1, 2]
        claim_folder(tmp_path, SETTINGS)
        assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["samples.json"]


def test_a_single_missing_png_is_drawn_again(tmp_path: Path) -> None:
    files = PngFiles(tmp_path, PLAN)
    write(files, 0, 1, 2)
    files.path(5).unlink()
    assert files.pending() == [1]


def test_png_names_sort_as_the_images_do(tmp_path: Path) -> None:
    plan = SamplePlan(classes=(1, 20, 300), per_class=1000, batch=50)
    paths = [PngFiles(tmp_path, plan).path(image) for image in range(plan.num_images)]
    assert paths == sorted(paths) and len(set(paths)) == 3000
    assert str(paths[1007].relative_to(tmp_path)) == "png/00020/0000007.png"


def test_the_npz_has_every_image_once_with_its_label_in_an_order_that_is_shuffled_and_fixed(tmp_path: Path) -> None:
    contents = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        files = NpzFiles(folder, PLAN)
        write(files, 2, 0, 1)
        contents.append(files.commit().read_bytes())
        assert not (folder / "parts").exists()
    assert contents[0] == contents[1]
    with np.load(tmp_path / "a" / "samples.npz") as found:
        images, labels = found["arr_0"], found["labels"]
    assert images.shape == (9, 4, 4, 3) and images.dtype == np.uint8 and labels.dtype == np.int64
    numbers = [(image[0, 0, 0] - 5) // 10 for image in images]
    assert sorted(numbers) == list(range(9)) and numbers != list(range(9))
    assert labels.tolist() == PLAN.labels(np.array(numbers)).tolist()


def test_the_npz_streams_as_the_evaluator_reads_it(tmp_path: Path) -> None:
    """The ADM evaluator reads the member's header, then uncompressed rows, without numpy's loader."""
    files = NpzFiles(tmp_path, PLAN)
    write(files, 0, 1, 2)
    with zipfile.ZipFile(files.commit()) as archive, archive.open("arr_0.npy") as member:
        assert archive.getinfo("arr_0.npy").compress_type == zipfile.ZIP_STORED
        assert np.lib.format.read_magic(member) == (1, 0)
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(member)
        assert (shape, is_fortran, dtype) == ((9, 4, 4, 3), False, np.uint8)
        assert len(member.read()) == 9 * 4 * 4 * 3


def test_a_missing_part_leaves_no_npz_and_all_other_parts(tmp_path: Path) -> None:
    files = NpzFiles(tmp_path, PLAN)
    write(files, 0, 2)
    with pytest.raises(FileNotFoundError, match="00000001.npy"):
        files.commit()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["00000000.npy", "00000002.npy", "parts"]


@pytest.mark.parametrize("content", ["cut", "empty", "fewer"])
def test_a_damaged_part_is_named(tmp_path: Path, content: str) -> None:
    files = NpzFiles(tmp_path, PLAN)
    write(files, 0, 1, 2)
    if content == "fewer":
        np.save(files.path(1), np.zeros((3, 4, 4, 3), np.uint8))
    else:
        files.path(1).write_bytes(files.path(1).read_bytes()[:-9] if content == "cut" else b"")
    with pytest.raises(ValueError, match="00000001.npy: .*; remove it and run"):
        files.commit()
    assert not files.is_finished()


def test_miscounted_images_are_never_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = NpzFiles(tmp_path, PLAN)
    write(files, 0, 1, 2)
    monkeypatch.setattr(SamplePlan, "labels", lambda plan, images: np.zeros(len(images), np.int64))
    with pytest.raises(ValueError, match=r"classes \[0\] come \[9\] times, 3 of each of 3 were asked for"):
        files.commit()
    assert not files.is_finished() and files.path(0).exists()


def test_fewer_images_than_labels_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "x.npz").open("wb") as file, pytest.raises(ValueError, match="1 images for 2 labels"):
        write_npz(file, [picture(0)], np.arange(2), shape=(4, 4, 3))
    with (tmp_path / "x.npz").open("wb") as file, pytest.raises(ValueError, match="image 1 is float64"):
        write_npz(file, [picture(0), picture(1) / 2], np.arange(2), shape=(4, 4, 3))


def test_a_folder_remembers_what_its_images_were_drawn_with(tmp_path: Path) -> None:
    claim_folder(tmp_path, SETTINGS)
    write(PngFiles(tmp_path, PLAN), 0)
    claim_folder(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="have cfg 1.5, this command has 4.0; .* choose another folder with out=PATH"):
        claim_folder(tmp_path, SETTINGS | {"cfg": 4.0})


def test_a_folder_without_images_may_change_its_mind(tmp_path: Path) -> None:
    """A batch that did not fit into memory must not need the folder to be removed by hand."""
    claim_folder(tmp_path, SETTINGS)
    claim_folder(tmp_path, SETTINGS | {"batch": 2})
    assert json.loads((tmp_path / "samples.json").read_text())["batch"] == 2


def test_images_that_nobody_described_are_left_alone(tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros(3))
    with pytest.raises(ValueError, match="have cfg unknown, this command has 1.5"):
        claim_folder(tmp_path, SETTINGS)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    claim_folder(tmp_path, SETTINGS)
    write(PngFiles(tmp_path, PLAN), 0)
    (tmp_path / "samples.json").write_text("{")
    with pytest.raises(ValueError, match="samples.json is not valid JSON"):
        claim_folder(tmp_path, SETTINGS)


def test_a_grid_has_a_class_per_row_and_a_single_class_a_square() -> None:
    images, columns = grid_layout(SamplePlan(classes=(4, 5), per_class=30, batch=50), image_side=16)
    assert columns == 20 and images.tolist() == [*range(20), *range(30, 50)]
    images, columns = grid_layout(SamplePlan(classes=(207,), per_class=16, batch=50), image_side=256)
    assert columns == 4 and images.tolist() == list(range(16))


@pytest.mark.parametrize("side", [16, 256, 512, 1024])
@pytest.mark.parametrize("classes", [1, 1000])
def test_a_grid_is_bounded(classes: int, side: int) -> None:
    images, columns = grid_layout(SamplePlan(tuple(range(classes)), per_class=5000, batch=50), image_side=side)
    rows = -(-len(images) // columns)
    assert columns * side <= sample_files.MAX_GRID_SIDE and rows * side <= sample_files.MAX_GRID_SIDE
    assert columns <= 20 and rows <= 50


def test_the_grid_shows_the_images_in_their_places(tmp_path: Path) -> None:
    files = PngFiles(tmp_path, PLAN)
    write(files, 0, 1, 2)
    with Image.open(draw_grid(files, tmp_path)) as grid:
        shown = np.asarray(grid)
    step = shown.shape[1] // 3
    assert [shown[step * row + step // 2, step * column + step // 2, 0] for row in range(3) for column in range(3)] == [
        picture(image)[0, 0, 0] for image in range(9)
    ]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["samples.png"]
