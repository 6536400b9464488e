"""DeepSpeed behind one door: a small strict config compiled to a full DeepSpeed config, and the engine the loops drive.

Only this folder imports deepspeed. The model is built and initialised as an ordinary module, the same on every rank,
and partitioned afterwards: `zero.Init` would discard custom initialisation without a word (DeepSpeed issue 2650).
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.attention import ATTENTIONS, PER_SCALE
from models.var import CHECKPOINTINGS, NO_CHECKPOINTING
from training.engine.cpu_communication import load_cpu_communication, unlink_shared_memory
from training.engine.distributed import World
from training.engine.unpickling import forbid_unpickling
from training.engine.whole_state import WholeState

LIVE_ELEMENTS = 1_000_000_000  # weights gathered at once under ZeRO-3, and how far ahead a use keeps them gathered
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# gathered whole under ZeRO-3: one collective per transformer block
LEAF_CLASSES = ("models.transformer.AdaLNBlock", "models.transformer.LayerNormBlock")


@dataclass(frozen=True)
class EngineConfig:
    """How a model is spread over the GPUs. Sizes of buckets are in elements."""

    zero_stage: int = 1
    precision: str = "bf16"
    micro_batch: int = 16  # images per GPU and forward pass; accumulation follows from the global batch
    attention: str = PER_SCALE  # or flex, one fused kernel on CUDA; masked, the plain one with a dense mask
    compile: bool = False  # torch.compile of each transformer block; the first step then takes minutes
    activation_checkpointing: str = NO_CHECKPOINTING  # or full: keep a block's input; selective: and its products
    gradient_clipping: float = 2.0
    reduce_bucket_size: int = 200_000_000
    prefetch_bucket_size: int = 140_000_000  # at least one block, or ZeRO-3's prefetch stops short: d30 has 66.4 M
    persistence_threshold: int = 100_000  # smaller parameters stay whole on every rank under ZeRO-3

    def __post_init__(self) -> None:
        choices = {
            "zero_stage": (0, 1, 2, 3),
            "precision": PRECISIONS,
            "attention": ATTENTIONS,
            "activation_checkpointing": CHECKPOINTINGS,
        }
        for name, accepted in choices.items():
            if (value := getattr(self, name)) not in accepted:
                raise ValueError(f"engine.{name} is {value!r}; accepted: {', '.join(map(str, accepted))}")
        if self.zero_stage == 0 and self.precision != "fp32":
            raise ValueError(
                f"engine.precision {self.precision} needs engine.zero_stage 1, 2 or 3: without ZeRO DeepSpeed does not "
                "accumulate its gradients in float32"
            )
        for name in ("micro_batch", "reduce_bucket_size", "prefetch_bucket_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"engine.{name} is {getattr(self, name)}; it must be at least 1")
        if self.gradient_clipping < 0:
            raise ValueError(f"engine.gradient_clipping is {self.gradient_clipping}; it must be 0 (off) or positive")

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    @property
    def is_reduced_by_the_engine(self) -> bool:
        """Tell whether DeepSpeed's engine adds up the ranks' gradients, which otherwise its ZeRO optimiser does.

        One rank can then leave it out: all gradients would be copied twice, and rounded to bf16, to add up one.
        """
        return self.is_plain or (self.zero_stage, self.precision) == (1, "bf16")

    @property
    def is_plain(self) -> bool:
        """Without ZeRO and low precision DeepSpeed reports no norm and passes no step over: Engine does, and clips."""
        return self.zero_stage == 0 and self.precision == "fp32"


def accumulation_steps(global_batch: int, micro_batch: int, world_size: int) -> int:
    """Forward passes per optimiser step, so that world_size * micro_batch * steps is the global batch exactly.

    Raises:
        ValueError: it cannot be exact; nothing is rounded.
    """
    if global_batch % (micro_batch * world_size) == 0:
        return global_batch // (micro_batch * world_size)
    if global_batch % world_size:
        raise ValueError(
            f"global_batch {global_batch} is not divisible by the world size {world_size}; "
            f"world sizes that fit: {_divisors(global_batch)}"
        )
    raise ValueError(
        f"global_batch {global_batch} over {world_size} ranks is {global_batch // world_size} images a rank, not "
        f"divisible by engine.micro_batch {micro_batch}; "
        f"micro-batches that fit: {_divisors(global_batch // world_size)}"
    )


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, min(number, 1024) + 1) if number % n == 0)


def compile_deepspeed_config(config: EngineConfig, *, global_batch: int, world_size: int) -> dict[str, Any]:
    """The full DeepSpeed config: every value whose default has moved or matters is written out, nothing is "auto"."""
    low_precision = config.precision != "fp32"
    return {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": accumulation_steps(global_batch, config.micro_batch, world_size),
        "gradient_clipping": 0.0 if config.is_plain else config.gradient_clipping,
        "zero_allow_untested_optimizer": True,  # torch's AdamW: nothing to compile, the same losses as DeepSpeed's
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": True},
        # the public recipe starts the loss scale at 2^11 and doubles it every 1,000 steps, there to at most 2^15
        "fp16": {
            "enabled": config.precision == "fp16",
            "initial_scale_power": 11,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "data_types": {"grad_accum_dtype": "fp32"} if low_precision else {},
        "zero_optimization": _zero_section(config),
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def _zero_section(config: EngineConfig) -> dict[str, Any]:
    section: dict[str, Any] = {
        "stage": config.zero_stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": config.reduce_bucket_size,
        "allgather_bucket_size": config.reduce_bucket_size,
        "round_robin_gradients": False,
        "overlap_comm": config.zero_stage == 3,  # races were reported for stages 1 and 2: DeepSpeed 5545, 7965, 8061
    }
    if config.zero_stage == 3:
        section |= {
            "stage3_prefetch_bucket_size": config.prefetch_bucket_size,
            "stage3_param_persistence_threshold": config.persistence_threshold,
            "stage3_max_live_parameters": LIVE_ELEMENTS,
            "stage3_max_reuse_distance": LIVE_ELEMENTS,
            "stage3_gather_16bit_weights_on_model_save": False,
            "leaf_module": {"classes": list(LEAF_CLASSES), "names": [], "name_suffixes": []},
        }
    return section


def _import_deepspeed() -> Any:
    """Import deepspeed quietly. It never loads a file for us, and its `torch.load` calls are closed all the same."""
    forbid_unpickling()
    # DeepSpeed compiles its CPU communication with the ninja of our own environment, which need not be active
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)\.")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        load_cpu_communication()
    return deepspeed


def set_schedule(optimizer: torch.optim.Optimizer, learning_rate: float, weight_decay: float) -> None:
    """Write a step's learning rate and weight decay into every group that `build_optimizer` has made."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        group["weight_decay"] = weight_decay * group["weight_decay_scale"]


class Engine:
    """A model under DeepSpeed: forward, backward, step, and its state as whole tensors (`state`).

    Every method is a collective: all ranks call it, in the same order.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: EngineConfig,
        *,
        global_batch: int,
        world: World,
    ) -> None:
        self.config = config
        self.world = world
        self.model: Any = model  # a VAR, a VQVAE or a discriminator: its stage knows which
        self.global_batch = global_batch
        compiled = compile_deepspeed_config(config, global_batch=global_batch, world_size=world.world_size)
        self.accumulation = compiled["gradient_accumulation_steps"]
        initial = [] if config.precision == "fp32" else [p.detach().clone() for p in model.parameters()]
        deepspeed = _import_deepspeed()
        self._engine = deepspeed.initialize(
            model=model, optimizer=optimizer, config=compiled, dist_init_required=False
        )[0]
        if world.device.type == "cpu":
            unlink_shared_memory(world)
        if config.is_reduced_by_the_engine and world.world_size == 1:
            self._engine.enable_backward_allreduce = False
        self.state = WholeState(model, self._engine.optimizer, world)
        # DeepSpeed makes its float32 master copy from the rounded weights; fp16 would lose d30's smallest ones
        for parameter, value in zip(model.parameters(), initial, strict=False):
            self.state.set_weight(parameter, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model forward."""
        return self._engine(*args, **kwargs)

    def train(self, mode: bool = True) -> None:
        """Put the model into training mode, or out of it."""
        self._engine.train(mode)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss (), the mean over this rank's micro-batch, to those of the step."""
        self._engine.backward(loss)

    def step(self, *, learning_rate: float, weight_decay: float) -> Tensor:
        """Update the weights if this forward pass ends an accumulation; returns the gradient's norm before clipping.

        A norm that is not finite leaves the weights and moments of all ranks as they are.
        """
        set_schedule(self._engine.optimizer, learning_rate, weight_decay)
        at_boundary = self._engine.is_gradient_accumulation_boundary()
        norm = self._clip_plain_gradients() if at_boundary and self.config.is_plain else None
        if norm is not None and not torch.isfinite(norm):  # with ZeRO DeepSpeed itself passes such a step over
            self._pass_over_step()
        else:
            self._engine.step()
        if not at_boundary:
            return torch.zeros((), device=self.world.device)  # made there: a number brought there would be waited for
        norm = self._engine.get_global_grad_norm() if norm is None else norm
        return torch.as_tensor(norm, dtype=torch.float32, device=self.world.device)

    def _pass_over_step(self) -> None:
        """Count a step without taking it, and begin the next one without gradients."""
        for parameter in self.model.parameters():
            parameter.grad = None
        self._engine.set_gradient_accumulation_boundary(False)
        self._engine.step()
        self._engine.set_gradient_accumulation_boundary(None)

    def _clip_plain_gradients(self) -> Tensor:
        """Scale the gradients down to the norm they may have; returns the one they had."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if 0 < self.config.gradient_clipping < norm:  # else all gradients would be multiplied by one
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.gradient_clipping, norm)
        return norm
