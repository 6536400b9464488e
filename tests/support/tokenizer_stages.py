"""Stage 1 on the tiny tokenizer: a stage with or without its opponent, and one step of it."""

from __future__ import annotations

from tiny import Batch, PlainEngine, image_batch, make_tokenizer
from torch import Tensor

from models.discriminator import PatchDiscriminator
from training.losses import ReconstructionLossConfig
from training.stage import StepContext
from training.tokenizer_loop import CodebookCareConfig, TokenizerStage

GLOBAL_BATCH = 4
PIXELS_ONLY = ReconstructionLossConfig(lpips_weight=0, adversarial_weight=0)
ADVERSARIAL = ReconstructionLossConfig(lpips_weight=0, adversarial_weight=0.4, adversarial_start=0.5)
NO_CARE = CodebookCareConfig(restart_every=0)
ALWAYS_CARE = CodebookCareConfig(restart_every=1, restart_until=1.0)


class WatchedEngine(PlainEngine):
    """Notes which gradients its model already had when its own loss arrived."""

    def backward(self, loss: Tensor) -> None:
        self.gradients_before = [p.grad for p in self.model.parameters() if p.grad is not None]
        super().backward(loss)


def make_stage(
    loss: ReconstructionLossConfig = PIXELS_ONLY,
    care: CodebookCareConfig = NO_CARE,
    *,
    accumulation: int = 1,
    validation: list[Batch] | None = None,
) -> TokenizerStage:
    model, discriminator = make_tokenizer(), None
    if loss.adversarial_weight:
        discriminator = WatchedEngine(PatchDiscriminator(8, 1), accumulation=accumulation)
    return TokenizerStage(
        PlainEngine(model, accumulation=accumulation, global_batch=GLOBAL_BATCH),
        loss,
        care,
        discriminator=discriminator,
        seed=5,
        validation=lambda: iter(validation or []),
    )


def context(progress: float = 0.0, *, samples_seen: int = 0, learning_rate: float = 0.01) -> StepContext:
    return StepContext(samples_seen=samples_seen, progress=progress, learning_rate=learning_rate, weight_decay=0.0)


def take_step(stage: TokenizerStage, where: StepContext | None = None) -> dict[str, Tensor]:
    """One step on a global batch, cut into as many micro-batches as the stage accumulates."""
    batch, size = image_batch(GLOBAL_BATCH), GLOBAL_BATCH // stage.engines["model"].accumulation
    parts = [batch.rows(slice(start, start + size)) for start in range(0, GLOBAL_BATCH, size)]
    return stage.train_step(iter(parts), where or context())
