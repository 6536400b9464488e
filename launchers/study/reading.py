"""From the run folders of a study to what its fits take: config.yaml and metrics.jsonl, never a tracker.

The points of a law are validation records. The means of the newest training records go beside them, to show the gap
between the two. A study can be read at any time: runs that are not there yet are named, unfinished ones are marked.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.files.strict_json import read_json
from launchers.setup.config_files import load_config
from launchers.setup.settings import TrainConfig
from launchers.study.config import StudyConfig
from training.flops import eq8_parameters, flops_per_image
from training.laws.study_data import LOSSES, METRICS, TrainedSize
from training.tracking.record import Record, RunRecord

import numpy as np

TRAINING_STEPS = 500  # the newest at most, whose means stand for the end of training
TRAINING_SHARE = 0.05  # of the run, likewise
# the keys of source.json
ENTROPIES = {"loss_last": "entropy_last", "loss_avg": "entropy_avg"}
OWN_LOSSES = {"loss_last": "validation_loss_last", "loss_avg": "validation_loss_avg"}


@dataclass(frozen=True)
class MeasuredRun:
    """The measurements that were read of a run folder."""

    size: TrainedSize
    config: TrainConfig
    num_samples: int  # in an epoch
    training: Mapping[str, float]  # means of METRICS over the newest steps, with labels dropped and blocks skipped

    @property
    def epochs(self) -> float:
        """The passes over the training data before the last evaluation."""
        return float(self.size.images[-1]) / self.num_samples


@dataclass(frozen=True)
class Source:
    """The entropy of a synthetic source, in nats by the names of LOSSES; empty if it is not known."""

    entropy: Mapping[str, float] = field(default_factory=dict)  # what no model beats on average
    own_loss: Mapping[str, float] = field(default_factory=dict)  # the source's own loss on the validation set


@dataclass(frozen=True)
class Study:
    """The measurements of a whole study."""

    runs: tuple[MeasuredRun, ...]  # by size, then seed
    absent: tuple[str, ...] = ()  # runs that are planned and have no evaluation yet
    source: Source = Source()

    @property
    def sizes(self) -> list[TrainedSize]:
        """The runs as fits take them."""
        return [run.size for run in self.runs]


def read_study(config: StudyConfig) -> Study:
    """Read the runs of a study's folder.

    Raises:
        FileNotFoundError: there is no such folder, or no run in it has been evaluated.
        ValueError: a run's config.yaml or the source's file is not what it should be, or its runs cannot be compared.
    """
    folder = Path(config.folder)
    runs, absent = [], []
    for name in planned_runs(config):
        run = read_run(folder / name)
        if run is None:
            absent.append(name)
        else:
            runs.append(run)
    if not runs:
        raise FileNotFoundError(f"{folder}: no run there has been evaluated yet; train with scaling_study.py run")
    _refuse_incomparable(runs)
    runs.sort(key=lambda run: (run.size.num_parameters, run.size.seed))
    return Study(tuple(runs), tuple(absent), read_source(config.known_entropy))


def planned_runs(config: StudyConfig) -> list[str]:
    """Return the names of the run folders that a study is to have."""
    return [f"{size}-seed{seed}" for size, seed in config.run_names()]


def read_run(folder: Path) -> MeasuredRun | None:
    """Read a run folder; None before its first evaluation."""
    if not (folder / "config.yaml").is_file() or not RunRecord.exists(folder):
        return None
    config = load_config(TrainConfig, str(folder / "config.yaml"))
    points, newest = _read_record(folder)
    if not points:
        return None
    num_samples = round(points[-1]["samples_seen"] / points[-1]["epoch"])
    last, total = points[-1]["step"], config.loop.total_steps(num_samples)
    newest = [record for record in newest if record["step"] > (1 - TRAINING_SHARE) * last]
    size = TrainedSize(
        name=folder.name,
        depth=config.model.depth,
        seed=config.seed,
        num_parameters=config.model.num_parameters,
        eq8_parameters=eq8_parameters(config.model),
        tokens_per_image=config.model.scales.num_tokens,
        flops_per_image=flops_per_image(config.model),
        # not samples_seen: that is a position in the data, which a roll back moves without training
        images=np.array([point["step"] for point in points]) * config.loop.global_batch,
        metrics={metric: np.array([_number(point, metric) for point in points]) for metric in METRICS},
        is_finished=last >= total,
        planned_images=total * config.loop.global_batch,
        untrained_loss=math.log(config.model.vocab_size),
    )
    training = {metric: float(np.mean([_number(record, metric) for record in newest])) for metric in METRICS if newest}
    return MeasuredRun(size, config, num_samples, training)


def _read_record(folder: Path) -> tuple[list[Record], list[Record]]:
    """Read the validation records, one a step and in order, and the newest training records.

    Raises:
        ValueError: a step is recorded twice.
    """
    points: dict[int, Record] = {}
    newest: deque[Record] = deque(maxlen=TRAINING_STEPS)
    last: dict[str, int] = {}
    for record, _ in RunRecord(folder).read_after():
        if record["step"] <= last.get(record["kind"], -1):
            raise ValueError(
                f"{folder}/metrics.jsonl: has the {record['kind']} record of step {record['step']} after that of step "
                f"{last[record['kind']]}; two commands wrote this run at once, so train it again in a new folder"
            )
        last[record["kind"]] = record["step"]
        if record["kind"] == "train":
            newest.append(record)
        elif record["kind"] == "validation" and record["step"] > 0:
            points[record["step"]] = record
    return [points[step] for step in sorted(points)], list(newest)


def _number(record: Record, metric: str) -> float:
    """Return a metric of a record; NaN for null, as which a record holds what was not finite."""
    value = record.get(metric)
    return float(value) if isinstance(value, (int, float)) else math.nan


def _refuse_incomparable(runs: list[MeasuredRun]) -> None:
    """Raise ValueError if the losses of the runs do not measure the same thing."""
    first = runs[0].config.model
    for run in runs[1:]:
        for name in ("patch_nums", "vocab_size", "num_classes"):
            got, want = getattr(run.config.model, name), getattr(first, name)
            if got != want:
                raise ValueError(
                    f"{run.size.name}: model.{name} is {got}, that of {runs[0].size.name} is {want}, so that their "
                    "losses cannot be compared; take one of them out of the study's sizes"
                )


def read_source(file: str) -> Source:
    """Read the entropies of a synthetic source, and its own losses if they are given; nothing if no file is named.

    Raises:
        FileNotFoundError: the file is not there. ValueError: it does not hold the entropies.
    """
    if not file:
        return Source()
    try:
        content = read_json(Path(file))
        entropy = {metric: float(content[ENTROPIES[metric]]) for metric in LOSSES}
        own_loss = {metric: float(content[key]) for metric, key in OWN_LOSSES.items() if key in content}
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file; known_entropy names a source.json of synthetic data") from None
    except (KeyError, TypeError, ValueError):
        wanted = " and ".join(ENTROPIES.values())
        raise ValueError(f"{file}: does not give {wanted} in nats; name the source.json of the data's source") from None
    return Source(entropy, own_loss)
