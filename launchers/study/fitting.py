"""The verb `fit` of launchers/scaling_study.py: the laws of a study, from its run folders to FOLDER/fit.json.

FOLDER/points.csv holds every point that was measured, used or not. `report` and `plan` take fit.json as it is if it was
made of the same points with the same settings, and fit again otherwise. `fit` and `report` write it, `plan` does not.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import types
import typing
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from launchers.setup.command_line import Command, say
from data_pipeline.files.atomic import atomic_file, bytes_sha256
from data_pipeline.files.nested import flatten
from data_pipeline.files.strict_json import read_json
from launchers.study.config import StudyConfig
from launchers.study.reading import Study, read_study
from training.accounting import ACCOUNTINGS
from training.laws.scaling import analyse
from training.laws.study_data import METRICS
from training.laws.study_fit import LawFit, StudyFit

FIT, POINTS = "fit.json", "points.csv"
MAX_BYTES = 2**26  # of fit.json, which holds the bootstrap's draws
ARRAY_OF_NUMBERS = re.compile(r"\[\n[-+.\deEnul,\s]*\]")  # in indented JSON; no text in it has line ends


@dataclass(frozen=True)
class FittedStudy:
    """A study and its laws."""

    study: Study
    fit: StudyFit
    is_new: bool = False  # not in fit.json yet


def launch_fit(command: Command[StudyConfig]) -> None:
    """Fit a study, write fit.json and points.csv, and show the laws."""
    study = read_study(command.config)
    say(describe_study(study))
    if command.dry_run:
        return
    found = new_fit(command.config, study)
    write_fit(command.config, found)
    for line in summary(found.fit):
        say(line)
    say(f"wrote {Path(command.config.folder) / FIT} and {POINTS}")


def fitted_study(config: StudyConfig) -> FittedStudy:
    """Read a study with its fit.json, or with a new fit if that is missing, damaged, or of other points or settings."""
    study = read_study(config)
    file = Path(config.folder) / FIT
    if file.is_file():
        try:
            content, fit = _read(file)
            outdated = _what_differs(content, config, study)
            if not outdated:
                return FittedStudy(study, fit)
        except ValueError as error:
            outdated = str(error)
        say(f"{file}: {outdated}; fitted anew")
    return new_fit(config, study)


def new_fit(config: StudyConfig, study: Study) -> FittedStudy:
    """Fit a study. Raises ValueError if there are too few points."""
    return FittedStudy(study, analyse(study.sizes, config.fit, study.source.entropy), is_new=True)


def _what_differs(content: dict[str, Any], config: StudyConfig, study: Study) -> str:
    """Say what a fit.json was made of that is not so now; empty if all is the same."""
    if content.get("points_sha256") != bytes_sha256(points_csv(study)):
        return "is of other points"
    made_with = content.get("settings")
    before = flatten(made_with) if isinstance(made_with, dict) else {}
    now = flatten(_settings(config, study))
    changes = [name for name in (now | before) if before.get(name) != now.get(name)]
    if not changes:
        return ""
    values = ", ".join(f"{name}={before.get(name)}, not {now.get(name)}" for name in changes)
    return f"was made with {values} (give the same settings here to keep it)"


def write_fit(config: StudyConfig, found: FittedStudy) -> None:
    """Write the study's fit.json and points.csv."""
    points = points_csv(found.study)
    content = {"points_sha256": bytes_sha256(points), "settings": _settings(config, found.study)}
    content["fit"] = asdict(found.fit)
    with atomic_file(Path(config.folder) / POINTS) as file:
        file.write(points)
    with atomic_file(Path(config.folder) / FIT) as file:
        file.write(_to_json(content).encode())


def read_fit(folder: Path) -> StudyFit:
    """Read the fit.json of a study.

    Raises:
        FileNotFoundError: it is not there yet. ValueError: it is damaged or of another version.
    """
    file = folder / FIT
    try:
        return _read(file)[1]
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: is not there yet; make it with scaling_study.py fit {folder}") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}; make it anew: scaling_study.py fit {folder}") from None


def _read(file: Path) -> tuple[dict[str, Any], StudyFit]:
    """Read a fit.json and the fit in it. Raises ValueError if there is none, or one of another version."""
    try:
        content = read_json(file, max_bytes=MAX_BYTES)
        fit = content["fit"]
        if fit["schema"] != StudyFit.schema:
            raise ValueError(f"schema is {fit['schema']!r}, accepted: {StudyFit.schema}")
        return content, _from_plain(StudyFit, fit)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"is no fit of this version ({' '.join(str(error).split())[:120]})") from None


def points_csv(study: Study) -> bytes:
    """Write every evaluation of every run with all digits: compute in PFLOP by each accounting, losses in nats."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    pflop = [f"pflop_{accounting}" for accounting in ACCOUNTINGS]
    about = ("run", "depth", "seed", "is_finished", "parameters", "eq8_parameters")
    writer.writerow([*about, "images", "tokens", *pflop, *METRICS])
    for size in study.sizes:
        counts = (size.depth, size.seed, size.is_finished, size.num_parameters, size.eq8_parameters)
        compute = [size.compute(accounting).tolist() for accounting in ACCOUNTINGS]
        metrics = [size.metrics[metric].tolist() for metric in METRICS]
        for images, *values in zip(size.images.tolist(), *compute, *metrics, strict=True):
            writer.writerow([size.name, *counts, images, images * size.tokens_per_image, *map(repr, values)])
    return text.getvalue().encode()


def describe_study(study: Study) -> str:
    """Say in one line what is there."""
    num_points = sum(len(size.images) for size in study.sizes)
    unfinished = [size.name for size in study.sizes if not size.is_finished]
    parts = [f"{len(study.runs)} run{'s' * (len(study.runs) > 1)} with {num_points} evaluations"]
    parts += [f"unfinished: {', '.join(unfinished)}"] if unfinished else []
    parts += [f"not there yet: {', '.join(study.absent)}"] if study.absent else []
    return "; ".join(parts)


def summary(fit: StudyFit) -> list[str]:
    """Write the laws and the fit's notes as lines for a terminal."""
    return [*(f"{law.metric:>10} against {_law_line(law)}" for law in fit.laws), *(f"note: {n}" for n in fit.notes)]


def _law_line(fit: LawFit) -> str:
    law, interval = fit.law, fit.exponent_interval
    gate = ""
    if fit.held_out:
        share, of_gain = (max(getattr(p, name) for p in fit.held_out) for name in ("share", "share_of_gain"))
        verdict = "passed" if all(point.passed for point in fit.held_out) else "FAILED"
        gate = f", gate {verdict} ({share:.2%} of the reducible part, {of_gain:.0%} of the gain)"
    return (
        f"{fit.variable:>10}: E {law.irreducible:.5g} ({fit.source_of_irreducible}), exponent {law.exponent:.5g} "
        f"[{interval.low:.5g}, {interval.high:.5g}], beta {law.scale:.5g}, r {fit.pearson:.5f}{gate}"
    )


def _settings(config: StudyConfig, study: Study) -> dict[str, Any]:
    """Return what a fit depends on besides the points, as fit.json would give it back."""
    return json.loads(_to_json({"fit": asdict(config.fit), "known": dict(study.source.entropy)}))


def _to_json(content: dict[str, Any]) -> str:
    """Write JSON for people: indented, an array of numbers in one line, null for numbers that are not finite."""
    text = json.dumps(_finite(content), indent=1, allow_nan=False)
    return ARRAY_OF_NUMBERS.sub(lambda found: " ".join(found.group().split()), text) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _from_plain(kind: Any, value: Any) -> Any:
    """Make a value of a type from what JSON holds of it: dataclasses, tuples, unions with None, plain values.

    Raises TypeError or ValueError if it is something else.
    """
    if isinstance(kind, type) and is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if not isinstance(value, dict) or set(value) != {field.name for field in fields(kind)}:
            raise ValueError(f"{kind.__name__} has {', '.join(hints)}")
        return kind(**{name: _from_plain(hints[name], item) for name, item in value.items()})
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        items = items[:1] * len(value) if items[-1] is Ellipsis else items
        return tuple(_from_plain(item, each) for item, each in zip(items, value, strict=True))
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (item,) = (member for member in typing.get_args(kind) if member is not type(None))
        return None if value is None else _from_plain(item, value)
    if kind is float and (value is None or isinstance(value, (int, float))):
        return math.nan if value is None else float(value)
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value
