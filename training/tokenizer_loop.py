"""Stage 1: the multi-scale VQVAE learns to reconstruct (eq. 5). One optimiser step, and validation.

B images, L tokens, K scales, V vocabulary, C code width. LPIPS and the adversarial term are switches of the loss
config. The arithmetic runs in float32: the nearest-code search does not survive less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.vqvae import VQVAE, Reconstruction, VQVAEConfig
from training.engine.distributed import sum_over_ranks
from training.engine.engine import Engine
from training.flops import tokenizer_training_flops
from training.losses import (
    ReconstructionLossConfig,
    adaptive_weight,
    hinge_discriminator_loss,
    last_layer_gradients,
    load_lpips,
    pixel_loss,
)
from training.stage import Batch, StepContext
from training.step_metrics import TimedIterator
from training.tracking.record import Record


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Size of the patch discriminator; it exists only with loss.adversarial_weight above 0."""

    width: int = 64
    num_layers: int = 3


@dataclass(frozen=True)
class CodebookCareConfig:
    """Codes that nothing maps to are moved to where features are, while training is young. 0 steps switches it off.

    Not in the paper; without it the coarse scales of a codebook trained from scratch collapse (Infinity issue 80).
    """

    restart_every: int = 100  # steps
    restart_until: float = 0.2  # share of the run

    def is_due(self, step_progress: float, samples_seen: int, global_batch: int) -> bool:
        """Tell whether the step that starts at a stream position ends with a restart of unused codes."""
        if self.restart_every == 0 or step_progress >= self.restart_until:
            return False
        return (samples_seen // global_batch) % self.restart_every == 0


@dataclass(frozen=True)
class SeenImages:
    """One micro-batch of a step: the images' numbers in the global batch (B,), images (B, 3, H, H), codes (B, L)."""

    numbers: Tensor
    images: Tensor
    codes: Tensor


def build_tokenizer(config: VQVAEConfig, *, seed: int) -> VQVAE:
    """Make the tokenizer with its initial weights, a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VQVAE(config)


class TokenizerStage:
    """Stage 1 for `training.loop.Loop`: `engine` drives a VQVAE, `discriminator` its opponent.

    Without the adversarial term the discriminator is None.
    """

    def __init__(
        self,
        engine: Engine,
        loss: ReconstructionLossConfig,
        care: CodebookCareConfig,
        *,
        discriminator: Engine | None,
        seed: int,
        validation: Callable[[], Iterable[Batch]],
    ) -> None:
        """validation: starts a pass over this rank's validation images."""
        self.engine = engine
        self.model: VQVAE = engine.model
        self.discriminator = discriminator
        self.engines = {"model": engine} | ({"discriminator": discriminator} if discriminator else {})
        self.world = engine.world
        self.loss = loss
        self.care = care
        self.seed = seed
        self.validation = validation
        self.lpips = load_lpips(loss.lpips_backbone).to(self.world.device) if loss.lpips_weight else None
        self.flops_per_image = tokenizer_training_flops(self.model.config)
        self.tokens_per_image = self.model.scales.num_tokens
        self._hits = self._no_hits()

    def train_step(self, batches: Iterator[Batch], context: StepContext) -> dict[str, Tensor]:
        """Take one optimiser step; see `Stage.train_step`."""
        self.engine.train()
        opponent = self.discriminator if context.progress >= self.loss.adversarial_start else None
        restarting = self.care.is_due(context.progress, context.samples_seen, self.engine.global_batch)
        hits = self._no_hits()
        parts: list[dict[str, Tensor]] = []
        seen: list[SeenImages] = []
        whole = [next(batches) for _ in range(self.engine.accumulation)]
        balance = self._balance_of_parts(whole, opponent) if opponent is not None and len(whole) > 1 else None
        for batch in whole:
            images = batch.to(self.world.device).data  # (B, 3, H, H)
            reconstruction = self.engine(images)
            parts.append(self._backward(images, reconstruction, opponent, balance))
            norm = self.engine.step(learning_rate=context.learning_rate, weight_decay=context.weight_decay)
            if self.discriminator is not None:
                parts[-1] |= self._train_opponent(opponent, images, reconstruction.images.detach(), context)
            self._count(reconstruction.codes, hits)
            if restarting:  # the images of a whole step are kept only then
                seen.append(SeenImages(batch.positions - context.samples_seen, images, reconstruction.codes))
        self._hits += hits
        if restarting:
            self._restart_unused(seen, hits, context)
        means = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        return means | {"gradient_norm": norm}

    def _likeness(self, images: Tensor, reconstruction: Reconstruction) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the terms of the loss that compare a micro-batch with its reconstruction: their sum, and each, ()."""
        parts = {"pixel_loss": pixel_loss(reconstruction.images, images, self.loss)}
        loss = parts["pixel_loss"]
        if self.lpips is not None:
            parts["lpips"] = self.lpips(reconstruction.images, images).mean()
            loss = loss + self.loss.lpips_weight * parts["lpips"]
        return loss, parts

    def _gradients(self, likeness: Tensor, adversarial_loss: Tensor) -> Tensor:
        return last_layer_gradients(likeness, adversarial_loss, self.model.decoder.last_layer)

    def _balance(self, gradients: Tensor) -> Tensor:
        """Compute the adaptive weight, (), from this rank's mean gradients: the same on all ranks. A collective."""
        mean = sum_over_ranks(gradients, self.world) / self.world.world_size
        return adaptive_weight(mean, self.loss.adaptive_weight_limit)

    def _balance_of_parts(self, whole: list[Batch], opponent: Engine) -> Tensor:
        """Compute the adaptive weight of a step that is cut into micro-batches, by a forward pass of its own.

        The weight belongs to the whole global batch, and is needed before the first part is propagated.
        """
        total: Tensor | None = None
        for batch in whole:
            images = batch.to(self.world.device).data
            reconstruction = self.model(images)
            likeness, _ = self._likeness(images, reconstruction)
            gradients = self._gradients(likeness, -judge(opponent, reconstruction.images).mean()) / len(whole)
            total = gradients if total is None else total + gradients
        assert total is not None
        return self._balance(total)

    def _backward(
        self, images: Tensor, reconstruction: Reconstruction, opponent: Engine | None, balance: Tensor | None
    ) -> dict[str, Tensor]:
        """Propagate the loss of eq. 5 of one micro-batch; returns its terms, (). Without an opponent that one is 0.

        balance: the adaptive weight, if it is known already.
        """
        loss, parts = self._likeness(images, reconstruction)
        parts["quantization_loss"] = reconstruction.quantization_loss
        if opponent is not None:
            parts["adversarial_loss"] = -judge(opponent, reconstruction.images).mean()
            if balance is None:
                balance = self._balance(self._gradients(loss, parts["adversarial_loss"]))
            loss = loss + self.loss.adversarial_weight * balance * parts["adversarial_loss"]
        elif self.discriminator is not None:
            parts["adversarial_loss"] = torch.zeros((), device=self.world.device)
        loss = loss + self.loss.quantization_weight * reconstruction.quantization_loss
        self.engine.backward(loss)
        return {"loss": loss.detach()} | {name: value.detach() for name, value in parts.items()}

    def _train_opponent(
        self, opponent: Engine | None, images: Tensor, fakes: Tensor, context: StepContext
    ) -> dict[str, Tensor]:
        """Let the opponent tell images from reconstructions; its loss is 0 while it does not take part."""
        if opponent is None:
            return {"discriminator_loss": torch.zeros((), device=self.world.device)}
        real_logits, fake_logits = opponent(torch.cat([images, fakes])).chunk(2)
        loss = hinge_discriminator_loss(real_logits, fake_logits)
        opponent.backward(loss)
        opponent.step(learning_rate=context.learning_rate, weight_decay=context.weight_decay)
        return {"discriminator_loss": loss.detach()}

    def _restart_unused(self, seen: list[SeenImages], hits: Tensor, context: StepContext) -> None:
        """Move every code that this global batch did not use to a vector that the quantiser had to express.

        The vectors are drawn from the whole global batch; the rank that has an image supplies its vectors. They belong
        to the codes of before this step's update, which is near enough for a fresh start.
        """
        unused = (sum_over_ranks(hits, self.world).sum(0) == 0).nonzero().flatten()  # (n,)
        if len(unused) == 0:
            return
        generator = np.random.Generator(np.random.Philox(key=[self.seed, context.samples_seen]))
        images = torch.from_numpy(generator.integers(self.engine.global_batch, size=len(unused)))
        tokens = torch.from_numpy(generator.integers(self.tokens_per_image, size=len(unused)))
        codebook = self.engine.state.get_weight(self.model.quantizer.codebook).clone()
        vectors = torch.zeros_like(codebook[unused])  # (n, C)
        for part in seen:
            wanted, rows = (images[:, None] == part.numbers[None, :]).nonzero(as_tuple=True)
            if len(wanted):
                targets = quantization_targets(self.model, part.images, part.codes)  # (B, L, C)
                vectors[wanted.to(vectors.device)] = targets[rows, tokens[wanted]]
        codebook[unused] = sum_over_ranks(vectors, self.world)
        self.engine.state.set_weight(self.model.quantizer.codebook, codebook)

    def _no_hits(self) -> Tensor:
        size = self.model.scales.num_scales, self.model.config.quantizer.vocab_size
        return torch.zeros(size, dtype=torch.int64, device=self.world.device)

    def _count(self, codes: Tensor, hits: Tensor) -> None:
        for of_scale, tokens in zip(hits, self.model.scales.split(codes), strict=True):
            of_scale.scatter_add_(0, tokens.flatten(), torch.ones_like(tokens).flatten())  # on a GPU bincount waits

    def window_metrics(self) -> dict[str, Any]:
        """Return the share of the codebook that each scale has used since the last call. A collective."""
        hits = sum_over_ranks(self._hits, self.world)
        self._hits = self._no_hits()
        return codebook_use(hits)

    @torch.no_grad()
    def validate(self, beat: Callable[[str], None] = lambda doing: None) -> dict[str, Any]:
        """Measure squared error, PSNR and codebook use over the validation set, every image once. A collective."""
        self.engine.train(False)
        sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)  # squared error, PSNR, images
        hits = self._no_hits()
        for batch in TimedIterator(iter(self.validation()), beat):
            batch = batch.to(self.world.device)
            reconstruction = self.engine(batch.data)
            error = (reconstruction.images.clamp(-1, 1) - batch.data).square().mean((1, 2, 3)).double()  # (B,)
            psnr = 10 * torch.log10(4 / error.clamp(min=1e-10))  # images span 2
            weights = batch.weights.double()
            sums += torch.stack([weights @ error, weights @ psnr, weights.sum()])
            self._count(reconstruction.codes[batch.weights > 0], hits)
        squared_error, psnr, count = sum_over_ranks(sums, self.world).tolist()
        use = codebook_use(sum_over_ranks(hits, self.world))
        return {"squared_error": squared_error / count, "psnr": psnr / count} | use

    def headline(self, record: Record) -> str:
        """Write the stage's part of a progress line; see `Stage.headline`."""
        if record["kind"] == "validation":
            return f"psnr {record['psnr']:.2f} dB | codes in use {record['codebook_use_all']:.0%}"
        return f"loss {record['loss']:.4f} (pixels {record['pixel_loss']:.4f} codes {record['quantization_loss']:.4f})"


def judge(discriminator: Engine, images: Tensor) -> Tensor:
    """Return the discriminator's logits (B, 1, h, w), without leaving gradients in the discriminator."""
    network: nn.Module = discriminator.model
    network.requires_grad_(False)
    logits = network(images)
    network.requires_grad_(True)
    return logits


def codebook_use(hits: Tensor) -> dict[str, Any]:
    """Return the share of the V codes used at each scale, and at any: hits (K, V) int64 -> metrics."""
    return {
        "codebook_use": (hits > 0).double().mean(1).tolist(),
        "codebook_use_all": (hits.sum(0) > 0).double().mean().item(),
    }


@torch.no_grad()
def quantization_targets(model: VQVAE, images: Tensor, codes: Tensor) -> Tensor:
    """Return the vectors (B, L, C) that Algorithm 1 replaced by `codes`: the downsampled residual of every scale.

    Downsampling is linear, so each is downsample(f) minus the teacher-forcing input of its scale.
    """
    features = model.features(images)  # (B, C, h, w)
    pyramid = [model.quantizer.downsample(features, side).flatten(2).mT for side in model.scales.patch_nums]
    targets = torch.cat(pyramid, dim=1)  # (B, L, C)
    targets[:, model.scales.first_tokens :] -= model.teacher_forcing_inputs(codes)
    return targets
