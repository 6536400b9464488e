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
from training.engine.distributed import sum_over_ranks, to_device
from training.engine.engine import Engine, EngineConfig
from training.flops import training_flops
from training.losses import TokenScores, average_over_tokens, token_scores
from training.stage import Batch, StepContext
from training.step_metrics import TimedIterator
from training.tracking.record import Record


class VARStage:
    """Stage 2 for `training.loop.Loop`: `engine` drives a VAR, and a frozen tokenizer makes its inputs from codes."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: VQVAE,
        *,
        label_drop: float,
        seed: int,
        validation: Callable[[], Iterable[Batch]],
    ) -> None:
        """label_drop: the probability of the null class. validation: starts a pass over this rank's validation data."""
        self.engine = engine
        self.engines = {"model": engine}
        self.config: VARConfig = engine.model.config
        self.scales = self.config.scales
        self.tokenizer = tokenizer
        self.label_drop = label_drop
        self.seed = seed
        self.validation = validation
        self.flops_per_image = training_flops(self.config)
        self.tokens_per_image = self.scales.num_tokens

    def train_step(self, batches: Iterator[Batch], context: StepContext) -> dict[str, Tensor]:
        """Take one optimiser step; see `Stage.train_step`."""
        draws = step_draws(self.seed, context.samples_seen, self.engine.global_batch, 1 + 2 * self.config.depth)
        losses, errors = [], []
        for _ in range(self.engine.accumulation):
            batch = next(batches)
            rows = to_device(
                draws[batch.positions - context.samples_seen], self.engine.world.device
            )  # (B, 1 + 2 depth)
            batch = batch.to(self.engine.world.device)
            labels = drop_labels(self._labels(batch), rows[:, 0], self.label_drop, self.config.null_class)
            residual_scale = stochastic_depth(rows[:, 1:], self.config.drop_path_rate)
            dtype = self.engine.config.dtype
            scores = self._scores(self.engine, dtype, batch, labels, residual_scale.to(dtype))
            losses.append(scores.loss.detach().mean(0))
            errors.append(scores.error.mean(0))
            self.engine.backward(average_over_tokens(scores.loss, self.scales).mean())
            norm = self.engine.step(learning_rate=context.learning_rate, weight_decay=context.weight_decay)
        return self._summary(torch.stack(losses).mean(0), torch.stack(errors).mean(0)) | {"gradient_norm": norm}

    def _scores(
        self,
        model: Callable[..., Tensor],
        dtype: torch.dtype,
        batch: Batch,
        labels: Tensor,
        residual_scale: Tensor | None = None,
    ) -> TokenScores:
        """Score a model of a type on one micro-batch; residual_scale (depth, 2, B) is for stochastic depth."""
        with torch.no_grad():
            codes = batch.data if batch.data.ndim == 2 else self.tokenizer.encode(batch.data)  # (B, L)
            inputs = self.tokenizer.teacher_forcing_inputs(codes).to(dtype)  # (B, L - p_1^2, C)
        logits = model(inputs, labels, residual_scale=residual_scale)  # (B, L, V)
        return token_scores(logits, codes, self.scales)

    def _labels(self, batch: Batch) -> Tensor:
        """Return the labels (B,) that the model knows: an unconditional one knows the null class alone."""
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
        """Return no metrics; see `Stage.window_metrics`."""
        return {}

    @torch.no_grad()
    def validate(self, beat: Callable[[str], None] = lambda doing: None) -> dict[str, Any]:
        """Measure loss and error over the validation set, every image once, with its true label. A collective.

        Whatever precision trains, the weights are the float32 ones and so is the arithmetic, as in the public trainer.
        """
        model = self.engine if self.engine.config.dtype == torch.float32 else self._float32_model()
        sums = torch.zeros(2, self.scales.num_scales, dtype=torch.float64, device=self.engine.world.device)
        count = torch.zeros((), dtype=torch.float64, device=self.engine.world.device)
        for batch in TimedIterator(iter(self.validation()), beat):
            batch = batch.to(self.engine.world.device)
            scores = self._scores(model, torch.float32, batch, self._labels(batch))
            weights = batch.weights.double()
            sums += torch.stack([weights @ scores.loss.double(), weights @ scores.error.double()])
            count += weights.sum()
        loss, error = sum_over_ranks(sums, self.engine.world) / sum_over_ranks(count, self.engine.world)
        return {name: value.tolist() for name, value in self._summary(loss, error).items()}

    def _float32_model(self) -> VAR:
        """Return a copy of the model on this rank, whole, with the optimiser's float32 weights. A collective."""
        with torch.device("meta"):
            model = VAR(self.config)
        weights = self.engine.state.weights()
        whole = {name: tensor.to(self.engine.world.device, copy=True) for name, tensor in weights}
        model.load_state_dict(whole, assign=True)
        model.attention = self.engine.config.attention
        return model.eval().requires_grad_(False)

    def headline(self, record: Record) -> str:
        """Write the stage's part of a progress line; see `Stage.headline`."""
        return (
            f"loss {record['loss_avg']:.4f} (last {record['loss_last']:.4f}) "
            f"acc {1 - record['error_avg']:.2%} (last {1 - record['error_last']:.2%})"
        )


def build_var(config: VARConfig, engine: EngineConfig, *, seed: int) -> VAR:
    """Make the transformer with its initial weights, a function of the seed alone, to run as `engine` says."""
    return set_up_var(VAR(config, seed=seed), engine)


def set_up_var(model: VAR, engine: EngineConfig) -> VAR:
    """Set how the transformer runs: attention, activation checkpointing, compilation; returns the same model."""
    model.attention = engine.attention
    model.checkpointing = engine.activation_checkpointing
    if engine.compile:
        model.compile_blocks()
    return model


def step_draws(seed: int, samples_seen: int, global_batch: int, count: int) -> Tensor:
    """Draw uniform numbers (global_batch, count) float32 in [0, 1) for the step that starts at `samples_seen`."""
    generator = np.random.Generator(np.random.Philox(key=[seed, samples_seen]))
    return torch.from_numpy(generator.random((global_batch, count), dtype=np.float32))


def drop_labels(labels: Tensor, uniforms: Tensor, probability: float, null_class: int) -> Tensor:
    """Replace labels (B,) by the null class where uniforms (B,) fall below `probability`."""
    return torch.where(uniforms < probability, null_class, labels)


def stochastic_depth(uniforms: Tensor, rate: float) -> Tensor:
    """Turn uniforms (B, 2 depth) into factors (depth, 2, B) of residual branches: 0 if skipped, 1 / keep otherwise.

    The rate grows linearly from 0 at the first block to `rate` at the last, as in the public models/var.py.
    """
    depth = uniforms.shape[1] // 2
    drop = torch.linspace(0, rate, depth, device=uniforms.device).view(depth, 1, 1)  # (depth, 1, 1)
    return (uniforms.T.reshape(depth, 2, -1) >= drop) / (1 - drop)  # (depth, 2, B)
