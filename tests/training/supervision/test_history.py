"""What happened to a run is remembered, also by a process that was killed while it wrote."""

from __future__ import annotations

from pathlib import Path

from training.supervision.history import CHECKPOINT, START, History


def test_the_first_start_and_the_last_save_count(tmp_path: Path) -> None:
    history = History(tmp_path / "run")
    assert history.first_start() is None and history.saved_step() is None
    history.note(START, step=0)
    first = history.first_start()
    for step in (10, 20):
        history.note(CHECKPOINT, step=step)
    history.note(START, step=20)
    assert History(tmp_path / "run").first_start() == first
    assert history.saved_step() == 20
    assert [event["step"] for event in history.events(START)] == [0, 20]


def test_a_damaged_line_is_no_event(tmp_path: Path) -> None:
    history = History(tmp_path)
    history.note(START, step=0)
    with history.path.open("a") as file:
        file.write('{"event": "start", "time": NaN}\n')
    history.note(CHECKPOINT, step=7)
    with history.path.open("a") as file:
        file.write('{"event": "checkpoint"}\n{"event": "checkpoint", "step": [1]}\n{"event": "checkpoint", "st')
    assert history.saved_step() == 7 and isinstance(history.first_start(), float)
    assert len(history.events(START)) == 1
