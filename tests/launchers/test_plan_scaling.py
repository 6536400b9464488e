"""Plans of training on many GPUs fit the GPUs, are the fastest of those that do."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from repository import ROOT

from launchers.plan_scaling import NONE_FITS, PLACE, PLANNED, Plan, PlanScalingConfig, best_plan, table
from launchers.setup.config_files import load_config
from launchers.setup.settings import TrainConfig
from training.planning.step_time import ClusterConfig

D16 = str(ROOT / "configs" / "d16.yaml")


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def config_of(gib: float) -> PlanScalingConfig:
    return PlanScalingConfig(sizes=(D16,), global_batch=64, gpus=(8,), cluster=ClusterConfig(gpu_memory_gib=gib))


def plan_for(stage: int, *, gib: float) -> Plan:
    train = load_config(TrainConfig, D16)
    plan = best_plan(config_of(gib), replace(train, engine=replace(train.engine, zero_stage=stage)), 8)
    assert plan is not None
    return plan


def test_zero_1_is_ahead_where_messages_outlast_computation() -> None:
    rates: dict[tuple[str, str], dict[str, float]] = {}
    for line in table(PlanScalingConfig()).splitlines()[1:]:
        row = dict(zip(PLACE + PLANNED, re.split(" {2,}", line), strict=True))
        rates.setdefault((row["size"], row["GPUs"]), {})[row["stage"]] = float(row["images/s"].replace(",", ""))
    assert len(rates) == 15
    ahead = {place for place, rate in rates.items() if rate["1"] > rate["3"]}
    assert ahead == {("d16", "64"), ("d16", "512"), ("d20", "512")}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("gib", [5, 80])
def test_a_plan_fits_and_takes_every_image_once(stage: int, gib: float) -> None:
    plan = plan_for(stage, gib=gib)
    assert plan.peak_bytes <= config_of(gib).cluster.usable_bytes
    assert plan.engine.micro_batch <= plan.fit and plan.engine.zero_stage == stage
    assert 8 * plan.engine.micro_batch * plan.accumulation == 64


def test_the_less_memory_the_more_is_checkpointed_and_the_slower_the_step() -> None:
    plans = [plan_for(3, gib=gib) for gib in (80, 3, 2)]
    assert [plan.engine.activation_checkpointing for plan in plans] == ["none", "selective", "full"]
    assert plans[0].time.total < plans[1].time.total < plans[2].time.total


def test_a_row_says_so_if_nothing_fits() -> None:
    rows = table(config_of(gib=1)).splitlines()[1:]
    assert len(rows) == 2 and all(NONE_FITS in row for row in rows)


@pytest.mark.parametrize("setting", [{"gpus": ()}, {"gpus": (0,)}, {"global_batch": 511}, {"stages": ()}])
def test_what_cannot_be_planned_is_refused(setting: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        PlanScalingConfig(**setting)  # type: ignore[arg-type]
