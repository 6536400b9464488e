"""From settings to a run: its checkpoints, those who watch it, and the loop in its folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from launchers.setup.command_line import say, say_nothing
from data_pipeline.files.nested import flatten
from launchers.setup.assembly import RunData
from launchers.setup.config_files import to_yaml
from launchers.setup.settings import RunConfig
from models.var import VARConfig
from models.vqvae import VQVAEConfig
from training.checkpoints.checkpoint import Checkpoints, Retention, TrainState
from training.checkpoints.commit import DAMAGED, DamagedCheckpoint, candidates, read_manifest, structural_damage
from training.engine.distributed import World, owned_by_rank_zero
from training.engine.engine import accumulation_steps
from training.loop import Loop
from training.run import Run
from training.schedule import Schedule
from training.stage import Stage
from training.supervision.bad_samples import BadSamples, NoBadSamples
from training.supervision.history import History
from training.supervision.stopping import Stopping
from training.supervision.watch import Heartbeat, WatchConfig
from training.tracking.follow import LivePage
from training.tracking.record import RunRecord


def open_checkpoints(config: RunConfig, model: VARConfig | VQVAEConfig, world: World, **identity: str) -> Checkpoints:
    """Open the checkpoints of a run folder, after checking that this run may go on from them.

    model: the config of what is trained. identity: what else, besides seed, global batch, window and init_from, must
    not change in a run.

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
        model_config=model,
        identity=order_of_data | identity,
        config=asdict(config),
        report=report_on(world),
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


@dataclass(frozen=True)
class Supervision:
    """Who may ask a run to stop, and who notices that it hangs."""

    stopping: Stopping
    heartbeat: Heartbeat


@contextmanager
def supervise(run: Path, watch: WatchConfig, world: World) -> Iterator[Supervision]:
    """Let signals ask the run in this folder to stop, and end a rank that hangs or loses its launcher."""
    stopping = Stopping(run, world)
    stopping.install()
    heartbeat = Heartbeat.start(watch, world, run, stopping)
    try:
        yield Supervision(stopping, heartbeat)
    finally:
        heartbeat.close()
        stopping.remove()


def run_stage(
    config: RunConfig, stage: Stage, data: RunData, checkpoints: Checkpoints, supervision: Supervision
) -> TrainState:
    """Train a stage in its run folder, from its newest whole checkpoint if there is one; the state at the end.

    Raises:
        Stopped, TrainingDiverged, CheckpointsFailing, DamagedCheckpoint, TooManyBadSamples: see there.
    """
    folder, world = Path(config.run), data.world
    shows_mlflow = world.is_rank_zero and config.tracking.mlflow
    run = Run(
        folder,
        world,
        checkpoints,
        supervision.stopping,
        supervision.heartbeat,
        report=report_on(world),
        page=LivePage(folder, config.tracking, flatten(asdict(config))) if shows_mlflow else None,
        bad_samples=BadSamples(folder, config.data.max_bad, world, data.take_bad)
        if config.data.max_bad
        else NoBadSamples(),
    )
    schedule = Schedule(config.loop, config.optimizer, data.num_samples)
    with owned_by_rank_zero(folder, world), run.closing():
        state = run.resume(stage.engines, config_yaml=to_yaml(config), init_from=config.init_from)
        state = Loop(stage, data, run, schedule, config.divergence).train(state)
    run.report(f"done: step {state.step}, {state.samples_seen} samples seen; record in {run.record.path}")
    return state


def report_on(world: World) -> Callable[[str], None]:
    """The callback that tells a person something: it prints on rank 0 and is silent on the others."""
    return say if world.is_rank_zero else say_nothing
