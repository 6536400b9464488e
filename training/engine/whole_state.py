"""The state of a DeepSpeed engine as whole named float32 tensors, whatever its ZeRO stage and number of ranks.

DeepSpeed keeps weights and AdamW's moments in flat tensors, cut over the ranks in a way that depends on stage and world
size. Here each parameter's weight and moments are put together and taken apart again, so that a checkpoint written
under one stage and world size can be read under any other. Nothing in DeepSpeed's own files is needed for that.

Names are `kind/parameter`, the kind being "weight", "exp_avg", "exp_avg_sq", or "ema" where the optimiser averages.
Persistent buffers count as weights. Every method is a collective: all ranks call it, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from training.engine.distributed import World

WEIGHT, EMA = "weight", "ema"
MOMENTS = ("exp_avg", "exp_avg_sq")
LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of fp16's dynamic loss scaling


class WholeState:
    """`optimizer` is the engine's: DeepSpeed's wrapper, or the plain optimiser where it wraps none."""

    def __init__(self, model: nn.Module, optimizer: Any, world: World) -> None:
        self.parameters = dict(model.named_parameters())
        persistent = model.state_dict().keys()
        self.buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
        self.wrapper = optimizer
        self.base = getattr(optimizer, "optimizer", optimizer)  # the AdamW inside
        self.world = world
        self.moments = MOMENTS + ((EMA,) if getattr(self.base, "ema_decay", 0) else ())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor whole, on every rank, parameters in float32; valid until the next one is asked for."""
        self._make_moments()
        for name, buffer in self.buffers.items():
            yield f"{WEIGHT}/{name}", buffer
        for kind in (WEIGHT, *self.moments):
            for name, parameter in self.parameters.items():
                yield f"{kind}/{name}", self._get(parameter, kind)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each persistent buffer and each parameter in float32, whole, by its name in the model; as in `tensors`."""
        yield from self.buffers.items()
        for name, parameter in self.parameters.items():
            yield name, self.get_weight(parameter)

    def load(self, read: Callable[[str], Tensor]) -> None:
        """Set everything from `read(name)`, which returns the same whole tensor on every rank."""
        self._make_moments()
        for name, buffer in self.buffers.items():
            buffer.copy_(read(f"{WEIGHT}/{name}"))
        for kind in (WEIGHT, *self.moments):
            for name, parameter in self.parameters.items():
                self._set(parameter, kind, read(f"{kind}/{name}").to(self.world.device))
        self._finish_writing()

    def get_weight(self, parameter: nn.Parameter) -> Tensor:
        """Return one parameter whole and in float32, from DeepSpeed's master copy where it keeps one."""
        return self._get(parameter, WEIGHT)

    def set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Overwrite one parameter whole, its master copy too; `value` is the same on all ranks."""
        self._set(parameter, WEIGHT, value)
        self._finish_writing()

    def scalars(self) -> dict[str, float]:
        """The optimiser's step and, with fp16, the position of loss scaling."""
        self._make_moments()
        scalars = {"step": max((float(state["step"]) for state in self.base.state.values()), default=0.0)}
        scaler = getattr(self.wrapper, "loss_scaler", None)
        return scalars | {name: float(getattr(scaler, name)) for name in LOSS_SCALER if hasattr(scaler, name)}

    def load_scalars(self, scalars: dict[str, float]) -> None:
        """Set what `scalars` returned; loss scaling that either side lacks stays as it is."""
        self._make_moments()
        for state in self.base.state.values():
            state["step"] = torch.full_like(state["step"], scalars["step"])
        scaler = getattr(self.wrapper, "loss_scaler", None)
        for name in LOSS_SCALER:
            if hasattr(scaler, name) and name in scalars:
                setattr(scaler, name, type(getattr(scaler, name))(scalars[name]))

    def _finish_writing(self) -> None:
        """DeepSpeed gathers weights in a stream of its own, which does not wait for ours."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()

    def _make_moments(self) -> None:
        """Make the moments that AdamW would make at its first step, and let DeepSpeed know where they are.

        DeepSpeed links parameters to their moments once, after the first group's first step, and misses later ones.
        """
        flat = getattr(self.wrapper, "fp32_partitioned_groups_flat", None)  # ZeRO-3 keeps param_groups empty
        for tensor in flat or [tensor for group in self.base.param_groups for tensor in group["params"]]:
            if not self.base.state.get(tensor):
                zeros = {name: torch.zeros_like(tensor, requires_grad=False) for name in MOMENTS}
                step = torch.zeros((), device=tensor.device)  # where fused AdamW wants it
                self.base.state[tensor] = {"step": step} | zeros
            if EMA in self.moments and EMA not in self.base.state[tensor]:
                self.base.state[tensor][EMA] = tensor.detach().clone()
        if hasattr(self.wrapper, "_lazy_init_hp_params_optimizer_state"):
            self.wrapper._hp_optimizer_states_linked = False
            self.wrapper._lazy_init_hp_params_optimizer_state()

    def _get(self, parameter: nn.Parameter, kind: str) -> Tensor:
        key = None if kind == WEIGHT else kind
        if hasattr(parameter, "ds_id"):  # ZeRO-3
            return parameter._z3_optimizer.get_full_hp_param(parameter, key).detach()
        if hasattr(parameter, "_hp_mapping"):  # ZeRO-1, ZeRO-2
            return parameter.get_full_hp_param(key).detach()
        return (parameter if key is None else self.base.state[parameter][key]).detach()

    def _set(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        key = None if kind == WEIGHT else kind
        if hasattr(parameter, "ds_id"):
            self._set_part(parameter, key, value)
            return
        if hasattr(parameter, "_hp_mapping"):
            parameter.set_full_hp_param(value, key)
        elif key is not None:
            self.base.state[parameter][key].copy_(value)
        if key is None:
            parameter.data.copy_(value)

    def _set_part(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        """Overwrite this rank's part under ZeRO-3, and the whole weight where it is kept whole.

        DeepSpeed's own setter fails where the number of elements is no multiple of the world size.
        """
        length = parameter.ds_tensor.numel()  # of every rank's part; the last one ends in padding
        padded = nn.functional.pad(value.flatten(), (0, length * self.world.world_size - value.numel()))
        part = padded.narrow(0, length * self.world.rank, length)
        parameter._z3_optimizer.set_local_hp_param(part, parameter, key)
        if key is None:
            parameter.ds_tensor.data.copy_(part)
            if parameter.numel() == value.numel():  # small enough to stay whole on every rank
                parameter.data.copy_(value)
