"""MLflow gets every point of a record once, whatever fails while it is sent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trackers import FakeMLflow, Killed, points_of, record_of, tracker_of, train_record, validation_record

from training import seams
from training.tracking.mlflow_client import OF_STUDY, PARENT_TAG, open_client, study_tags
from training.tracking.mlflow_state import ViewState, read_state
from training.tracking.mlflow_tracker import Sent
from training.tracking.mlflow_uploader import Uploader
from training.tracking.record import Record, TrackingConfig

FAULTS = ("refused", "lost", "killed", "killed after")


@pytest.fixture
def client() -> FakeMLflow:
    return FakeMLflow()


@pytest.fixture
def no_fault_left() -> Iterator[None]:
    yield
    seams.install(None)


def send_all(folder: Path, client: Any, **parameters: Any) -> Sent:
    """A process that sends what is missing and ends."""
    tracker = tracker_of(folder, client, **parameters)
    try:
        uploader = Uploader(tracker)
        uploader.catch_up("FINISHED")
        return uploader.sent
    finally:
        tracker.state.release()


def some_records(first: int, last: int) -> list[Record]:
    records = [train_record(step) for step in range(first, last + 1)]
    return records + [validation_record(last)]


def test_a_tracker_holds_what_the_record_holds_and_nothing_is_sent_twice(tmp_path: Path, client: FakeMLflow) -> None:
    record = record_of(tmp_path, *some_records(1, 120))  # more than one slice
    expected = points_of(record.read())
    assert send_all(tmp_path, client) == Sent(new=len(expected), known=0)
    assert client.history() == expected
    assert send_all(tmp_path, client) == Sent(new=0, known=len(expected))
    assert client.history() == expected


def test_training_records_are_thinned_and_none_of_the_others(tmp_path: Path, client: FakeMLflow) -> None:
    config = TrackingConfig(every=7)
    record = record_of(tmp_path, *some_records(1, 100))
    expected = points_of(record.read(), config)
    assert send_all(tmp_path, client, tracking={"every": 7}).new == len(expected) < len(points_of(record.read())) / 5
    record.forget_after(98)
    record.write(some_records(99, 100) + some_records(101, 120))
    send_all(tmp_path, client, tracking={"every": 7})
    assert client.history() == points_of(record.read(), config)
    assert send_all(tmp_path, client, tracking={"every": 7}).new == 0


def test_loss_against_compute_is_sent_once_however_often_a_run_starts_again(tmp_path: Path, client: FakeMLflow) -> None:
    def measured(step: int) -> Record:
        return validation_record(step, loss_last=1 / step, pflop=step * 1e-2)

    record = record_of(tmp_path, *[measured(step) for step in (1, 2, 4, 8)])
    send_all(tmp_path, client)
    record.forget_after(4)
    record.write([measured(step) for step in (8, 16)])
    send_all(tmp_path, client)
    drawn = {step: value for (name, step), value in client.history().items() if name == "curve/loss_last"}
    assert drawn == {10: [1.0], 20: [1 / 2], 40: [1 / 4], 80: [1 / 8], 160: [1 / 16]}


def test_the_unit_of_a_curve_stays_what_it_was_at_first(tmp_path: Path, client: FakeMLflow) -> None:
    record = record_of(tmp_path, validation_record(1, pflop=0.5))
    send_all(tmp_path, client, tracking={"curve_unit": "GFLOP"})
    record.write([validation_record(2, pflop=1.0)])
    send_all(tmp_path, client, tracking={"curve_unit": "TFLOP"})
    assert [step for name, step in client.history() if name == "curve/pflop"] == [500_000, 1_000_000]
    assert client.active()[0].data.tags["curve_unit"] == "GFLOP"


def test_a_run_of_a_study_puts_itself_below_it_as_soon_as_it_is_there(tmp_path: Path, client: FakeMLflow) -> None:
    record_of(tmp_path / "d6", *some_records(1, 3))
    send_all(tmp_path / "d6", client, tracking={"study": "sizes"})
    [child] = client.active()
    assert child.info.run_name == "d6"
    assert {name: child.data.tags.get(name) for name in ("study", "role", PARENT_TAG)} == {
        "study": "sizes",
        "role": "train",
        PARENT_TAG: None,
    }
    parent = client.create_run("7", run_name="sizes", tags=study_tags("sizes", OF_STUDY))
    client.create_run("7", run_name="other", tags=study_tags("other", OF_STUDY))
    send_all(tmp_path / "d6", client, tracking={"study": "sizes"})
    assert child.data.tags[PARENT_TAG] == parent.info.run_id


def test_the_commit_of_the_code_is_a_tag(tmp_path: Path, client: FakeMLflow) -> None:
    record_of(tmp_path, *some_records(1, 3))
    ViewState(tmp_path).update(git="0123abc")
    send_all(tmp_path, client)
    assert client.active()[0].data.tags["mlflow.source.git.commit"] == "0123abc"


def test_what_fails_is_sent_by_the_next_attempt_or_process_wherever_it_fails(tmp_path: Path) -> None:
    """Every call of a session fails once, in each of four ways; then training takes some of the steps again."""
    undisturbed = FakeMLflow()
    record_of(tmp_path / "undisturbed", *some_records(1, 120))
    send_all(tmp_path / "undisturbed", undisturbed, depth=2)
    for number in range(len(undisturbed.calls)):
        for fault in FAULTS:
            client, folder = FakeMLflow(), tmp_path / f"{number}-{fault}"
            record = record_of(folder, *some_records(1, 120))
            client.fail = lambda call: fault if call == number else ""
            with pytest.raises((ConnectionError, Killed)):
                send_all(folder, client, depth=2)
            record.forget_after(100)
            record.write(some_records(101, 120) + some_records(121, 130))
            send_all(folder, client, depth=2)
            assert client.history() == points_of(record.read()), (number, fault)
            assert client.active()[0].data.params == {"depth": "2"}


def test_an_attempt_goes_on_where_the_last_one_failed(tmp_path: Path, client: FakeMLflow) -> None:
    record = record_of(tmp_path, *some_records(1, 300))
    uploader = Uploader(tracker_of(tmp_path, client))
    for _ in range(100):  # every third call fails, in one way or the other
        client.fail = lambda call: ("refused", "lost")[call % 2] if call % 3 == 0 else ""
        try:
            uploader.catch_up("FINISHED")
            break
        except ConnectionError:
            continue
    assert client.history() == points_of(record.read())


@pytest.mark.parametrize("site", ["mlflow.send", "mlflow.sent"])
def test_a_process_killed_around_a_call_leaves_nothing_to_repair(
    tmp_path: Path, client: FakeMLflow, site: str, no_fault_left: None
) -> None:
    reached: list[str] = []

    def kill(here: str, value: Any) -> Any:
        reached.extend([here] if here == site else [])
        if len(reached) == 2:
            raise Killed
        return value

    record = record_of(tmp_path, *some_records(1, 120))
    seams.install(kill)
    with pytest.raises(Killed):
        send_all(tmp_path, client)
    seams.install(None)
    send_all(tmp_path, client)
    assert client.history() == points_of(record.read()) and len(reached) == 2


def test_steps_taken_again_keep_the_values_they_had(tmp_path: Path, client: FakeMLflow) -> None:
    record = record_of(tmp_path, *[train_record(step) for step in range(1, 31)])
    send_all(tmp_path, client)
    record.forget_after(25)
    record.write([train_record(step, time=5000.0) for step in range(26, 41)])
    send_all(tmp_path, client)
    assert client.history() == points_of([train_record(step) for step in range(1, 41)])


def test_a_record_too_large_for_one_call_is_sent_in_several_its_step_last(tmp_path: Path, client: FakeMLflow) -> None:
    record = record_of(tmp_path, train_record(1, loss=[0.5] * 2500), train_record(2))
    client.fail = lambda call: "killed after" if client.calls.count("log_batch") == 2 else ""
    with pytest.raises(Killed):
        send_all(tmp_path, client)
    assert "progress/train_step" not in client.active()[0].data.metrics
    client.fail = lambda call: ""
    send_all(tmp_path, client)
    assert client.history().keys() == points_of(record.read()).keys()


def test_calls_hold_as_many_whole_records_as_fit(tmp_path: Path, client: FakeMLflow) -> None:
    record_of(tmp_path, *[train_record(step, loss=[0.5] * 298) for step in range(1, 8)])  # 300 metrics each
    send_all(tmp_path, client)
    assert client.calls.count("log_batch") == 3


@pytest.mark.parametrize("loss", ["mlflow.json", "the run", "a deleted run", "the tracker"])
def test_what_gets_lost_is_found_or_made_again(tmp_path: Path, client: FakeMLflow, loss: str) -> None:
    record = record_of(tmp_path, *some_records(1, 60))
    send_all(tmp_path, client)
    [first] = client.active()
    if loss == "mlflow.json":
        (tmp_path / "mlflow.json").unlink()
    elif loss == "a deleted run":
        first.info.lifecycle_stage = "deleted"
    elif loss == "the run":
        client.runs.clear(), client.points.clear()
    else:
        client = FakeMLflow()
    record.write(some_records(61, 70))
    send_all(tmp_path, client)
    assert client.history() == points_of(record.read())
    assert (client.active() == [first]) == (loss == "mlflow.json")


def test_a_tracker_restored_from_a_backup_gets_what_it_has_forgotten(tmp_path: Path, client: FakeMLflow) -> None:
    record = record_of(tmp_path, *some_records(1, 60))
    uploader = Uploader(tracker_of(tmp_path, client))
    uploader.catch_up("RUNNING")
    [run] = client.active()
    client.points[run.info.run_id] = [point for point in client.points[run.info.run_id] if point[1] <= 20]
    run.data.metrics = {"progress/train_step": 20.0}
    record.write([train_record(61)])
    client.fail = lambda call: "refused" if call == len(client.calls) - 1 and client.calls[-1] == "log_batch" else ""
    with pytest.raises(ConnectionError):
        uploader.catch_up("RUNNING")
    client.fail = lambda call: ""
    uploader.catch_up("RUNNING")
    assert client.history() == points_of(record.read())


def test_another_tracker_gets_all_of_it(tmp_path: Path, client: FakeMLflow) -> None:
    record = record_of(tmp_path, *some_records(1, 60))
    send_all(tmp_path, client)
    other = FakeMLflow()
    tracker = tracker_of(tmp_path, other, uri="http://other:5000")
    Uploader(tracker).catch_up("FINISHED")
    assert other.history() == points_of(record.read())
    assert read_state(tmp_path)["uri"] == "http://other:5000"


def test_a_run_of_an_earlier_format_goes_on_behind_its_note(tmp_path: Path, client: FakeMLflow) -> None:
    record = record_of(tmp_path, *some_records(1, 60))
    send_all(tmp_path, client)
    [run] = client.active()
    run.data.metrics = {}  # it was sent without its steps
    note = {"uri": "http://tracker:5000", "run_id": run.info.run_id, "experiment_id": "7"}
    (tmp_path / "mlflow.json").write_text(json.dumps(note | {"train": 60, "validation": 60}))
    record.write(some_records(61, 70))
    send_all(tmp_path, client)
    assert client.history() == points_of(record.read())


def test_a_changed_parameter_stands_in_a_tag(tmp_path: Path, client: FakeMLflow) -> None:
    record_of(tmp_path, *some_records(1, 3))
    send_all(tmp_path, client, lr=0.1, depth=2)
    send_all(tmp_path, client, lr=0.2, depth=2, ema=0.9)
    [run] = client.active()
    assert run.data.params == {"lr": "0.1", "depth": "2", "ema": "0.9"}
    assert {name: value for name, value in run.data.tags.items() if "/" in name} == {"changed/lr": "0.2"}
    send_all(tmp_path, client, lr=0.1, depth=2, ema=0.9)
    assert run.data.tags["changed/lr"] == "0.1"


def test_a_database_takes_it_as_the_fake_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow itself: parameters, tags, the search by tag, and that points sent twice are one."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    uri = f"sqlite:///{tmp_path}/tracker/mlflow.db"
    folder = tmp_path / "digits" / "d2"
    record = record_of(folder, *some_records(1, 60))
    client = open_client(uri)
    for parameters in ({"model.depth": 2, "init_from": ""}, {"model.depth": 4, "init_from": ""}):
        tracker = tracker_of(folder, client, uri=uri, **parameters)
        Uploader(tracker).catch_up("FINISHED")
        tracker.state.release()
    tracker._log([("loss/train_loss_avg", 1 / 3, 1_003_000, 3)])  # a call carried out late, after it was repeated
    (folder / "mlflow.json").unlink()
    record.write(some_records(61, 70))
    tracker = tracker_of(folder, client, uri=uri)
    Uploader(tracker).catch_up("KILLED")
    [run] = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert (run.info.run_name, run.info.status) == ("digits/d2", "KILLED")
    assert run.data.params == {"model.depth": "2", "init_from": ""}
    assert run.data.tags["changed/model.depth"] == "4"
    for name in ("loss/train_loss_avg", "scales/train_loss_02", "loss/validation_loss_avg"):
        found = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
        expected = [(key[1], value) for key, [value] in points_of(record.read()).items() if key[0] == name]
        assert sorted(found) == sorted(expected)
