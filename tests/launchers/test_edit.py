"""launchers/edit.py: boxes and masks in pixels of the picture, the tasks, and what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import VAR_CONFIG, Study, command, train_var

from launchers import edit
from launchers.edit import EditConfig
from launchers.setup.assembly import load_models

PICTURE = Image.new("RGB", (40, 20), "white")  # the model sees columns 10 to 30
LEFT, RIGHT = [[True, False]] * 2, [[False, True]] * 2

Settings = Callable[..., EditConfig]


@pytest.fixture(scope="module")
def run(study: Study) -> str:
    config = study.train_config("edited", stop_after_steps=1)
    train_var(config)
    return config.run


@pytest.fixture
def settings(run: str, tmp_path: Path) -> Settings:
    """An in-painting of the right half of a noisy picture, with changes."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")

    def make(**changes: Any) -> EditConfig:
        box = () if "mask" in changes else (0.0, 4.0, 8.0, 8.0)
        given = {"run": run, "image": str(tmp_path / "photo.png"), "task": "inpaint", "box": box}
        return EditConfig(**(given | {"out": str(tmp_path / "out"), "variants": 3} | changes))

    return make


def results(config: EditConfig, *, with_panel: bool = False) -> list[np.ndarray]:
    """What is drawn; the panel takes as long as all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        if not with_panel:
            patch.setattr(edit, "draw_table", lambda *cells, **labels: None)
        edit.launch(command(config))
    return [np.asarray(Image.open(path)) for path in sorted(Path(config.out).glob("seed-*.png"))]


@pytest.mark.parametrize("task, kept", [("inpaint", LEFT), ("edit", LEFT), ("outpaint", RIGHT)])
def test_the_box_is_drawn_anew_or_stays_and_counts_pixels_of_the_picture(
    settings: Settings, task: str, kept: list[list[bool]]
) -> None:
    config = settings(task=task, box=(0.0, 20.0, 20.0, 35.0))  # beyond what the model sees, where it is cut
    assert edit.read_keep_mask(config, PICTURE, 2).tolist() == kept


def test_the_white_part_of_a_mask_is_what_the_box_would_be(settings: Settings, tmp_path: Path) -> None:
    mask = Image.new("L", PICTURE.size, 0)
    mask.paste(255, (20, 0, 40, 20))
    mask.save(tmp_path / "mask.png")
    assert edit.read_keep_mask(settings(mask=str(tmp_path / "mask.png")), PICTURE, 2).tolist() == LEFT


def test_without_a_label_no_class_is_asked_for(settings: Settings) -> None:
    assert edit.wanted_label(settings(), VAR_CONFIG) == VAR_CONFIG.null_class
    assert edit.wanted_label(settings(task="outpaint", label=2), VAR_CONFIG) == 2


def test_every_seed_is_a_result_and_the_panel_shows_them(settings: Settings) -> None:
    config = settings(batch=2)
    drawn = results(config, with_panel=True)
    assert [picture.shape for picture in drawn] == [(8, 8, 3)] * 3
    assert not np.array_equal(drawn[0], drawn[1])
    assert (Path(config.out) / "panel.png").is_file()
    more = results(settings(seed=1, out=config.out + "2", batch=1))
    assert np.abs(more[0].astype(int) - drawn[1]).max() <= 1  # seed 1; another batch may round a pixel otherwise


def test_kept_tokens_are_those_of_the_picture(settings: Settings) -> None:
    models, original = load_models(settings().run), torch.rand(1, 3, 8, 8) * 2 - 1
    kept = torch.tensor(LEFT)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        generate = edit.generate_scales
        patch.setattr(edit, "generate_scales", lambda *a, **k: seen.append(generate(*a, **k)) or seen[-1])
        reconstruction, _ = edit.draw_results(settings(), models, original, kept, label=0)
    codes, given = seen[0].codes, models.tokenizer.encode(original)
    assert torch.equal(reconstruction, models.tokenizer.decode(given))
    assert (codes[:, [0, 1, 3]] == given[:, [0, 1, 3]]).all()  # the 1x1 scale, and the left column of the 2x2 scale
    assert (codes[:, [2, 4]] != given[:, [2, 4]]).any()


def test_pixels_that_stay_are_the_pictures_own_if_asked_for(settings: Settings) -> None:
    photo = np.asarray(Image.open(settings().image))
    plain, kept = results(settings())[0], results(settings(keep_pixels=True, feather=0))[0]
    assert np.array_equal(kept[:, :4], photo[:, :4]) and not np.array_equal(plain[:, :4], photo[:, :4])
    assert np.array_equal(kept[:, 4:], plain[:, 4:])


@pytest.mark.parametrize("change", [{"smooth": True}, {"keep_coarsest": False}, {"top_k": 1}, {"seed": 7}])
def test_options_change_the_result(settings: Settings, change: dict[str, Any]) -> None:
    assert not np.array_equal(np.stack(results(settings())), np.stack(results(settings(**change))))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_draws_too(settings: Settings, precision: str) -> None:
    assert len(results(settings(precision=precision))) == 3


def test_results_of_an_earlier_command_do_not_stay_among_those_of_this_one(settings: Settings) -> None:
    results(settings(variants=3))
    assert len(results(settings(variants=1))) == 1


def test_the_folder_of_a_result_tells_picture_task_place_and_class(settings: Settings) -> None:
    for change, name in (
        ({}, "photo-inpaint-0-4-8-8"),
        ({"task": "edit", "label": 2}, "photo-edit-0-4-8-8-as-2"),
        ({"mask": "masks/hat.png"}, "photo-inpaint-hat"),
    ):
        assert edit.default_out(settings(out="", **change)) == Path(settings().run) / "edits" / name
    assert edit.default_out(settings(run=__file__, out="")).parent == Path("edits/test_edit")


def test_what_was_asked_for_is_recorded_beside_the_results(settings: Settings) -> None:
    config = settings(seed=3, variants=1)
    results(config)
    recorded = json.loads((Path(config.out) / "edit.json").read_text())
    assert (recorded["task"], recorded["seed"], recorded["box"]) == ("inpaint", 3, [0.0, 4.0, 8.0, 8.0])


def test_the_seam_is_half_a_token_wide_unless_told_otherwise(settings: Settings) -> None:
    default, two, hard = (results(settings(keep_pixels=True, feather=width))[0] for width in (None, 2, 0))
    assert np.array_equal(default, two) and not np.array_equal(default, hard)  # a token is 4 pixels wide


def test_a_dry_run_writes_nothing(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    edit.launch(command(settings(), dry_run=True))
    assert "inpaint: 50% of" in capsys.readouterr().out
    assert not Path(settings().out).exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": "nowhere.png"}, "nowhere.png: no such picture"),
        ({"image": "/"}, "/: is a folder"),
        ({"out": __file__}, "is a file; choose another folder"),
        ({"image": __file__}, "not a JPEG, PNG or WEBP image"),
        ({"task": "edit"}, "task edit draws a class; add --label with one of 0 to 2"),
        ({"label": 3}, "label is 3; this model knows 0 to 2"),
        ({"box": (0.0, 0.0, 1.0, 1.0)}, "box 0 0 1 1 holds no token of the picture; .*4 or more to a side"),
        ({"box": (0.0, 9.0, 8.0, 12.0)}, "holds no token"),
        ({"task": "outpaint", "box": (0.0, 0.0, 8.0, 8.0)}, "all of .* would stay"),
    ],
)
def test_what_cannot_be_edited_is_refused_before_anything_is_written(
    settings: Settings, change: dict[str, Any], message: str
) -> None:
    config = settings(**change)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        edit.launch(command(config))
    assert not Path(config.out).is_dir()


def test_a_mask_has_the_size_of_its_image_and_marks_something(settings: Settings, tmp_path: Path) -> None:
    mask = tmp_path / "mask.png"
    Image.new("L", (8, 9)).save(mask)
    with pytest.raises(ValueError, match="mask.png: has 8 x 9 pixels, the image 8 x 8"):
        edit.launch(command(settings(mask=str(mask))))
    Image.new("L", (8, 8)).save(mask)
    with pytest.raises(ValueError, match="all of .* would stay"):
        edit.launch(command(settings(mask=str(mask))))
    with pytest.raises(ValueError, match="none of .* would stay"):
        edit.launch(command(settings(mask=str(mask), task="outpaint")))
