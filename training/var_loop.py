"""Stage 2: the transformer learns the codes. One optimiser step, and validation.

B images, L tokens, K scales, C code width. Chance enters training in two places, labels dropped for classifier-free
guidance and blocks skipped by stochastic depth. Both are drawn for the whole global batch from (seed, samples_seen) and
looked up by an image's stream position: the draw does not depend on ranks or micro-batches, and needs no stored state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.var import VAR, VARConfig
from models.vqvae import VQVAE
from training.engine.distributed import World, sum_over_ranks, to_device
from training.engine.engine import Engine, EngineConfig
from training.flops import training_flops
from training.losses import average_over_tokens, token_scores
from training.seams import reach
from training.stage import Batch, StepContext
from training.step_metrics import TimedIterator
from training.tracking.record import Record


class VARStage:
    """The stage that `training.loop.Loop` drives."""

    def __init__(
        self,
        engine: Engine,
        config: VARConfig,
        tokenizer: VQVAE,
        *,
        label_drop: float,
        global_batch: int,
        seed: int,
        world: World,
        validation: Callable[[], Iterable[Batch]],
    ) -> None:
        self.engines = {"model": engine}
        self.config = config
        self.tokenizer = tokenizer
        self.label_drop = label_drop
        self.global_batch = global_batch
        self.seed = seed
        self.world = world
        self.validation = validation
        self.scales = config.scales
        self.flops_per_image = training_flops(config)
        self.tokens_per_image = self.scales.num_tokens

    def train_step(self, batches: Iterator[Batch], context: StepContext) -> dict[str, Tensor]:
        engine = self.engines["model"]
        draws = step_draws(self.seed, context.samples_seen, self.global_batch, 1 + 2 * self.config.depth)
        losses, errors = [], []
        for _ in range(engine.accumulation):
            batch = next(batches)
            rows = to_device(draws[batch.positions - context.samples_seen], self.world.device)  # (B, 1 + 2 depth)
            batch = batch.to(self.world.device)
            labels = drop_labels(self._labels(batch), rows[:, 0], self.label_drop, self.config.null_class)
            residual_scale = stochastic_depth(rows[:, 1:], self.config.drop_path_rate)
            scores = self._scores(batch, labels, residual_scale.to(engine.config.dtype))
            loss = reach("loop.loss", scores.loss)  # (B, K)
            losses.append(loss.detach().mean(0))
            errors.append(scores.error.mean(0))
            engine.backward(average_over_tokens(loss, self.scales).mean())
            norm = engine.step(learning_rate=context.learning_rate, weight_decay=context.weight_decay)
        return self._summary(torch.stack(losses).mean(0), torch.stack(errors).mean(0)) | {"gradient_norm": norm}

    def _scores(self, batch: Batch, labels: Tensor, residual_scale: Tensor | None) -> Any:
        engine = self.engines["model"]
        with torch.no_grad():
            codes = batch.data if batch.data.ndim == 2 else self.tokenizer.encode(batch.data)  # (B, L)
            inputs = self.tokenizer.teacher_forcing_inputs(codes).to(engine.config.dtype)  # (B, L - p_1^2, C)
        logits = engine(inputs, labels, residual_scale=residual_scale)  # (B, L, V)
        return token_scores(logits, codes, self.scales)

    def _labels(self, batch: Batch) -> Tensor:
        """The labels (B,) that the model knows: an unconditional one knows the null class alone."""
        return batch.labels if self.config.is_conditional else torch.full_like(batch.labels, self.config.null_class)

    def _summary(self, loss: Tensor, error: Tensor) -> dict[str, Tensor]:
        return {
            "loss_avg": average_over_tokens(loss, self.scales),
            "loss_last": loss[-1],
            "error_avg": average_over_tokens(error, self.scales),
            "error_last": error[-1],
            "loss": loss,
            "error": error,
        }

    def window_metrics(self) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def validate(self, beat: Callable[[str], None] = lambda doing: None) -> dict[str, Any]:
        """Loss and error over the validation set, every image once, with its true label."""
        sums = torch.zeros(2, self.scales.num_scales, dtype=torch.float64, device=self.world.device)
        count = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for batch in TimedIterator(iter(self.validation()), beat):
            batch = batch.to(self.world.device)
            scores = self._scores(batch, self._labels(batch), None)
            weights = batch.weights.double()
            sums += torch.stack([weights @ scores.loss.double(), weights @ scores.error.double()])
            count += weights.sum()
        loss, error = sum_over_ranks(sums, self.world) / sum_over_ranks(count, self.world)
        return {name: value.tolist() for name, value in self._summary(loss, error).items()}

    def headline(self, record: Record) -> str:
        return (
            f"loss {record['loss_avg']:.4f} (last {record['loss_last']:.4f}) "
            f"acc {1 - record['error_avg']:.2%} (last {1 - record['error_last']:.2%})"
        )


def build_var(config: VARConfig, engine: EngineConfig, *, seed: int) -> VAR:
    """The transformer with its initial weights, a function of the seed alone, to run as `engine` says."""
    return set_up_var(VAR(config, seed=seed), engine)


def set_up_var(model: VAR, engine: EngineConfig) -> VAR:
    """The same transformer, to run as `engine` says."""
    model.attention = engine.attention
    model.checkpointing = engine.activation_checkpointing
    if engine.compile:
        model.compile_blocks()
    return model


def step_draws(seed: int, samples_seen: int, global_batch: int, count: int) -> Tensor:
    """Uniform numbers (global_batch, count) in [0, 1) for the step that starts at `samples_seen`."""
    generator = np.random.Generator(np.random.Philox(key=[seed, samples_seen]))
    return torch.from_numpy(generator.random((global_batch, count), dtype=np.float32))


def drop_labels(labels: Tensor, uniforms: Tensor, probability: float, null_class: int) -> Tensor:
    """Replace labels (B,) by the null class where uniforms (B,) fall below `probability`."""
    return torch.where(uniforms < probability, null_class, labels)


def stochastic_depth(uniforms: Tensor, rate: float) -> Tensor:
    """From uniforms (B, 2 depth) to factors (depth, 2, B): 0 for a skipped branch, 1 / keep otherwise.

    The rate grows linearly from 0 at the first block to `rate` at the last, as in the public models/var.py.
    """
    depth = uniforms.shape[1] // 2
    drop = torch.linspace(0, rate, depth, device=uniforms.device).view(depth, 1, 1)  # (depth, 1, 1)
    return (uniforms.T.reshape(depth, 2, -1) >= drop) / (1 - drop)  # (depth, 2, B)
