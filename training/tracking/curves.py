"""The points that trackers get: which numbers of a record are drawn, and where.

The charts of a tracker have the step as their axis. Validation metrics are drawn a second time, as `curve/*`, with
compute in the place of the step, so that loss can be seen against compute with both axes logarithmic.
"""

from __future__ import annotations

from training.tracking.record import CURVE_UNITS, Record, TrackingConfig

Point = tuple[str, float, int, int]  # name, value, time in ms, step

SECTIONS = {
    "loss": ("loss",),
    "progress": ("step", "epoch", "samples_seen", "pflop", "learning_rate", "gradient_norm"),
    "quality": ("error", "psnr", "squared_error", "codebook_use"),
    "speed": ("images_per_second", "tokens_per_second", "data_wait_share", "goodput"),
}
NOT_DRAWN = {"validation": ("epoch", "samples_seen", "pflop")}  # the training records have them
COMPUTE = "pflop"
CURVES = ("loss_last", "loss_avg", "error_last", "error_avg", COMPUTE)  # the last one is not rounded


def points_of(record: Record, config: TrackingConfig) -> list[Point]:
    """Return the points of a record; none for a training record whose step `config.every` does not divide.

    The step comes last: it says that the whole record has arrived, also where that takes more than one call.
    """
    if record["kind"] == "train" and record["step"] % config.every:
        return []
    time, step = int(record.get("time", 0) * 1000), record["step"]
    mark = f"progress/{record['kind']}_step"
    flat = flatten_metrics(record)
    points = [(name, value, time, step) for name, value in flat.items() if name != mark]
    points += [(name, value, time, compute) for name, value, compute in _curve_points(record, config.curve_unit)]
    return [*points, (mark, flat[mark], time, step)]


def flatten_metrics(record: Record) -> dict[str, float]:
    """Name the numbers of a record as MLflow metrics, "section/kind_name"; MLflow draws the charts by section.

    A list becomes one series for each scale, such as "scales/train_loss_03". The step itself becomes
    "progress/train_step", by whose newest value a tracker says how far it has come.
    """
    kind = record["kind"]
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, list):
            scales = {k: item for k, item in enumerate(value, start=1) if item is not None}
            flat |= {f"scales/{kind}_{name}_{k:02d}": float(item) for k, item in scales.items()}
        elif isinstance(value, (int, float)) and name != "time" and name not in NOT_DRAWN.get(kind, ()):
            flat[f"{_section(name)}/{kind}_{name}"] = float(value)
    return flat


def compute_step(pflop: float, unit: str) -> int:
    """Round compute to whole units, since steps are integers; below half a unit that is 0, which has no logarithm."""
    return round(pflop * CURVE_UNITS[unit])


def _curve_points(record: Record, unit: str) -> list[tuple[str, float, int]]:
    """Return name, value and compute of the `curve/*` of a validation record; none below one unit of compute."""
    pflop = record.get(COMPUTE)
    if record["kind"] != "validation" or not isinstance(pflop, (int, float)):
        return []
    compute = compute_step(pflop, unit)
    drawn = {name: record[name] for name in CURVES if isinstance(record.get(name), (int, float))}
    if compute == 0 or drawn.keys() == {COMPUTE}:  # the record of a tokenizer has none of the four
        return []
    return [(f"curve/{name}", float(value), compute) for name, value in drawn.items()]


def _section(name: str) -> str:
    return next((section for section, prefixes in SECTIONS.items() if name.startswith(prefixes)), "loss_parts")
