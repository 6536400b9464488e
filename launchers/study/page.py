"""A scaling study as MLflow shows it: made from its folders, best effort but for the verb `sync`, and never in the way.

Each run sends its own curves (training/tracking/mlflow_uploader.py) and puts itself below the study's MLflow run. What is known
of it only later, its parameters, its last losses, the fits, comes from here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from launchers.setup.command_line import Command, refuse_several_ranks, say
from launchers.setup.config_files import read_settings
from launchers.study.config import StudyConfig, study_name
from launchers.study.fitting import FIT, POINTS, read_fit
from launchers.study.reading import MeasuredRun, planned_runs, read_run
from training.accounting import EXACT
from training.checkpoints.commit import candidates, read_manifest
from training.laws.study_data import METRICS
from training.tracking.curves import points_of
from training.tracking.mlflow_client import COMMIT_TAG, code_version, reason
from training.tracking.mlflow_state import read_state
from training.tracking.mlflow_study import COLOUR_TAG, SIZE, Facts, StudyView, colours
from training.tracking.mlflow_tracker import Sent, Tracker, TrackerUnavailable
from training.tracking.mlflow_uploader import ENDED, QUIET_AND_QUICK, how_it_ended, send_now
from training.tracking.record import RunRecord, TrackingConfig, absolute_uri

REPORT = "report.md"
IDENTITY = {"tokenizer_sha256": "tokenizer_sha256", "data": "data_fingerprint"}  # of a checkpoint, as tags


def open_parent(config: StudyConfig) -> bool:
    """Show that a study has started: its MLflow run, its saved view, and where to look; whether that could be done."""

    def show(view: StudyView) -> None:
        view.state.update(status="RUNNING", git=code_version())
        view.set_status("RUNNING")
        view.describe(facts_of_study(config))
        say(where_to_look(view))

    return _best_effort(config, show)


def close_parent(config: StudyConfig, status: str) -> bool:
    """Show how the study has ended: FINISHED, FAILED, or KILLED where it was stopped; whether that could be done."""

    def show(view: StudyView) -> None:
        view.state.update(status=status)
        show_children(view, read_runs(config))
        view.set_status(status)

    return _best_effort(config, show)


def publish(config: StudyConfig) -> bool:
    """Put what `fit` and `report` have made on the study's page; whether that could be done."""

    def show(view: StudyView) -> None:
        runs = read_runs(config)
        show_children(view, runs)
        show_results(view, config)
        if is_finished(config, runs):
            view.state.update(status="FINISHED")
            view.set_status("FINISHED")
        say(where_to_look(view))

    return _best_effort(config, show)


def launch_sync(command: Command[StudyConfig]) -> None:
    """Bring MLflow up to the study's folders, all of it from them alone; doing it twice changes nothing.

    Raises:
        FileNotFoundError: no run is there. ValueError: tracking.mlflow is false, or a record or fit.json is damaged.
        BlockingIOError: somebody is at it.
        TrackerUnavailable: the tracker cannot be reached, or does not take it.
    """
    refuse_several_ranks("scaling_study.py")
    config, tracking = command.config, tracking_of(command.config)
    if not tracking.mlflow:
        raise ValueError("tracking.mlflow is false, so there is nothing to send to; add tracking.mlflow=true")
    runs = recorded_runs(config)
    if not runs:
        raise FileNotFoundError(f"{config.folder}: has no run folder with a record; train with scaling_study.py run")
    if command.dry_run:
        number = sum(len(points_of(record, tracking)) for run in runs for record in RunRecord(run).read())
        say(f"{config.folder}: would send what is missing of {number} points in {len(runs)} runs to {tracking.uri}")
        return
    if (Path(config.folder) / FIT).is_file():
        read_fit(Path(config.folder))  # what is damaged is the study's fault, not the tracker's
    with opened(config) as view:
        sent = [send_run(run, tracking) for run in runs]
        read = read_runs(config)
        try:
            view.describe(facts_of_study(config))
            show_children(view, read)
            show_results(view, config)
            noted = view.state.values.get("status")
            view.set_status("RUNNING" if None in sent else how_the_study_ended(noted, is_finished(config, read)))
            page = where_to_look(view)
        except Exception as error:  # whatever a tracker throws
            raise unavailable(tracking, error) from None
    total = sum(filter(None, sent), Sent())
    say(f"{config.folder}: {len(runs)} runs, {total.new} points sent, {total.known} were there already")
    say(page)


def send_run(run: Path, tracking: TrackingConfig) -> Sent | None:
    """Send what is missing of a run; None where the run does so itself."""
    settings = read_settings(run / "config.yaml")
    tracker = Tracker(run, tracking, settings)
    try:
        return send_now(tracker, how_it_ended(read_state(run) or {}, RunRecord(run).read(), settings))
    except BlockingIOError:
        say(f"{run}: is sent by the run itself")
        return None
    finally:
        tracker.state.release()


def how_the_study_ended(noted: str | None, is_finished: bool) -> str:
    """As it was noted; where it could not be, by its runs."""
    if noted in ENDED:
        return noted
    return "FINISHED" if is_finished else "KILLED"


def is_finished(config: StudyConfig, runs: Mapping[Path, MeasuredRun | None]) -> bool:
    """Whether all runs have come to their ends."""
    planned = (runs.get(Path(config.folder) / name) for name in planned_runs(config))
    return all(run is not None and run.size.is_finished for run in planned)


def tracking_of(config: StudyConfig) -> TrackingConfig:
    """Where the study and all its runs are shown, under which name."""
    name = config.tracking.study or study_name(config)
    return replace(config.tracking, uri=absolute_uri(config.tracking.uri), study=name)


def recorded_runs(config: StudyConfig) -> list[Path]:
    """The run folders that have a record."""
    runs = sorted(path.parent for path in Path(config.folder).glob("*/metrics.jsonl"))
    return [run for run in runs if next(RunRecord(run).read_after(), None) is not None]


def read_runs(config: StudyConfig) -> dict[Path, MeasuredRun | None]:
    """The run folders that have a record, read; None for those without an evaluation."""
    return {folder: read_run(folder) for folder in recorded_runs(config)}


@contextmanager
def opened(config: StudyConfig) -> Iterator[StudyView]:
    """The study's MLflow run, claimed for as long as it is open.

    Raises:
        BlockingIOError: another process has it open. TrackerUnavailable: the tracker cannot be reached.
    """
    os.environ.update(QUIET_AND_QUICK | os.environ)
    tracking = tracking_of(config)
    view = StudyView(Path(config.folder), tracking)
    try:
        try:
            view.open(has_begun=bool(recorded_runs(config)))
        except BlockingIOError:
            raise
        except Exception as error:  # whatever a tracker throws
            raise unavailable(tracking, error) from None
        yield view
    finally:
        view.release()


def unavailable(tracking: TrackingConfig, error: Exception) -> TrackerUnavailable:
    """The one error for what a tracker throws."""
    return TrackerUnavailable(f"{tracking.uri}: {reason(error)}; do this again when it is back")


def show_children(view: StudyView, runs: Mapping[Path, MeasuredRun | None]) -> None:
    """Put the runs that the tracker has below the study, with what is known of them."""
    sizes = sorted({run.size.num_parameters for run in runs.values() if run})
    colour_of = dict(zip(sizes, colours(len(sizes)), strict=True))
    for folder, run in runs.items():
        state = read_state(folder) or {}
        if state.get("uri") != view.config.uri or "run_id" not in state:
            continue
        facts = facts_of_run(folder, run) if run else Facts({}, {}, 0)
        colour = {COLOUR_TAG: colour_of[run.size.num_parameters]} if run else {}
        view.describe_child(state["run_id"], replace(facts, tags={**facts.tags, **colour}))


def show_results(view: StudyView, config: StudyConfig) -> None:
    """Put the fitted laws and the files of the report on the study's page."""
    folder = Path(config.folder)
    files = [folder / name for name in (REPORT, FIT, POINTS)] + sorted(folder.glob("*.png"))
    view.attach([file for file in files if file.is_file()])
    if not (folder / FIT).is_file():
        return
    scalars = {}
    for law in read_fit(folder).laws:
        values = {"exponent": law.law.exponent, "scale": law.law.scale, "irreducible": law.law.irreducible}
        values |= {"exponent_low": law.exponent_interval.low, "exponent_high": law.exponent_interval.high}
        values |= {"pearson": law.pearson, "r_squared": law.r_squared}
        scalars |= {f"fit/{law.metric}_by_{law.variable}_{name}": value for name, value in values.items()}
    view.describe(Facts({}, finite(scalars), modified(folder / FIT)))


def facts_of_study(config: StudyConfig) -> Facts:
    """The study's tags."""
    tags = {"sizes": " ".join(config.names()), "seeds": " ".join(map(str, config.seeds))}
    if commit := (read_state(Path(config.folder)) or {}).get("git"):
        tags[COMMIT_TAG] = commit
    return Facts(tags, {}, 0)


def facts_of_run(folder: Path, run: MeasuredRun) -> Facts:
    """A run's tags, and its last losses once it is done; compute is in exact PFLOP."""
    size = run.size
    tags = {"depth": size.depth, "seed": size.seed}
    tags |= {"params_total": size.num_parameters, "params_eq8": size.eq8_parameters} | identity_of(folder)
    scalars = {SIZE: size.num_parameters / 1e9, "final/n_eq8_billion": size.eq8_parameters / 1e9}
    if size.is_finished:
        scalars |= {f"final/{metric}": size.final(metric) for metric in METRICS}
        scalars["final/pflop"] = float(size.compute(EXACT)[-1])
    text = {name: str(value) for name, value in tags.items()}
    return Facts(text, finite(scalars), modified(folder / "metrics.jsonl"))


def identity_of(run: Path) -> dict[str, str]:
    """Which tokenizer and data a run was trained with, as its newest checkpoint says; empty without one."""
    newest = next(iter(candidates(run / "checkpoints")), None)
    try:
        identity = read_manifest(newest)["identity"] if newest else {}
    except (OSError, ValueError, KeyError):
        return {}
    return {tag: str(identity[name]) for name, tag in IDENTITY.items() if name in identity}


def finite(scalars: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in scalars.items() if math.isfinite(value)}


def modified(file: Path) -> int:
    """When a file was last changed, in ms: the same however often its numbers are sent."""
    return int(file.stat().st_mtime * 1000)


def where_to_look(view: StudyView) -> str:
    """The saved view of the study as an address, or the command that serves it."""
    address, uri = view.save_view(), view.config.uri
    if uri.startswith("http"):
        return f"curves     {uri.rstrip('/')}/{address}"
    return f"curves     mlflow ui --backend-store-uri {uri} --port 5000, then http://127.0.0.1:5000/{address}"


def _best_effort(config: StudyConfig, show: Callable[[StudyView], None]) -> bool:
    if not config.tracking.mlflow:
        return False
    try:
        with opened(config) as view:
            show(view)
    except Exception as error:  # whatever a tracker throws must not reach the study: its folders are the record
        say(f"mlflow: {reason(error)}; `scaling_study.py sync {config.folder}` brings it up to the study")
        return False
    return True
