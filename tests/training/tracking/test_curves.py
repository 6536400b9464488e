"""Which numbers of a record are drawn, where, and that compute takes the place of the step in `curve/*`."""

from __future__ import annotations

import pytest
from trackers import train_record

from training.tracking.curves import CURVES, Point, compute_step, flatten_metrics, points_of
from training.tracking.record import CURVE_UNITS, Record, TrackingConfig

FOUR = {"loss_last": 5.5, "loss_avg": 6.5, "error_last": 0.95, "error_avg": 0.9}


def validation(step: int, pflop: float, **values: float) -> Record:
    return {"kind": "validation", "step": step, "time": 9.0, "pflop": pflop} | values


def curve(record: Record, unit: str = "TFLOP") -> list[Point]:
    return [point for point in points_of(record, TrackingConfig(curve_unit=unit)) if point[0].startswith("curve/")]


@pytest.mark.parametrize(
    ("record", "drawn"),
    [
        ({"kind": "train", "gradient_norm": None, "error": [0.5, None]}, {"scales/train_error_01": 0.5}),
        ({"kind": "train", "samples_seen": 24, "loss_avg": 2.0, "loss": [1.0, 2.0]}, {
            "progress/train_samples_seen": 24.0, "loss/train_loss_avg": 2.0,
            "scales/train_loss_01": 1.0, "scales/train_loss_02": 2.0,
        }),
        ({"kind": "validation", "epoch": 0.5, "loss_avg": 2.0}, {"loss/validation_loss_avg": 2.0}),
        ({"kind": "goodput", "goodput": 0.9}, {"speed/goodput_goodput": 0.9}),  # a kind that came later
    ],
)  # fmt: skip
def test_metrics_and_the_step_stand_in_sections_and_the_time_in_none(record: Record, drawn: dict[str, float]) -> None:
    found = flatten_metrics(record | {"step": 3, "time": 9.0})
    assert found == drawn | {f"progress/{record['kind']}_step": 3.0}


def test_validation_is_drawn_against_compute_and_compute_beside_it() -> None:
    points = curve(validation(40, 1.2344, **FOUR))
    assert points == [(f"curve/{name}", value, 9000, 1234) for name, value in (FOUR | {"pflop": 1.2344}).items()]
    assert [name for name, *_ in points] == [f"curve/{name}" for name in CURVES]


@pytest.mark.parametrize("unit", CURVE_UNITS)
def test_the_step_of_a_curve_is_its_compute_in_units(unit: str) -> None:
    for pflop in (7.0, 123.4567, 2.6e6):
        [*_, (_, drawn, _, step)] = curve(validation(1, pflop, **FOUR), unit)
        assert drawn == pflop and isinstance(step, int)
        assert abs(step / CURVE_UNITS[unit] - pflop) <= 0.5 / CURVE_UNITS[unit] * (1 + 1e-9)
        assert step < 2**53  # what a browser counts exactly


def test_compute_that_rounding_errors_put_below_a_whole_unit_is_that_unit() -> None:
    assert [compute_step(step * 64 * 1e-3 / 64, "TFLOP") for step in range(1, 1000)] == list(range(1, 1000))


def test_only_validation_with_losses_and_enough_compute_has_a_curve() -> None:
    assert curve({"kind": "train", "step": 5, "time": 9.0, "pflop": 3.0} | FOUR) == []
    assert curve({"kind": "validation", "step": 5, "time": 9.0} | FOUR) == []
    assert curve(validation(5, 3.0, psnr=22.0)) == []
    assert curve(validation(1, 4e-4, **FOUR)) == []  # 0 TFLOP has no logarithm
    assert len(curve(validation(1, 4e-4, **FOUR), "GFLOP")) == len(CURVES)


def test_the_step_comes_last() -> None:
    for record in (train_record(3, epoch=0.5), validation(3, 1.0, **FOUR)):
        last = (f"progress/{record['kind']}_step", 3.0, int(record["time"] * 1000), 3)
        assert points_of(record, TrackingConfig())[-1] == last
