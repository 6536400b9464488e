"""One rank of the worlds that test_distributed.py starts: trains tiny models through the real loops.

Everything runs in one world, because starting one costs seconds. A GPU's test runs it as a program of one rank:
distributed_worker.py OUT.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from deepspeed.utils import z3_leaf_module
from torch import Tensor, nn

from data_pipeline.loading.batches import Batch
from data_pipeline.shards.index import Storage
from launchers.setup.assembly import RunData
from launchers.setup.command_line import end_process
from launchers.setup.settings import DataConfig
from models.autoencoder import AutoencoderConfig
from models.discriminator import PatchDiscriminator
from models.quantizer import QuantizerConfig
from models.var import VARConfig
from models.vqvae import VQVAEConfig
from training.checkpoints.checkpoint import Checkpoints, Retention, TrainState
from training.engine.distributed import World, agree_on_error, barrier, join_world, leave_world
from training.engine.engine import Engine, EngineConfig
from training.loop import Loop
from training.loop_config import LoopConfig
from training.losses import ReconstructionLossConfig
from training.optim import OptimizerConfig, build_optimizer
from training.run import Run
from training.schedule import Schedule
from training.stage import Stage
from training.supervision.divergence import DivergenceConfig
from training.supervision.stopping import Stopping
from training.supervision.watch import Heartbeat, WatchConfig
from training.tokenizer_loop import CodebookCareConfig, TokenizerStage, build_tokenizer
from training.var_loop import VARStage, build_var

PATCH_NUMS = (1, 2, 4)
TOKENIZER = VQVAEConfig(
    PATCH_NUMS,
    AutoencoderConfig(width=32, multipliers=(1, 1), num_res_blocks=1, code_width=8),
    QuantizerConfig(vocab_size=17, code_width=8, num_phi=0),
)
# 17: parameters whose elements two ranks cannot share evenly
TRANSFORMER = VARConfig(depth=2, patch_nums=PATCH_NUMS, vocab_size=17, code_width=8, num_classes=4, init_gamma=0.5)
OPTIMIZER = OptimizerConfig(base_lr=1e-3 * 256 / 16, ema_decay=0.5)
GLOBAL_BATCH, NUM_SAMPLES = 16, 22


class InMemory:
    """A data set of images or codes, each a function of its number alone."""

    index = SimpleNamespace(shards=())
    storage = Storage("nowhere")
    max_bad = 0
    read_together = 1

    def __init__(self, *, images: bool) -> None:
        self.images = images
        self.shard_sizes = (9, NUM_SAMPLES - 9)

    def __len__(self) -> int:
        return NUM_SAMPLES

    def twin(self) -> InMemory:
        return self

    def read_or_substitute(self, ids: np.ndarray, epochs: np.ndarray) -> tuple[Tensor, Tensor, tuple[()]]:
        return torch.stack([self._one(int(i)) for i in ids]), torch.from_numpy(ids % 4), ()

    def _one(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        if self.images:
            return torch.rand(3, 8, 8, generator=generator) * 2 - 1
        return torch.randint(16, (TRANSFORMER.scales.num_tokens,), generator=generator)


def data_of(world: World, *, images: bool, micro_batch: int = 4) -> RunData:
    """What a rank reads of the data set."""
    data, settings = InMemory(images=images), DataConfig(workers=0)
    return RunData(data, data, settings, world, seed=3, global_batch=GLOBAL_BATCH, micro_batch=micro_batch)


def var_stage(world: World, engine: EngineConfig) -> VARStage:
    model = build_var(TRANSFORMER, engine, seed=0).to(world.device)
    optimizer = build_optimizer(model, OPTIMIZER, undecayed=model.names_without_weight_decay())
    tokenizer = build_tokenizer(TOKENIZER, seed=0).eval().requires_grad_(False)
    return VARStage(
        Engine(model, optimizer, engine, global_batch=GLOBAL_BATCH, world=world),
        tokenizer.to(world.device),
        label_drop=0.3,
        seed=5,
        validation=data_of(world, images=False).validation_batches,
    )


def tokenizer_stage(world: World, engine: EngineConfig, *, adversarial: bool = False) -> TokenizerStage:
    model = build_tokenizer(TOKENIZER, seed=0).to(world.device)
    judge = PatchDiscriminator(width=8, num_layers=1, seed=0).to(world.device)
    start = partial(Engine, config=engine, global_batch=GLOBAL_BATCH, world=world)
    return TokenizerStage(
        start(model, build_optimizer(model, OPTIMIZER)),
        ReconstructionLossConfig(lpips_weight=0, adversarial_weight=0.4 if adversarial else 0, adversarial_start=0.3),
        CodebookCareConfig(restart_every=2, restart_until=1.0),
        discriminator=start(judge, build_optimizer(judge, OPTIMIZER)) if adversarial else None,
        seed=5,
        validation=data_of(world, images=True).validation_batches,
    )


def train(stage: Stage, world: World, folder: Path, *, model: Any, images: bool, stop_after: int = 0) -> list[dict]:
    """Run a stage for 6 steps, or on from its checkpoint; what it recorded."""
    config = LoopConfig(
        global_batch=GLOBAL_BATCH,
        epochs=6 * GLOBAL_BATCH / NUM_SAMPLES,
        log_every=4,
        validate_every=2,
        checkpoint_every=100,
        stop_after_steps=stop_after,
    )
    checkpoints = Checkpoints(
        folder / "checkpoints", retention=Retention(), world=world, model_config=model, identity={}
    )
    state = checkpoints.resume(stage.engines) or TrainState()
    run = Run(folder, world, checkpoints, Stopping(folder, world), Heartbeat(WatchConfig()), lambda text: None)
    schedule = Schedule(config, OPTIMIZER, NUM_SAMPLES)
    data = data_of(world, images=images, micro_batch=stage.engines["model"].config.micro_batch)
    Loop(stage, data, run, schedule, DivergenceConfig()).train(state)
    barrier(world)
    return run.record.read()


def train_in_parts(make_stage: Callable[[], Stage], world: World, folder: Path, **kinds: Any) -> list[dict]:
    """Like `train`, but stopped after 3 steps and started again with everything built anew."""
    train(make_stage(), world, folder, stop_after=3, **kinds)
    return train(make_stage(), world, folder, **kinds)


def resume_elsewhere(half: Path, stage: Stage, world: World, folder: Path, **kinds: Any) -> list[dict]:
    """Go on from a copy of a run that was stopped under another ZeRO stage or world size; what is recorded in all."""
    if world.is_rank_zero:
        shutil.copytree(half, folder)
    barrier(world)
    return train(stage, world, folder, **kinds)


def float32(zero_stage: int) -> EngineConfig:
    return EngineConfig(
        zero_stage=zero_stage,
        precision="fp32",
        micro_batch=4,
        activation_checkpointing="full" if zero_stage == 3 else "none",
        reduce_bucket_size=1_000_000,
        prefetch_bucket_size=100_000,
        persistence_threshold=1000,
    )


def run_all(world: World, out: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    codes, pictures = {"model": TRANSFORMER, "images": False}, {"model": TOKENIZER, "images": True}
    stage_1 = EngineConfig(zero_stage=1, precision="fp32", micro_batch=4, reduce_bucket_size=1_000_000)
    results["tokenizer"] = train(tokenizer_stage(world, stage_1), world, out / "tokenizer", **pictures)
    for zero_stage in (0, 1, 2, 3):  # what is compared bit for bit is of one stage: the first of stage 3 patches torch
        name, make_stage = f"stage{zero_stage}", partial(var_stage, world, float32(zero_stage))
        results[name] = train(make_stage(), world, out / name, **codes)
        train(make_stage(), world, out / f"{name}_half", stop_after=3, **codes)
        if world.world_size == 1:
            continue
        halves = {f"{name}_parts": out / f"{name}_half"}
        halves[f"{name}_other_world"] = out.parent / "world1" / f"{name}_half"
        if zero_stage:
            halves[f"{name}_other_stage"] = out / f"stage{zero_stage - 1}_half"
        for part, half in halves.items():
            results[part] = resume_elsewhere(half, make_stage(), world, out / part, **codes)
    for zero_stage in (1, 3):
        bf16 = EngineConfig(zero_stage=zero_stage, precision="bf16", micro_batch=4, reduce_bucket_size=1_000_000)
        name, make_stage = f"bf16_stage{zero_stage}", partial(var_stage, world, bf16)
        results[f"{name}_initial_error"] = initial_error(make_stage(), world)
        results[name] = train(make_stage(), world, out / name, **codes)
        if world.world_size > 1:
            results[f"{name}_parts"] = train_in_parts(make_stage, world, out / f"{name}_parts", **codes)
    for zero_stage, precision in ((0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")):
        engine = EngineConfig(zero_stage=zero_stage, precision=precision, micro_batch=4, reduce_bucket_size=1_000_000)
        results[f"bad_step_{zero_stage}_{precision}"] = moved_by_steps(var_stage(world, engine), world)
    results["leaves"] = leaves_of(var_stage(world, float32(3)).engines["model"].model)
    results["validation"] = validate_pictures(world)
    parts = replace(stage_1, micro_batch=4 // world.world_size)  # two ranks cut the batch otherwise than one does
    make_stage = partial(tokenizer_stage, world, parts, adversarial=True)
    results["adversarial"] = train(make_stage(), world, out / "adversarial", **pictures)
    if world.world_size == 1:
        return results
    part, stage_0 = "stage0_other_stage", var_stage(world, float32(0))
    results[part] = resume_elsewhere(out / "stage3_half", stage_0, world, out / part, **codes)
    results["adversarial_parts"] = train_in_parts(make_stage, world, out / "adversarial_parts", **pictures)
    results["error"] = shared_error(world)
    return results


def moved_by_steps(stage: VARStage, world: World) -> list[float]:
    """How far the weights move in a step whose loss is NaN on the last rank alone, and in a sound step after it."""
    engine = stage.engines["model"]
    batches = data_of(world, images=False).batches(0)

    def weights() -> Tensor:
        return torch.cat([tensor.flatten().clone() for _, tensor in engine.state.tensors()])

    moved, before = [], weights()
    for is_bad in (True, False):
        for _ in range(engine.accumulation):
            batch = next(batches)
            inputs = stage.tokenizer.teacher_forcing_inputs(batch.data.long()).to(engine.config.dtype)
            loss = engine(inputs, batch.labels).float().logsumexp(-1).mean()
            engine.backward(loss * float("nan") if is_bad and world.rank == world.world_size - 1 else loss)
            engine.step(learning_rate=1e-3, weight_decay=0.05)
        after = weights()
        moved.append(float((after - before).abs().max()))
        before = after
    return moved


def leaves_of(model: nn.Module) -> list[str]:
    """The modules that ZeRO-3 gathers as a whole."""
    return [name for name, module in model.named_modules() if z3_leaf_module(module)]


def validate_pictures(world: World) -> dict[str, Any]:
    """Validate a tokenizer on two different pictures, shared out among the ranks; and, alone, on the first of them."""
    noise = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures = (torch.full_like(noise, 0.9), noise)
    batches = [Batch(picture, torch.zeros(1), torch.zeros(1), torch.ones(1)) for picture in pictures]
    stage = tokenizer_stage(world, EngineConfig(zero_stage=0, precision="fp32", micro_batch=4))
    stage.validation = lambda: batches[world.rank :: world.world_size]
    found = {"both": stage.validate()}
    if world.world_size == 1:
        stage.validation = lambda: batches[:1]
        found["first"] = stage.validate()
    return found


def initial_error(stage: VARStage, world: World) -> float:
    """How far the engine's float32 weights are from those the model was given, at the worst."""
    wanted = build_var(TRANSFORMER, EngineConfig(), seed=0).state_dict()
    found = {name: value.to("cpu", copy=True) for name, value in stage.engines["model"].state.tensors()}
    return max(float((found[f"weight/{name}"] - wanted[name]).abs().max()) for name in wanted)


def shared_error(world: World) -> str:
    """What every rank hears when only the last one fails."""
    try:
        agree_on_error(OSError("disk full") if world.rank == world.world_size - 1 else None, world)
    except (OSError, ValueError) as error:
        return str(error)
    return "nothing"


def main(out: str) -> None:
    world = join_world(timeout_seconds=120)
    torch.set_num_threads(1)  # these tensors are too small to share
    results = run_all(world, Path(out))
    (Path(out) / f"rank{world.rank}.json").write_text(json.dumps(results))
    leave_world()


if __name__ == "__main__":
    main(sys.argv[-1])
    end_process(0)
