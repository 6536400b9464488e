"""A scaling study as MLflow shows it, made from its folders: one MLflow run, a child for each size and seed, the fits.

Each run sends its own curves while it trains and puts itself below the study's MLflow run (training/tracking). What is
known only later comes from here: parameters, last losses, fits. Only the verb `sync` fails where a tracker does; for
the others its absence costs one line.
"""

from __future__ import annotations

import colorsys
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
from training.tracking.follow import send
from training.tracking.mlflow import (
    COMMIT_TAG,
    ENDED,
    RunPage,
    StudyPage,
    TrackerUnavailable,
    code_version,
    how_it_ended,
    read_state,
    reason,
    unavailable,
)
from training.tracking.record import RunRecord, TrackingConfig, absolute_uri
from training.tracking.saved_view import COLOUR_TAG, SIZE, address_of

REPORT = "report.md"
IDENTITY = {"tokenizer_sha256": "tokenizer_sha256", "data": "data_fingerprint"}  # of a checkpoint, as tags

Runs = Mapping[Path, MeasuredRun | None]  # run folders that have a record; None for those without an evaluation


def open_parent(config: StudyConfig) -> None:
    """Show that a study has started, and report where to look."""

    def show_start(page: StudyPage) -> None:
        page.note(git=code_version())
        say(show(page, config, {}, "RUNNING"))

    best_effort(config, show_start)


def close_parent(config: StudyConfig, status: str) -> None:
    """Show how the study has ended: FINISHED, FAILED, or KILLED where it was stopped."""
    best_effort(config, lambda page: show(page, config, read_runs(config), status))


def publish(config: StudyConfig) -> None:
    """Put what `fit` and `report` have made on the study's page, and report where to look."""

    def show_results(page: StudyPage) -> None:
        runs = read_runs(config)
        say(show(page, config, runs, "FINISHED" if is_finished(config, runs) else ""))

    best_effort(config, show_results)


def best_effort(config: StudyConfig, show_part: Callable[[StudyPage], object]) -> None:
    """Show something on the study's page; a tracker that is away costs one line, since the folders are the record."""
    if config.tracking.mlflow:
        try:
            with opened(config) as page:
                show_part(page)
        except Exception as error:  # whatever a tracker throws
            say(f"mlflow: {reason(error)}; `scaling_study.py sync {config.folder}` brings it up to the study")


def launch_sync(command: Command[StudyConfig]) -> None:
    """Bring MLflow up to the study's folders, all of it from them alone; doing it twice changes nothing.

    Raises:
        FileNotFoundError: no run is there.
        ValueError: tracking.mlflow is false, or a record or fit.json is damaged.
        BlockingIOError: another process is sending the study.
        TrackerUnavailable: the tracker cannot be reached, or does not take it.
    """
    refuse_several_ranks("scaling_study.py")
    config, tracking, folder = command.config, tracking_of(command.config), Path(command.config.folder)
    if not tracking.mlflow:
        raise ValueError("tracking.mlflow is false, so there is nothing to send to; add tracking.mlflow=true")
    runs = read_runs(config)
    if not runs:
        raise FileNotFoundError(f"{folder}: has no run folder with a record; train with scaling_study.py run")
    points = {run: sum(len(points_of(record, tracking)) for record in RunRecord(run).read()) for run in runs}
    if command.dry_run:
        total = sum(points.values())
        say(f"{folder}: would send what is missing of {total} points in {len(runs)} runs to {tracking.uri}")
        return
    if (folder / FIT).is_file():
        read_fit(folder)  # damage is the study's fault, not the tracker's
    with opened(config) as page:
        sent = {run: number for run in runs if (number := send_run(run, tracking)) is not None}
        noted = read_state(folder).get("status", "")
        ended = noted if noted in ENDED else "FINISHED" if is_finished(config, runs) else "KILLED"
        address = show(page, config, runs, ended if len(sent) == len(runs) else "RUNNING")
    known = sum(points[run] - number for run, number in sent.items())
    say(f"{folder}: {len(runs)} runs, {sum(sent.values())} points sent, {known} were there already\n{address}")


def send_run(run: Path, tracking: TrackingConfig) -> int | None:
    """Send what is missing of a run and return the number of points; None where the run does so itself."""
    settings = read_settings(run / "config.yaml")
    try:
        return send(RunPage(run, tracking, settings), how_it_ended(run, settings))
    except BlockingIOError:
        say(f"{run}: is sent by the run itself")
        return None


@contextmanager
def opened(config: StudyConfig) -> Iterator[StudyPage]:
    """Hold the study's page open for one process.

    Raises:
        BlockingIOError: another process has it open.
        TrackerUnavailable: the tracker cannot be reached, or does not take something that is sent while it is open.
    """
    page = StudyPage(Path(config.folder), tracking_of(config))
    try:
        page.open(search=bool(recorded_runs(config)))
        yield page
    except (BlockingIOError, TrackerUnavailable):
        raise
    except Exception as error:  # whatever a tracker throws
        raise unavailable(page, error) from None
    finally:
        page.release()


def tracking_of(config: StudyConfig) -> TrackingConfig:
    """Return where the study and all its runs are shown, and the study's name there."""
    name = config.tracking.study or study_name(config)
    return replace(config.tracking, uri=absolute_uri(config.tracking.uri), study=name)


def recorded_runs(config: StudyConfig) -> list[Path]:
    """List the run folders that have a record."""
    runs = sorted(path.parent for path in Path(config.folder).glob("*/metrics.jsonl"))
    return [run for run in runs if next(RunRecord(run).read_after(), None) is not None]


def read_runs(config: StudyConfig) -> Runs:
    """Read the run folders that have a record."""
    return {folder: read_run(folder) for folder in recorded_runs(config)}


def is_finished(config: StudyConfig, runs: Runs) -> bool:
    """Tell whether all planned runs have come to their ends."""
    planned = (runs.get(Path(config.folder) / name) for name in planned_runs(config))
    return all(run is not None and run.size.is_finished for run in planned)


def show(page: StudyPage, config: StudyConfig, runs: Runs, status: str) -> str:
    """Bring a study's page up to its folder, and return where to look.

    status: RUNNING, FINISHED, FAILED or KILLED, also noted in the folder; empty: as it was.
    """
    tags = {"sizes": " ".join(config.names()), "seeds": " ".join(map(str, config.seeds))}
    if commit := read_state(page.folder).get("git"):
        tags[COMMIT_TAG] = commit
    page.describe(tags, {}, time_ms=0)
    describe_runs(page, runs)
    attach_results(page)
    if status:
        page.note(status=status)
        page.set_status(status)
    address, uri = address_of(page), page.config.uri
    if uri.startswith("http"):
        return f"curves     {uri.rstrip('/')}/{address}"
    return f"curves     mlflow ui --backend-store-uri {uri} --port 5000, then http://127.0.0.1:5000/{address}"


def describe_runs(page: StudyPage, runs: Runs) -> None:
    """Put the runs that the tracker has below the study, with their sizes, data, colours and last losses."""
    sizes = sorted({run.size.num_parameters for run in runs.values() if run})
    for folder, run in runs.items():
        state = read_state(folder)
        if state.get("uri") != page.config.uri or "run_id" not in state:
            continue
        tags: dict[str, str] = {}
        numbers: dict[str, float] = {}
        if run:
            size = run.size
            tags = {"depth": str(size.depth), "seed": str(size.seed), "params_total": str(size.num_parameters)}
            tags |= {"params_eq8": str(size.eq8_parameters)} | identity_of(folder)
            tags[COLOUR_TAG] = colour(sizes.index(size.num_parameters), len(sizes))
            numbers = {SIZE: size.num_parameters / 1e9, "final/n_eq8_billion": size.eq8_parameters / 1e9}
            if size.is_finished:
                numbers |= {f"final/{metric}": size.final(metric) for metric in METRICS}
                numbers["final/pflop"] = float(size.compute(EXACT)[-1])
        page.describe_child(state["run_id"], tags, numbers, modified(folder / "metrics.jsonl"))


def identity_of(run: Path) -> dict[str, str]:
    """Return, as tags, the tokenizer and the data that the newest checkpoint of a run names; empty without one."""
    newest = next(iter(candidates(run / "checkpoints")), None)
    try:
        identity = read_manifest(newest)["identity"] if newest else {}
    except (OSError, ValueError, KeyError):
        return {}
    return {tag: str(identity[name]) for name, tag in IDENTITY.items() if name in identity}


def colour(place: int, number: int) -> str:
    """Return a colour of the rainbow as #rrggbb, violet for the first of so many places, red for the last."""
    hue = 0.75 * (1 - place / max(number - 1, 1))
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hsv_to_rgb(hue, 0.8, 0.8))


def attach_results(page: StudyPage) -> None:
    """Put the fitted laws and the files of the report on the study's page."""
    files = [page.folder / name for name in (REPORT, FIT, POINTS)] + sorted(page.folder.glob("*.png"))
    page.attach([file for file in files if file.is_file()])
    if not (page.folder / FIT).is_file():
        return
    numbers: dict[str, float] = {}
    for law in read_fit(page.folder).laws:
        values = {"exponent": law.law.exponent, "scale": law.law.scale, "irreducible": law.law.irreducible}
        values |= {"exponent_low": law.exponent_interval.low, "exponent_high": law.exponent_interval.high}
        values |= {"pearson": law.pearson, "r_squared": law.r_squared}
        numbers |= {f"fit/{law.metric}_by_{law.variable}_{name}": value for name, value in values.items()}
    page.describe({}, numbers, time_ms=modified(page.folder / FIT))


def modified(file: Path) -> int:
    """Return when a file was last changed, in ms: the same however often its numbers are sent."""
    return int(file.stat().st_mtime * 1000)
