"""Plans of training on many GPUs fit the GPUs, and are the fastest of those that do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from repository import ROOT

from launchers.plan_scaling import NONE_FITS, PLANNED, Plan, PlanScalingConfig, best_plan, table
from launchers.setup.config_files import load_config
from launchers.setup.settings import TrainConfig
from models.var import CHECKPOINTINGS
from training.planning.memory import estimate_memory
from training.planning.step_time import ClusterConfig, step_time

D16 = str(ROOT / "configs" / "d16.yaml")


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def shown() -> list[list[str]]:
    """The rows of the table, as cells."""
    lines = [line for line in table(PlanScalingConfig()) if line.startswith("| d")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def small(stage: int = 1, *, gib: float = 79.6, global_batch: int = 64) -> tuple[PlanScalingConfig, TrainConfig]:
    config = PlanScalingConfig(sizes=(D16,), global_batch=global_batch, gpus=(8,), cluster=cluster(gib))
    train = load_config(TrainConfig, D16)
    return config, replace(train, engine=replace(train.engine, zero_stage=stage))


def cluster(gib: float) -> ClusterConfig:
    return ClusterConfig(gpu_memory_gib=gib)


def plan_for(stage: int, *, gib: float, gpus: int = 8) -> Plan:
    plan = best_plan(*small(stage, gib=gib), gpus)
    assert plan is not None
    return plan


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("gib", [5, 8, 80])
def test_a_plan_fits_and_takes_every_image_once(stage: int, gib: float) -> None:
    plan = plan_for(stage, gib=gib)
    assert plan.peak_bytes <= cluster(gib).usable_bytes
    assert plan.engine.micro_batch <= plan.fit and plan.engine.zero_stage == stage
    assert 8 * plan.engine.micro_batch * plan.accumulation == 64


@pytest.mark.parametrize("gib", [2, 2.5, 3, 80])
def test_no_way_of_checkpointing_that_fits_is_faster(gib: float) -> None:
    plan, (config, train) = plan_for(3, gib=gib), small(3)
    for way in CHECKPOINTINGS:
        engine = replace(plan.engine, activation_checkpointing=way)
        if estimate_memory(train.model, engine, 8).peak.total <= cluster(gib).usable_bytes:
            other = step_time(train.model, engine, config.cluster, 8, accumulation=plan.accumulation)
            assert plan.time.total <= other.total


def test_the_less_memory_the_more_is_checkpointed_and_the_slower_it_goes() -> None:
    plans = [plan_for(3, gib=gib) for gib in (80, 3, 2)]
    assert tuple(plan.engine.activation_checkpointing for plan in plans) == ("none", "selective", "full")
    assert plans[0].time.total < plans[1].time.total < plans[2].time.total


def test_a_row_says_so_if_nothing_fits() -> None:
    config, _ = small(gib=1)
    rows = list(table(config))[2:]
    assert len(rows) == 2 and all(NONE_FITS in row and row.count("|") == 4 + len(PLANNED) for row in rows)


@pytest.mark.parametrize("setting", [{"gpus": ()}, {"gpus": (0,)}, {"global_batch": 511}, {"stages": ()}])
def test_what_cannot_be_planned_is_refused(setting: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        PlanScalingConfig(**setting)  # type: ignore[arg-type]


def rates(shown: list[list[str]]) -> dict[tuple[str, str], dict[str, float]]:
    """Images a second of both stages, by size and GPUs."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for size, gpus, stage, *planned in shown:
        found.setdefault((size, gpus), {})[stage] = float(planned[PLANNED.index("images/s")].replace(",", ""))
    return found


def test_zero_1_is_ahead_where_messages_outlast_computation(shown: list[list[str]]) -> None:
    ahead = {place for place, rate in rates(shown).items() if rate["1"] > rate["3"]}
    assert ahead == {("d16", "64"), ("d16", "512"), ("d20", "512")}


def pairs(shown: list[list[str]]) -> Iterator[tuple[TrainConfig, int, int, int]]:
    for size, gpus, stage, _, images, *_ in shown:
        if stage == "3":
            micro, accumulation = images.split(" x ")
            yield load_config(TrainConfig, f"configs/{size}.yaml"), int(gpus), int(micro), int(accumulation)


def test_without_tensors_that_stay_whole_zero_3_is_ahead_everywhere(shown: list[list[str]]) -> None:
    for train, gpus, micro, accumulation in pairs(shown):
        rate = {}
        for stage in (1, 3):
            engine = replace(train.engine, zero_stage=stage, micro_batch=micro, persistence_threshold=0)
            engine = replace(engine, activation_checkpointing="none")
            rate[stage] = step_time(train.model, engine, ClusterConfig(), gpus, accumulation=accumulation).total
        assert rate[3] < rate[1]
