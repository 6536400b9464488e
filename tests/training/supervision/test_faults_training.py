"""Faults while two ranks train under ZeRO: killed, signalled, resharded, fed with numbers that are none.

Every run is `launchers/train.py` itself, in ranks forked from a process that has imported everything.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_runs import CHECKPOINT_EVERY, GLOBAL_BATCH, STEPS, Run, make_odd_study
from faults import Fired
from fork_world import EndedWorld, ForkServer
from tiny import Study

from training.supervision.stopping import SAME_REQUEST_SECONDS
from training.supervision.watch import GRACE_SECONDS

KILLS = 20
SEED = 11
DONE, DIVERGED, STOPPED = 0, 70, 75
MakeRun = Callable[..., Run]
ALL_SAMPLES = list(range(STEPS * GLOBAL_BATCH))


@pytest.fixture(scope="module")
def odd_study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_odd_study(tmp_path_factory.mktemp("odd"))


@pytest.fixture
def make_run(fork_server: ForkServer, odd_study: Study, tmp_path: Path) -> MakeRun:
    return lambda name, *settings: Run(fork_server, odd_study, tmp_path / name, settings)


@pytest.fixture(scope="module")
def whole(fork_server: ForkServer, odd_study: Study, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nothing interrupts."""
    run = Run(fork_server, odd_study, tmp_path_factory.mktemp("runs") / "whole")
    run.go()
    assert [record["step"] for record in run.records() if record["kind"] == "train"] == list(range(1, STEPS + 1))
    assert run.used_samples() == ALL_SAMPLES and run.saved_steps() == [STEPS - CHECKPOINT_EVERY, STEPS]
    return run


def assert_same(run: Run, whole: Run) -> None:
    """Bit for bit: every number recorded at every step, and the final weights; every sample once."""
    assert run.records() == whole.records()
    assert run.final_weights() == whole.final_weights()
    assert run.used_samples() == whole.used_samples() == ALL_SAMPLES


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.faults), 1])
def test_a_killed_run_goes_on_as_if_nothing_had_been(whole: Run, make_run: MakeRun, rank: int) -> None:
    run = make_run("killed")
    killed = run.go(expect=None, faults=[f"kill@loop.step:rank={rank}:count=8"])
    assert killed.exit_codes[rank] == -signal.SIGKILL and killed.exit_codes[1 - rank] not in (DONE, -signal.SIGKILL)
    assert run.saved_steps() == [3, 6]
    run.go()
    assert_same(run, whole)


class RandomKiller:
    """Kills a rank, or both, at a random seam or a random time; always the same ones in the same order."""

    def __init__(self, sites: list[str], typical_seconds: float) -> None:
        self._draw = random.Random(SEED)
        self._sites = sorted(set(sites))
        self._typical_seconds = typical_seconds
        self.kills = 0

    def strike(self, run: Run) -> EndedWorld:
        """Start the run and kill it. Sometimes it ends first."""
        ranks = self._draw.choice([[0], [1], [0, 1]])
        world = self._at_a_time(run, ranks) if self._draw.random() < 0.4 else self._at_a_seam(run, ranks)
        if any(world.exit_codes[rank] == -signal.SIGKILL and not world.ranks[rank].was_killed for rank in ranks):
            self.kills += 1  # one rank may be done when the other is killed on its last steps: then all is saved
            assert DONE not in world.exit_codes or run.saved_steps()[-1] == STEPS, world.explain()
        else:
            assert set(world.exit_codes) == {DONE}, world.explain()
        return world

    def _at_a_seam(self, run: Run, ranks: list[int]) -> EndedWorld:
        site, count = self._draw.choice(self._sites), self._draw.randint(1, 2)
        faults = [f"kill@{site}:rank={rank}:count={count}" for rank in ranks]
        world = run.go(expect=None, faults=faults, faults_may_miss=True)
        dead = [rank for rank in ranks if world.exit_codes[rank] == -signal.SIGKILL]
        assert {line.rank for line in world.fired} >= {rank for rank in dead if not world.ranks[rank].was_killed}
        return world

    def _at_a_time(self, run: Run, ranks: list[int]) -> EndedWorld:
        world = run.start()
        time.sleep(self._draw.uniform(0.0, 0.9) * self._typical_seconds)
        for rank in ranks:
            world.send(signal.SIGKILL, rank=rank)
        return world.wait()


@pytest.mark.faults
def test_many_random_kills_change_no_bit_and_lose_no_sample(
    whole: Run, make_run: MakeRun, figures: dict[str, str]
) -> None:
    start = time.monotonic()
    recorded = make_run("recorded")
    world = recorded.go(faults=["record@*"])
    assert_same(recorded, whole)  # the recorder changes nothing
    killer, runs = RandomKiller([line.site for line in world.fired], world.seconds), 0
    while killer.kills < KILLS:
        run, runs = make_run(f"killed{runs}"), runs + 1
        while killer.kills < KILLS and killer.strike(run).exit_codes != [DONE, DONE]:
            pass
        run.go()
        assert_same(run, whole)
    figures["training: random SIGKILLs of two ZeRO-3 ranks survived bit for bit"] = f"{killer.kills} in {runs} runs"
    figures["training: samples lost or repeated by them"] = "0"
    figures["training: seconds for these kills"] = f"{time.monotonic() - start:.0f}"


PATIENCE = 4  # seconds without progress
SITES = ("loop.step", "disk.fsync.share*")
WAYS_TO_END = ("kill", "exit0", "exception")  # a crash looks to the others as a kill does
WAYS_TO_HANG = ("lock", "sleep")


@pytest.mark.faults
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("kind", [*WAYS_TO_END, *WAYS_TO_HANG])
def test_when_one_rank_ends_or_hangs_the_others_end_too(
    whole: Run, make_run: MakeRun, figures: dict[str, str], kind: str, site: str
) -> None:
    run = make_run("struck")
    watch = [f"watch.timeout_seconds={PATIENCE}", "watch.start_seconds=60"]
    world = run.go(*watch, expect=None, faults=[f"{kind}@{site}:rank=1:count=2"], grace=40, timeout=60)
    assert not world.timed_out and not any(rank.was_killed for rank in world.ranks), world.explain()
    assert world.exit_codes[0] != DONE and world.left_behind == [], world.explain()
    assert (world.exit_codes[1] == DONE) == (kind == "exit0")
    # the start takes some of these seconds too
    assert world.seconds < (PATIENCE + GRACE_SECONDS if kind in WAYS_TO_HANG else 0) + 10, world.explain()
    figures[f"training: {kind} of rank 1 at {site.rstrip('*')}, seconds from start to end of all"] = (
        f"{world.seconds:.1f}"
    )
    run.go()
    assert_same(run, whole)


# (ranks, further settings) of the three parts of a run; every part stops with a checkpoint
RESHARDINGS = {
    "2-1-2 ranks": [(2, []), (1, []), (2, [])],
    "stage 3-1-3": [(2, []), (2, ["engine.zero_stage=1"]), (2, [])],
    "stage 2-0-3": [(2, ["engine.zero_stage=2"]), (2, ["engine.zero_stage=0"]), (2, [])],
    "both at once": [(2, []), (1, ["engine.zero_stage=0"]), (2, ["engine.zero_stage=1"])],
    "4-2-1 ranks": [(4, ["engine.micro_batch=1"]), (2, []), (1, [])],
}


def train_in_parts(run: Run, parts: list[tuple[int, list[str]]], *shared: str) -> None:
    for number, (world_size, settings) in enumerate(parts, start=1):
        stop = f"loop.stop_after_steps={number * STEPS // len(parts)}"
        run.go(stop, *settings, *shared, world_size=world_size)


@pytest.mark.faults
@pytest.mark.parametrize("name", RESHARDINGS)
def test_ranks_and_stages_may_change_between_parts(
    whole: Run, make_run: MakeRun, figures: dict[str, str], name: str
) -> None:
    run = make_run("resharded")
    train_in_parts(run, RESHARDINGS[name])
    assert run.curve() == pytest.approx(whole.curve(), abs=1e-5)
    assert run.used_samples() == ALL_SAMPLES
    furthest = max(abs(ours - theirs) for ours, theirs in zip(run.curve(), whole.curve(), strict=True))
    figures[f"training: {name}, furthest loss from the whole run's"] = f"{furthest:.1e}"


@pytest.mark.faults
def test_ranks_and_stages_may_change_in_bf16_as_far_as_its_digits_go(make_run: MakeRun) -> None:
    bf16 = "engine.precision=bf16"
    straight, parts = make_run("straight", bf16), make_run("parts", bf16)
    straight.go()
    train_in_parts(parts, [(2, []), (2, ["engine.zero_stage=1"]), (1, ["engine.zero_stage=3"])])
    # 8 bits of mantissa: other sums round otherwise, by up to 2^-9 of a loss near 3
    assert parts.curve() == pytest.approx(straight.curve(), abs=6e-3)
    assert parts.used_samples() == ALL_SAMPLES


@pytest.mark.parametrize("name", ["term", *(pytest.param(name, marks=pytest.mark.faults) for name in ("int", "usr1"))])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(whole: Run, make_run: MakeRun, name: str) -> None:
    run = make_run("stopped")
    fault = f"{name}@loop.step:rank=1:count=8"
    world = run.go(expect=STOPPED, faults=[fault])
    assert world.fired == [Fired(fault, 1, "loop.step")] and world.left_behind == []
    stopped_at = run.saved_steps()[-1]
    assert stopped_at in (8, 9) and run.records()[-1]["step"] == stopped_at
    assert f"SIG{name.upper()} on rank 1" in world.ranks[0].stdout + world.ranks[0].stderr
    run.go()
    assert_same(run, whole)


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_second_signal_during_the_save_leaves_nothing_half_committed(
    whole: Run, make_run: MakeRun, rank: int
) -> None:
    run = make_run("stopped")
    place = f"rank={rank}:count=3"  # the first two saves are those of steps 3 and 6
    pause = f"sleep@disk.fsync.share*:{place}:seconds={SAME_REQUEST_SECONDS + 0.2}"
    second = f"term@disk.fsync.share*:{place}"
    world = run.go(expect=None, faults=[f"term@loop.step:rank={rank}:count=8", pause, second])
    assert world.exit_codes[rank] in (143, -signal.SIGTERM) and DONE not in world.exit_codes, world.explain()
    assert run.saved_steps() == [3, 6]
    run.go()
    assert_same(run, whole)


STAGES = [
    pytest.param(["engine.zero_stage=3"], id="stage 3"),
    pytest.param(["engine.zero_stage=0"], id="stage 0", marks=pytest.mark.faults),
    pytest.param(["engine.zero_stage=1"], id="stage 1", marks=pytest.mark.faults),
    pytest.param(["engine.zero_stage=2", "engine.precision=bf16"], id="stage 2 bf16", marks=pytest.mark.faults),
    pytest.param(["engine.zero_stage=3", "engine.precision=bf16"], id="stage 3 bf16", marks=pytest.mark.faults),
]


def nan_at(step: int, times: int = 1) -> list[str]:
    """There is one forward pass in a step, so the n-th time the loss is reached is in step n."""
    return [f"nan@loop.loss:rank=1:count={step}:times={times}"]


@pytest.mark.faults
@pytest.mark.parametrize("settings", STAGES)
def test_a_bad_step_is_skipped_and_counted(make_run: MakeRun, settings: list[str]) -> None:
    run = make_run("skipping", *settings)
    world = run.go(faults=nan_at(5))
    curve = run.curve()
    assert [step for step, loss in enumerate(curve, start=1) if loss is None] == [5]
    assert "step 5" in world.ranks[0].stdout + world.ranks[0].stderr
    straight = make_run("straight", *settings)
    straight.go(f"loop.stop_after_steps={CHECKPOINT_EVERY * 2}")
    assert curve[:4] == straight.curve()[:4] and curve[5] != straight.curve()[5]  # the step did not happen


@pytest.mark.parametrize("settings", STAGES)
def test_a_bad_step_stops_the_run_naming_rank_and_samples(make_run: MakeRun, settings: list[str]) -> None:
    run = make_run("stopping", "divergence.on_bad_step=stop", *settings)
    world = run.go(expect=DIVERGED, faults=nan_at(5))
    error = world.ranks[0].stderr.strip()
    assert "step 5" in error and "rank 1" in error and "step-00000003" in error and "\n" not in error, error
    assert run.saved_steps() == [3] and run.records()[-1]["step"] == 4


@pytest.mark.faults
def test_bad_steps_in_a_row_end_the_run(make_run: MakeRun) -> None:
    run = make_run("skipping", "divergence.max_skips=2")
    world = run.go(expect=DIVERGED, faults=nan_at(5, times=9))
    assert "step 7" in world.ranks[0].stderr


@pytest.mark.parametrize("settings", STAGES)
def test_a_roll_back_steps_over_the_data(make_run: MakeRun, settings: list[str]) -> None:
    run = make_run("rolling back", "divergence.on_bad_step=roll_back", *settings)
    run.go(faults=nan_at(8))
    assert len(run.curve()) == STEPS and all(loss is not None for loss in run.curve())
    [event] = run.history("roll_back")
    assert event["to"] == 6 and event["samples"] == 2 * GLOBAL_BATCH
    records = [record for record in run.records() if record["kind"] == "train"]
    behind = [record["samples_seen"] - record["step"] * GLOBAL_BATCH for record in records]
    assert behind == [0] * 6 + [2 * GLOBAL_BATCH] * (STEPS - 6)


@pytest.mark.faults
def test_a_roll_back_happens_alike_twice(make_run: MakeRun) -> None:
    runs = [make_run(name, "divergence.on_bad_step=roll_back") for name in ("once", "again")]
    for run in runs:
        run.go(faults=nan_at(8))
    assert runs[0].records() == runs[1].records()
