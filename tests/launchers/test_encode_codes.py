"""launchers/encode_codes.py: what is encoded already is not encoded again, and never over something else."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import Study, command
from workers import content

from launchers import encode_codes


def test_encoding_again_does_nothing_and_another_number_of_views_is_not_taken_for_done(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    encode_codes.launch(command(study.encode_config()))
    assert capsys.readouterr().out.count("nothing to do") == 2
    for dry_run in (True, False):
        with pytest.raises(ValueError, match="holds codes with views 2, now it is 3; delete it first"):
            encode_codes.launch(command(study.encode_config(views=3), dry_run=dry_run))


def test_a_dry_run_says_how_much_would_be_encoded(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "codes")
    encode_codes.launch(command(study.encode_config(views=3, out=out), dry_run=True))
    said = capsys.readouterr().out
    assert "would encode 12 images x 3 views" in said and "would encode 6 images x 1 views" in said
    assert not Path(out).exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_every_process_of_a_launcher_is_one_more_worker_and_the_first_speaks(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    for name, value in {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}.items():
        monkeypatch.setenv(name, value)
    encode_codes.launch(command(study.encode_config(out=str(tmp_path / "codes"))))  # waits for nobody
    assert content(tmp_path / "codes") == content(study.folder / "codes")
    assert ("train: complete, 12 images" in capsys.readouterr().out) == (rank == 0)


def test_going_on_with_another_setting_is_refused_by_name(study: Study, tmp_path: Path) -> None:
    out = str(tmp_path / "codes")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encode_codes, "encode_on", interrupt)
        encode_codes.launch(command(study.encode_config(out=out)))
    with pytest.raises(ValueError, match="batch .*, now it is 3; go on with the same"):
        encode_codes.launch(command(study.encode_config(out=out, batch=3)))
    encode_codes.launch(command(study.encode_config(out=out)))
    assert content(tmp_path / "codes") == content(study.folder / "codes")


def interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt
