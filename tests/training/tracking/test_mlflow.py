"""MLflow gets every point of a record once, whatever fails while it is sent, and nothing that is nobody's business."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trackers import URI, FakeMLflow, Killed, connect, page_of, points_of, record_of, train_record, validation_record

from training.tracking import mlflow as mlflow_module
from training.tracking.mlflow import (
    COMMIT_TAG,
    REPLACES_TAG,
    START_OVER,
    StudyPage,
    code_version,
    log_picture,
    open_client,
    read_state,
    refuse_local_artifacts,
    update_state,
)
from training.tracking.record import Record, RunRecord, TrackingConfig


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeMLflow:
    return connect(FakeMLflow(), monkeypatch)


def send_all(folder: Path, **settings: Any) -> int:
    """A process that sends what is missing and ends; the points it has sent."""
    page = page_of(folder, **settings)
    try:
        page.catch_up("FINISHED")
        return page.num_sent
    finally:
        page.release()


def some_records(first: int, last: int) -> list[Record]:
    return [*map(train_record, range(first, last + 1)), validation_record(last)]


def failing(number: int, fault: str) -> Callable[[int], str]:
    """Let the call of this number fail."""
    return lambda call: fault if call == number else ""


def test_a_tracker_holds_what_the_record_holds_and_nothing_is_sent_twice(tmp_path: Path, client: FakeMLflow) -> None:
    expected = points_of(record_of(tmp_path, *some_records(1, 120)).read())  # more than one slice
    assert [send_all(tmp_path), send_all(tmp_path)] == [len(expected), 0]
    assert client.history() == expected


def test_training_records_are_thinned_and_none_of_the_others(tmp_path: Path, client: FakeMLflow) -> None:
    record = record_of(tmp_path, *some_records(1, 100))
    assert send_all(tmp_path, tracking={"every": 7}) < len(points_of(record.read())) / 5
    record.forget_after(98)
    record.write(some_records(99, 100) + some_records(101, 120))
    send_all(tmp_path, tracking={"every": 7})
    assert client.history() == points_of(record.read(), TrackingConfig(every=7))


def test_the_unit_of_a_curve_stays_what_it_was_at_first(tmp_path: Path, client: FakeMLflow) -> None:
    record = record_of(tmp_path, validation_record(1, loss_last=1.0, pflop=0.5))
    send_all(tmp_path, tracking={"curve_unit": "GFLOP"})
    record.write([validation_record(2, loss_last=0.5, pflop=1.0)])
    send_all(tmp_path, tracking={"curve_unit": "TFLOP"})
    drawn = {step: value for (name, step), value in client.history().items() if name == "curve/loss_last"}
    assert drawn == {500_000: [1.0], 1_000_000: [0.5]}
    assert client.active()[0].data.tags["curve_unit"] == "GFLOP"


def test_what_fails_is_sent_by_the_next_process_wherever_it_fails(
    tmp_path: Path, client: FakeMLflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call of a session fails once, in each of four ways; then training takes some of the steps again."""
    record_of(tmp_path / "undisturbed", *some_records(1, 120))
    send_all(tmp_path / "undisturbed", depth=2)
    for number in range(len(client.calls)):
        for fault in ("refused", "lost", "killed", "killed after"):
            struck, folder = connect(FakeMLflow(), monkeypatch), tmp_path / f"{number}-{fault}"
            record = record_of(folder, *some_records(1, 120))
            struck.fail = failing(number, fault)
            with pytest.raises((ConnectionError, Killed)):
                send_all(folder, depth=2)
            record.forget_after(100)
            record.write(some_records(101, 120) + some_records(121, 130))
            send_all(folder, depth=2)
            assert struck.history() == points_of(record.read()), (number, fault)
            assert struck.active()[0].data.params == {"depth": "2"}


def test_an_attempt_goes_on_where_the_last_one_failed(tmp_path: Path, client: FakeMLflow) -> None:
    record = record_of(tmp_path, *some_records(1, 300))
    page = page_of(tmp_path)
    client.fail = lambda call: ("refused", "lost")[call % 2] if call % 3 == 0 else ""
    for _ in range(100):
        try:
            page.catch_up("FINISHED")
            break
        except ConnectionError:
            continue
    assert client.history() == points_of(record.read())


def test_a_tracker_that_comes_back_with_less_gets_it_again(tmp_path: Path, client: FakeMLflow) -> None:
    """A database was put back from a copy, so that the place in the record says too much."""
    record = record_of(tmp_path, *some_records(1, 60))
    page = page_of(tmp_path)
    page.catch_up("RUNNING")
    client.points.clear()
    client.active()[0].data.metrics.clear()
    record.write(some_records(61, 70))
    client.fail = failing(len(client.calls), "refused")
    with pytest.raises(ConnectionError):
        page.catch_up("RUNNING")
    page.catch_up("RUNNING")
    assert client.history() == points_of(record.read())


def test_a_record_too_large_for_one_call_is_sent_in_several_its_step_last(tmp_path: Path, client: FakeMLflow) -> None:
    record = record_of(tmp_path, train_record(1, loss=[0.5] * 2500), train_record(2))
    client.fail = lambda call: "killed after" if client.calls.count("log_batch") == 2 else ""
    with pytest.raises(Killed):
        send_all(tmp_path)
    assert "progress/train_step" not in client.active()[0].data.metrics
    client.fail = lambda call: ""
    send_all(tmp_path)
    assert client.history().keys() == points_of(record.read()).keys()


def test_calls_hold_as_many_whole_records_as_fit(tmp_path: Path, client: FakeMLflow) -> None:
    record_of(tmp_path, *[train_record(step, loss=[0.5] * 298) for step in range(1, 8)])  # 300 metrics each
    send_all(tmp_path)
    assert client.calls.count("log_batch") == 3


@pytest.mark.parametrize("loss", ["mlflow.json", "the run", "a deleted run", "the tracker"])
def test_what_gets_lost_is_found_or_made_again(
    tmp_path: Path, client: FakeMLflow, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    record = record_of(tmp_path, *some_records(1, 60))
    send_all(tmp_path)
    [first] = client.active()
    if loss == "mlflow.json":
        (tmp_path / "mlflow.json").unlink()
    elif loss == "a deleted run":
        first.info.lifecycle_stage = "deleted"
    elif loss == "the run":
        client.runs.clear(), client.points.clear()
    else:
        client = connect(FakeMLflow(), monkeypatch)
    record.write(some_records(61, 70))
    send_all(tmp_path)
    assert client.history() == points_of(record.read())
    assert (client.active() == [first]) == (loss == "mlflow.json")


def test_another_tracker_gets_all_of_it_and_the_run_keeps_what_is_its_own(
    tmp_path: Path, client: FakeMLflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = record_of(tmp_path, *some_records(1, 60))
    update_state(tmp_path, status="FAILED", git="0123abc")
    send_all(tmp_path)
    assert client.active()[0].data.tags[COMMIT_TAG] == "0123abc"
    other = connect(FakeMLflow(), monkeypatch)
    send_all(tmp_path, uri="http://other:5000")
    assert other.history() == points_of(record.read())
    state = read_state(tmp_path)
    assert (state["uri"], state["status"], state["git"]) == ("http://other:5000", "FAILED", "0123abc")


@pytest.mark.parametrize("fault", ["", "refused", "lost"])
def test_a_run_started_over_has_a_fresh_mlflow_run_wherever_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    for number in range(12):
        client, folder = connect(FakeMLflow(), monkeypatch), tmp_path / str(number)
        record = record_of(folder, *map(train_record, range(1, 31)))
        page = page_of(folder)
        page.catch_up("RUNNING")
        record.forget_after(20)
        record.write([train_record(step, loss_avg=7.0) for step in range(21, 41)])
        (folder / START_OVER).touch()
        client.fail = failing(len(client.calls) + number, fault)
        for _ in range(2):
            try:
                page.catch_up("RUNNING")
            except ConnectionError:
                continue
        assert client.history() == points_of(record.read()), number
        assert len(client.runs) == 2 and client.active()[0].data.tags[REPLACES_TAG] == f"{1:032x}"
        assert not (folder / START_OVER).exists()


def test_a_start_over_without_a_run_makes_one(tmp_path: Path, client: FakeMLflow) -> None:
    record = record_of(tmp_path, train_record(1))
    (tmp_path / START_OVER).touch()
    send_all(tmp_path)
    assert client.history() == points_of(record.read()) and len(client.runs) == 1


def test_a_changed_parameter_stands_in_a_tag(tmp_path: Path, client: FakeMLflow) -> None:
    record_of(tmp_path, *some_records(1, 3))
    send_all(tmp_path, lr=0.1, depth=2)
    send_all(tmp_path, lr=0.2, depth=2, ema=0.9)
    [run] = client.active()
    assert run.data.params == {"lr": "0.1", "depth": "2", "ema": "0.9"}
    assert {name: value for name, value in run.data.tags.items() if "/" in name} == {"changed/lr": "0.2"}
    send_all(tmp_path, lr=0.1, depth=2, ema=0.9)
    assert run.data.tags["changed/lr"] == "0.1"


def test_the_status_is_set_when_it_changes(tmp_path: Path, client: FakeMLflow) -> None:
    record_of(tmp_path, train_record(1))
    seen = []
    for status in ("RUNNING", "KILLED", "RUNNING", "RUNNING", "FAILED", "FINISHED"):
        page = page_of(tmp_path)
        page.catch_up(status)
        page.release()
        seen.append(client.active()[0].info.status)
    assert seen == ["RUNNING", "KILLED", "RUNNING", "RUNNING", "FAILED", "FINISHED"]
    assert client.calls.count("update_run") == 1


def test_one_process_sends_a_run_and_the_next_one_once_it_is_released(tmp_path: Path, client: FakeMLflow) -> None:
    record_of(tmp_path, train_record(1))
    first, second = page_of(tmp_path), page_of(tmp_path)
    first.catch_up("RUNNING")
    calls = len(client.calls)
    with pytest.raises(BlockingIOError, match=str(tmp_path)):
        second.catch_up("FINISHED")
    assert len(client.calls) == calls
    first.release()
    second.catch_up("FINISHED")


def open_study(folder: Path, *, search: bool) -> None:
    page = StudyPage(folder, TrackingConfig(uri=URI, experiment="scaling", study="sizes"))
    page.open(search=search)
    page.release()


def test_a_study_is_one_run_that_its_folder_names_or_else_its_own_name(tmp_path: Path, client: FakeMLflow) -> None:
    for forgets in (False, False, True):
        if forgets:
            (tmp_path / "mlflow.json").unlink()
        open_study(tmp_path, search=forgets)
    [run] = client.active()
    assert (run.info.run_name, run.data.tags) == ("sizes", {"study": "sizes", "role": "study"})
    assert read_state(tmp_path)["run_id"] == run.info.run_id
    (tmp_path / "mlflow.json").unlink()
    open_study(tmp_path, search=False)  # another study that was given the same name
    assert len(client.active()) == 2


@pytest.mark.parametrize("content", ["", "[1]", "\udcff", '{"uri": ', '{"uri": 3, "train": 4, "more": {}}'])
def test_a_damaged_note_is_as_good_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "mlflow.json").write_bytes(content.encode(errors="surrogateescape"))
    assert read_state(tmp_path) == {}
    update_state(tmp_path, uri="a", run_id="1")
    inode = (tmp_path / "mlflow.json").stat().st_ino
    update_state(tmp_path, uri="a", git=None)  # what changes nothing writes nothing
    assert read_state(tmp_path) == {"uri": "a", "run_id": "1"} and (tmp_path / "mlflow.json").stat().st_ino == inode
    update_state(tmp_path, run_id=None)
    assert read_state(tmp_path) == {"uri": "a"}


def test_the_version_of_the_code_is_a_commit_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch("[0-9a-f]{40,64}(-dirty)?", code_version() or "0" * 40)
    monkeypatch.setenv("PATH", "")
    assert code_version() is None


def test_a_database_takes_it_as_the_fake_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow itself: parameters, tags, the search by tag, a picture, and that points sent twice are one."""
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {"uri": "sqlite:///tracker/mlflow.db", "init_from": ""}
    folder, picture = tmp_path / "digits" / "d2", tmp_path / "figure.png"
    record = record_of(folder, *some_records(1, 60))
    for depth in (2, 4):
        send_all(folder, **settings, depth=depth)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # where a command is started must not matter
    picture.write_bytes(b"a picture")
    settings["uri"] = read_state(folder)["uri"]
    log_picture(folder, picture, settings["uri"], group="7")
    client = open_client(settings["uri"])
    [run] = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    client.log_metric(run.info.run_id, "loss/train_loss_avg", 1 / 3, 1_003_000, 3)  # a call carried out late
    (folder / "mlflow.json").unlink()
    record.write(some_records(61, 70))
    page_of(folder, **settings).catch_up("KILLED")
    [run] = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert (run.info.run_name, run.info.status) == ("digits/d2", "KILLED")
    assert run.data.params == {"depth": "2", "init_from": ""} and run.data.tags["changed/depth"] == "4"
    for name in ("loss/train_loss_avg", "scales/train_loss_02", "loss/validation_loss_avg"):
        found = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
        expected = [(key[1], value) for key, [value] in points_of(record.read()).items() if key[0] == name]
        assert sorted(found) == sorted(expected)
    [stored] = (tmp_path / "tracker" / "mlflow_artifacts").rglob("pictures/7/figure.png")
    assert stored.read_bytes() == picture.read_bytes()
    assert list((tmp_path / "elsewhere").iterdir()) == [] and not (tmp_path / "mlruns").exists()


@pytest.mark.parametrize("ending", ["killed", "overtaken"])
def test_a_database_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """A process is killed before its database is whole; and two processes make the same one at once."""
    file = tmp_path / "mlflow.db"
    link = os.link

    def strike(draft: Path, path: Path) -> None:
        if ending == "killed":
            raise Killed
        path.write_bytes(Path(draft).read_bytes())
        link(draft, path)

    monkeypatch.setattr(os, "link", strike)
    if ending == "killed":
        with pytest.raises(Killed):
            open_client(f"sqlite:///{file}")
        assert not file.exists()
    else:
        assert open_client(f"sqlite:///{file}").search_experiments()[0].name == "Default"
        assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (None, "mlflow.json names no page of sqlite"),
        ({"uri": "http://127.0.0.1:9", "run_id": "1"}, "mlflow.json names no page of sqlite"),
        ({"uri": "sqlite:///TMP/mlflow.db", "run_id": "0" * 32}, "RESOURCE_DOES_NOT_EXIST|not found"),
    ],
)
def test_a_picture_that_mlflow_does_not_take_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], state: Any, said: str
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "a.png").touch()
    if state is not None:
        (tmp_path / "mlflow.json").write_text(json.dumps(state).replace("TMP", str(tmp_path)))
    tracker = f"sqlite:///{tmp_path}/mlflow.db"
    log_picture(tmp_path, tmp_path / "a.png", tracker)
    log_picture(tmp_path, tmp_path / "a.png", "")  # nobody asked for it
    log_picture(tmp_path / "a.png", tmp_path / "a.png", tracker)  # of a model that was not trained here nothing is said
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mlflow: ")]
    assert re.search(said, line) and f"{tmp_path}/a.png" in line


def test_a_foreign_folder_does_not_decide_where_requests_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(mlflow_module, "open_client", asked.append)
    record_of(tmp_path, *some_records(1, 2))
    update_state(tmp_path, uri="http://evil.example", run_id="1")
    log_picture(tmp_path, tmp_path / "a.png", "")
    log_picture(tmp_path, tmp_path / "a.png", "http://mine.example")
    assert asked == [] and "names no page of http://mine.example" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("uri", "place", "accepted"),
    [
        ("http://mine", "mlflow-artifacts:/1/2/artifacts", True),
        ("http://mine", "s3://bucket/1", True),
        ("http://mine", "file:///home/me/.ssh", False),
        ("http://mine", "/home/me/.ssh", False),
        ("http://mine", "./here", False),
        ("sqlite:////data/mlflow.db", "/data/mlflow_artifacts/1/artifacts", True),
        ("sqlite:////data/mlflow.db", "file:///data/mlflow_artifacts/1/artifacts", True),
        ("sqlite:////data/mlflow.db", "file:///data/mlflow_artifacts/../../home/me", False),
        ("sqlite:////data/mlflow.db", "/data/elsewhere", False),
    ],
)
def test_files_are_written_beside_the_own_database_alone(uri: str, place: str, accepted: bool) -> None:
    if accepted:
        refuse_local_artifacts(uri, place)
    else:
        with pytest.raises(ValueError, match="of this machine"):
            refuse_local_artifacts(uri, place)


def test_a_copied_folder_gets_a_page_of_its_own_and_a_moved_one_keeps_its_page(
    tmp_path: Path, client: FakeMLflow
) -> None:
    record_of(tmp_path / "a", *some_records(1, 3))
    send_all(tmp_path / "a")
    first = read_state(tmp_path / "a")["run_id"]
    moved, copy = (tmp_path / "a").rename(tmp_path / "moved"), tmp_path / "copy"
    send_all(moved)
    assert read_state(moved)["run_id"] == first and len(client.active()) == 1
    shutil.copytree(moved, copy)
    (copy / START_OVER).touch()  # must not delete the original's page
    RunRecord(copy).write(some_records(4, 5))
    send_all(copy)
    state = read_state(copy)
    assert state["run_id"] != first and state["copied_from"] == first
    copied = next(run for run in client.active() if run.info.run_id == state["run_id"])
    assert copied.data.tags[mlflow_module.COPIED_TAG] == first and len(client.active()) == 2
    RunRecord(moved).write(some_records(4, 4))
    for folder, expected in ((moved, first), (copy, state["run_id"])):
        send_all(folder)
        assert read_state(folder)["run_id"] == expected and len(client.active()) == 2
