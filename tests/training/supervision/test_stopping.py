"""A request to stop reaches all ranks at the same step, however often it is made; the impatient get what they want."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fork_world import ForkServer

from data_pipeline.files.signals import STOP_SIGNALS
from training.engine.distributed import World
from training.supervision import stopping as module
from training.supervision.stopping import Stopping


@pytest.fixture
def stopping(tmp_path: Path) -> Iterator[Stopping]:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may stand above these tests
    installed = Stopping(tmp_path, World())
    installed.install()
    yield installed
    installed.remove()


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_asks_for_a_stop_in_one_line(
    stopping: Stopping, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    assert stopping.agreed() == ""
    os.kill(os.getpid(), number)
    assert stopping.agreed() == f"{number.name} on rank 0"
    said = capfd.readouterr().err
    assert said.startswith(f"rank 0: {number.name}: training stops") and said.count("\n") == 1


def test_echoes_of_the_first_signal_are_the_same_request(stopping: Stopping, capfd: pytest.CaptureFixture[str]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        os.kill(os.getpid(), number)
    assert stopping.agreed() == "SIGINT on rank 0"
    assert capfd.readouterr().err.count("\n") == 1


def ended(child: Callable[[], None]) -> int:
    """The exit code of a forked process that runs `child`."""
    pid = os.fork()
    if pid == 0:
        try:
            child()
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_second_signal_ends_the_process_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    monkeypatch.setattr(module, "SAME_REQUEST_SECONDS", 0.05)

    def impatient() -> None:
        Stopping(tmp_path, World()).install()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        os.kill(os.getpid(), number)
        time.sleep(5)

    assert ended(impatient) == code


def test_what_asks_without_a_signal_is_the_first_request(stopping: Stopping) -> None:
    """As the watch does when the launcher has died; a signal that follows at once is its echo."""
    assert not stopping.is_asked
    stopping.ask(signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert stopping.is_asked and stopping.agreed() == "SIGTERM on rank 0"


def test_a_finished_run_takes_no_more_requests(tmp_path: Path, stopping: Stopping) -> None:
    stopping.finished()
    os.kill(os.getpid(), signal.SIGTERM)
    assert not stopping.is_asked and stopping.agreed() == ""


def test_signals_that_a_parent_had_ignored_are_heard(tmp_path: Path) -> None:
    def ignored() -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        stopping = Stopping(tmp_path, World())
        stopping.install()
        os.kill(os.getpid(), signal.SIGUSR1)
        os._exit(0 if stopping.agreed() == "SIGUSR1 on rank 0" else 1)

    assert ended(ignored) == 0


def test_a_run_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    def ignored() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stopping = Stopping(tmp_path, World())
        stopping.install()
        os.kill(os.getpid(), signal.SIGHUP)
        os._exit(0 if stopping.agreed() == "" else 1)

    assert ended(ignored) == 0


def test_handlers_of_before_come_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    stopping = Stopping(tmp_path, World())
    stopping.install()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
    stopping.remove()
    stopping.remove()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_file_asks_for_a_stop_until_the_run_has_finished(tmp_path: Path) -> None:
    stopping = Stopping(tmp_path, World())
    assert stopping.agreed() == ""
    (tmp_path / "stop").touch()
    time.sleep(module.LOOK_SECONDS)
    assert stopping.agreed() == f"{tmp_path / 'stop'} was made"
    stopping.finished()
    assert not (tmp_path / "stop").exists()
    assert Stopping(tmp_path, World()).agreed() == ""
    stopping.finished()


def test_two_ranks_agree_at_the_same_step_one_after_a_file_was_made(fork_server: ForkServer, tmp_path: Path) -> None:
    """As after a signal to one of them: test_faults_training."""
    world = fork_server.run("fault_worker:agree_to_stop", {"run": str(tmp_path)})
    assert world.results == [[""] * 3 + [f"{tmp_path / 'stop'} was made"] * 2] * 2, world.explain()
