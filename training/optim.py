"""AdamW with the public code's weight-decay groups, and the learning-rate and weight-decay schedules.

Both schedules are pure functions of progress, so a resumed run needs nothing but its position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule. `peak_lr` follows from the global batch as in the public recipe."""

    base_lr: float = 1e-4  # for 256 images; the peak is base_lr * global_batch / 256
    warmup_share: float = 0.02  # of the run: linear from `warmup_start` times the peak
    warmup_start: float = 0.005
    constant_share: float = 0.05  # of the rest: held at the peak before the linear decay
    final_lr_ratio: float = 0.1
    weight_decay: float = 0.05
    final_weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    ema_decay: float = 0.0  # of an average of the weights that checkpoints carry in ema/; 0: none, as in the paper

    def __post_init__(self) -> None:
        if self.base_lr <= 0:
            raise ValueError(f"optimizer.base_lr is {self.base_lr}; it must be positive")
        for name in ("weight_decay", "final_weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it must be 0 (off) or positive")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"optimizer.ema_decay is {self.ema_decay}; it must lie in [0, 1), where 0 is off")
        for name in ("warmup_share", "warmup_start", "constant_share", "final_lr_ratio", "beta1", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it must lie in [0, 1]")

    def peak_lr(self, global_batch: int) -> float:
        """Return the highest learning rate of a run: base_lr per 256 images of the global batch."""
        return self.base_lr * global_batch / 256


def learning_rate_factor(progress: float, config: OptimizerConfig) -> float:
    """Return the share of the peak learning rate at `progress` in [0, 1]: warm-up, constant, linear decay (`lin0`)."""
    if progress < config.warmup_share:
        return config.warmup_start + (1 - config.warmup_start) * progress / config.warmup_share
    rest = (progress - config.warmup_share) / max(1 - config.warmup_share, 1e-12)
    if rest < config.constant_share:
        return 1.0
    remaining = max(0.0, 1 - rest) / max(1 - config.constant_share, 1e-12)
    return config.final_lr_ratio + (1 - config.final_lr_ratio) * remaining


def weight_decay_at(progress: float, config: OptimizerConfig) -> float:
    """Return the weight decay at `progress` in [0, 1]: half a cosine from `weight_decay` to `final_weight_decay`."""
    share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.final_weight_decay + (config.weight_decay - config.final_weight_decay) * share


class AveragingAdamW(torch.optim.AdamW):
    """AdamW that keeps an exponential moving average of the weights beside its moments, as state "ema".

    It is element by element, so under ZeRO each rank averages its own part and no communication is needed.
    """

    def __init__(self, groups: list[dict[str, Any]], *, ema_decay: float, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.ema_decay = ema_decay

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        averages = {  # an average begins with the weights before their first step
            parameter: self.state[parameter]["ema"] if "ema" in self.state[parameter] else parameter.detach().clone()
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        }
        result = super().step(closure)
        for parameter, average in averages.items():
            self.state[parameter]["ema"] = average.lerp_(parameter, 1 - self.ema_decay)
        return result


def build_optimizer(model: nn.Module, config: OptimizerConfig, *, undecayed: Collection[str] = ()) -> torch.optim.AdamW:
    """Make AdamW over the trainable parameters in two groups; `weight_decay_scale` says which one the schedule decays.

    Vectors never decay (biases, norms, scales per head), nor do the parameters named in `undecayed`.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decays = {name: parameter.ndim > 1 and name not in undecayed for name, parameter in named}
    groups = [
        {"params": [parameter for name, parameter in named if decays[name] == decayed], "weight_decay_scale": scale}
        for decayed, scale in ((True, 1.0), (False, 0.0))
    ]
    groups = [group for group in groups if group["params"]]
    rate, betas, epsilon = config.base_lr, (config.beta1, config.beta2), config.epsilon
    if config.ema_decay:
        return AveragingAdamW(groups, lr=rate, betas=betas, eps=epsilon, fused=True, ema_decay=config.ema_decay)
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=epsilon, fused=True)
