"""A run in its folder: what it goes on from, who watches it, and what it leaves behind."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.files.atomic import atomic_file
from data_pipeline.files.nested import flatten
from data_pipeline.loading.loader import names_of_step, train_batches
from launchers.setup.assembly import Dataset
from launchers.setup.command_line import say, say_nothing
from launchers.setup.config_files import to_yaml
from launchers.setup.settings import RunConfig
from training.checkpoints.checkpoint import Checkpoints, Retention, TrainState
from training.checkpoints.commit import (
    DAMAGED,
    DamagedCheckpoint,
    candidates,
    folder_name,
    read_manifest,
    structural_damage,
)
from training.engine.distributed import World, barrier
from training.engine.engine import accumulation_steps
from training.loop import Loop
from training.stage import Stage
from training.supervision.bad_samples import BadSamples, NoBadSamples
from training.supervision.history import START, STOP, History
from training.supervision.stopping import Stopped, Stopping
from training.supervision.watch import Heartbeat
from training.tracking.mlflow_view import MLflowView
from training.tracking.record import RunRecord


def open_checkpoints(config: RunConfig, world: World, **identity: str) -> Checkpoints:
    """The run folder's checkpoints. `identity`: what else, besides seed, batch and init_from, must not change in a run.

    Raises:
        ValueError: the batch cannot be split over this world, or the newest checkpoint is of something else.
        DamagedCheckpoint: the run once had a checkpoint, and now there is none.
    """
    accumulation_steps(config.loop.global_batch, config.engine.micro_batch, world.world_size)
    refuse_no_folder(Path(config.run))
    folder = Path(config.run) / "checkpoints"
    refuse_lost_checkpoints(Path(config.run))
    newest = next((path for path in candidates(folder) if not structural_damage(path)), None)
    recorded = read_manifest(newest)["identity"].get("init_from") if newest else None
    init_from = config.init_from or recorded  # a run need not name its first weights again: they may be gone
    if init_from:
        identity["init_from"] = init_from
    order_of_data = {"seed": config.seed, "loop.global_batch": config.loop.global_batch}
    order_of_data["data.window"] = config.data.window
    checkpoints = Checkpoints(
        folder,
        retention=Retention(last=config.loop.keep_checkpoints, every=config.loop.keep_every),
        world=world,
        model_config=config.model,
        identity=order_of_data | identity,
        config=asdict(config),
        report=say if world.is_rank_zero else say_nothing,
    )
    if newest:
        checkpoints.refuse_misfit(newest)
    return checkpoints


def refuse_no_folder(run: Path) -> None:
    """Raise ValueError or OSError if a run folder neither is there nor can be made, before anything is set up."""
    nearest = next(place for place in (run.absolute(), *run.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise ValueError(f"run is {run}, but {nearest} is a file; choose another run folder")
    try:
        os.rmdir(tempfile.mkdtemp(dir=nearest, prefix=".probe-"))
    except OSError as error:
        what = f"{error.strerror}: no run folder can be made here; choose another"
        raise OSError(error.errno, what, str(run)) from error


def refuse_lost_checkpoints(run: Path) -> None:
    """Raise DamagedCheckpoint if a run was saved before and has no checkpoint now: it must not start from zero."""
    if candidates(run / "checkpoints"):
        return
    history, step = History(run), History(run).saved_step()
    remains = [path.name for path in (run / "checkpoints").glob(f"{DAMAGED}*")]
    if step is not None:
        evidence = f"{history.path} says that step {step} was saved"
    elif remains:
        evidence = f"there was one: {remains[0]}"
    elif RunRecord.exists(run) and history.first_start() is None:
        evidence = f"{run}/metrics.jsonl is the record of a run"
    else:
        return
    raise DamagedCheckpoint(
        f"{run}/checkpoints: holds no checkpoint, but {evidence}; put one back, or choose another run folder to start "
        "anew"
    )


CLOSING_SECONDS = 180.0  # more than an MLflow page is waited for
UNFINISHED_SECONDS = 10.0  # of that, when something else is in a hurry


@dataclass(frozen=True)
class Supervision:
    """Who may ask a run to stop, and who notices that it hangs."""

    stopping: Stopping
    heartbeat: Heartbeat


@contextmanager
def supervise(config: RunConfig) -> Iterator[Supervision]:
    """From here on signals ask the run to stop, and a rank that hangs or loses its launcher ends."""
    world, folder = World.from_environment(), Path(config.run)
    stopping = Stopping(folder, world)
    stopping.install()
    heartbeat = Heartbeat.start(config.watch, world, folder)
    try:
        yield Supervision(stopping, heartbeat)
    finally:
        heartbeat.close()
        stopping.remove()


def run_stage(
    config: RunConfig,
    stage: Stage,
    dataset: Dataset,
    validation: Dataset,
    checkpoints: Checkpoints,
    world: World,
    supervision: Supervision | None = None,
) -> TrainState:
    """Train a stage in its run folder: from its newest whole checkpoint if there is one, else from the start.

    Raises:
        Stopped: a signal or the file `stop` in the run folder asked for it; a checkpoint is committed.
        TrainingDiverged, CheckpointsFailing, DamagedCheckpoint: see there.
    """
    folder = Path(config.run)
    speak = say if world.is_rank_zero else say_nothing
    view, status = None, "FAILED"
    try:
        state, changes = resume_or_start(config, stage, checkpoints, world, speak)
        record = RunRecord(folder)
        if world.is_rank_zero:
            forgotten = any(each["step"] > state.step for each, _ in record.read_after())
            record.forget_after(state.step)
            view = MLflowView(folder, config.tracking, flatten(asdict(config))) if config.tracking.mlflow else None
            if view is not None and forgotten and changes:  # MLflow may have other values of the steps to be taken
                view.start_over()
        loop = Loop(
            stage,
            config.loop,
            config.optimizer,
            world,
            len(dataset),
            record,
            view,
            checkpoints,
            speak,
            History(folder),
            divergence=config.divergence,
            stopping=supervision and supervision.stopping,
            heartbeat=supervision and supervision.heartbeat,
            name_samples=partial(samples_of_step, dataset, config, world),
            bad_samples=share_bad_samples(config, (dataset, validation), world),
        )
        state = loop.run(state, partial(batches_from, dataset, config, world))
        status = "FINISHED"
    except Stopped as stopped:
        status = "KILLED"
        if world.is_rank_zero:  # who asked is of interest to job scripts
            History(folder).note(STOP, checkpoint=stopped.checkpoint.name, reason=stopped.reason)
        raise
    finally:
        if supervision is not None:
            supervision.heartbeat.beat("closing the run", allow_seconds=CLOSING_SECONDS)
        if view is not None:
            view.close(status=status, patience_seconds=None if status == "FINISHED" else UNFINISHED_SECONDS)
        if status == "KILLED":
            barrier(world)  # a launcher kills the others once the first rank has ended with another code than 0
    speak(f"done: step {state.step}, {state.samples_seen} samples seen; record in {record.path}")
    return state


def resume_or_start(
    config: RunConfig, stage: Stage, checkpoints: Checkpoints, world: World, speak: Callable[[str], None]
) -> tuple[TrainState, list[str]]:
    """The state to go on from, the engines set to it, and which settings have changed; rank 0 notes the start."""
    folder = Path(config.run)
    state = checkpoints.resume(stage.engines)
    origin = f" from the weights of {config.init_from}" if config.init_from else ""
    changes: list[str] = []
    if state is None:
        speak(f"starting in {folder}{origin}")
    else:
        path = checkpoints.root / folder_name(state.step)
        changes = list(checkpoints.changed_settings(path))
        was = read_manifest(path)["world_size"]
        changes += [f"ranks: {was} -> {world.world_size}"] if was != world.world_size else []
        speak(f"resuming from {path}{'; changed: ' if changes else ''}{', '.join(changes)}")
    state = state or TrainState()
    if world.is_rank_zero:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / "config.yaml") as file:
            file.write(to_yaml(config).encode())
        History(folder).note(START, step=state.step, world_size=world.world_size, changed=changes)
    return state, changes


def share_bad_samples(config: RunConfig, datasets: Sequence[Dataset], world: World) -> BadSamples | NoBadSamples:
    """What the loop tells all ranks of the bad samples that this rank has met. A collective."""
    if not config.data.max_bad:
        return NoBadSamples()

    def take() -> list[dict[str, Any]]:
        return [asdict(bad) for dataset in datasets for bad in dataset.take_bad()]

    return BadSamples(Path(config.run), config.data.max_bad, world, take)


def batches_from(dataset: Dataset, config: RunConfig, world: World, samples_seen: int) -> Iterator[Any]:
    """This rank's training batches from a position in the stream of samples on."""
    return train_batches(
        dataset,
        batch_size=config.engine.micro_batch,
        rank=world.rank,
        world_size=world.world_size,
        samples_seen=samples_seen,
        seed=config.seed,
        workers=config.data.workers,
        window=config.data.window,
        device=world.device,
    )


def samples_of_step(dataset: Dataset, config: RunConfig, world: World, first: int) -> list[str]:
    """What this rank's samples are called in the step that starts at stream position `first`."""
    return names_of_step(
        dataset,
        first=first,
        global_batch=config.loop.global_batch,
        batch_size=config.engine.micro_batch,
        rank=world.rank,
        world_size=world.world_size,
        seed=config.seed,
        window=config.data.window,
    )
