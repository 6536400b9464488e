"""Stage 1's step and validation: which terms count when, who gets gradients, and how unused codes are moved."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import VQVAE_CONFIG, Batch, image_batch, make_tokenizer
from tokenizer_stages import ADVERSARIAL, ALWAYS_CARE, GLOBAL_BATCH, NO_CARE, context, make_stage, take_step
from torch import Tensor, nn
from torch.nn import functional as F

from models.vqvae import VQVAE, Reconstruction
from training.losses import ReconstructionLossConfig, pixel_loss
from training.tokenizer_loop import (
    CodebookCareConfig,
    TokenizerStage,
    build_tokenizer,
    codebook_use,
    quantization_targets,
)


class FakeLPIPS(nn.Module):
    """Per image the mean absolute difference, in the shape that LPIPS has."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return (one - other).abs().mean((1, 2, 3), keepdim=True)


def test_quantization_targets_are_what_algorithm_1_looked_up() -> None:
    model, images = make_tokenizer(), image_batch(3).data
    expected, used = [], []
    with torch.no_grad():
        residual = model.features(images)
        for k, side in enumerate(VQVAE_CONFIG.patch_nums):  # Algorithm 1, written out
            vectors = F.interpolate(residual, size=(side, side), mode="area").flatten(2).mT
            tokens = torch.cdist(vectors, model.quantizer.codebook).argmin(-1)
            residual = residual - model.quantizer.embed_scale(tokens, k)
            expected.append(vectors)
            used.append(tokens)
    codes = model.encode(images)
    assert torch.equal(codes, torch.cat(used, 1))
    # 1e-5: the same differences of float32 numbers of order 1, taken in another order
    torch.testing.assert_close(quantization_targets(model, images, codes), torch.cat(expected, 1), rtol=0, atol=1e-5)


def test_codebook_use_is_the_share_of_codes_hit_at_a_scale_and_at_any() -> None:
    hits = torch.tensor([[3, 0, 0, 0], [0, 1, 1, 0]])
    assert codebook_use(hits) == {"codebook_use": [0.25, 0.5], "codebook_use_all": 0.75}


def with_useless_codes(stage: TokenizerStage, number: int) -> Tensor:
    """Move the first codes where no feature is; the codebook before training."""
    codebook = stage.model.quantizer.codebook
    with torch.no_grad():
        codebook[:number] = 100 + torch.arange(number)[:, None]
    return codebook.detach().clone()


def test_a_restart_moves_exactly_the_unused_codes_to_vectors_that_the_quantiser_had_to_express() -> None:
    stage = make_stage(care=ALWAYS_CARE)
    before = with_useless_codes(stage, 6)
    images = image_batch(GLOBAL_BATCH).data
    codes = stage.model.encode(images)
    used, targets = codes.unique(), quantization_targets(stage.model, images, codes).flatten(0, 1)
    take_step(stage, context(learning_rate=0.0))
    moved = (stage.model.quantizer.codebook != before).any(1)
    assert moved[:6].all() and len(used) >= 2
    assert sorted(torch.cat([used, moved.nonzero().flatten()]).tolist()) == list(range(16))
    # atol: targets of other batch sizes may differ in the last bit of a convolution
    assert torch.cdist(stage.model.quantizer.codebook[:6], targets).amin(1).max() < 1e-3


def test_a_restart_does_not_depend_on_how_the_batch_is_cut() -> None:
    whole, cut = make_stage(care=ALWAYS_CARE), make_stage(care=ALWAYS_CARE, accumulation=4)
    for stage in (whole, cut):
        with_useless_codes(stage, 6)
        take_step(stage, context(learning_rate=0.0))
    torch.testing.assert_close(whole.model.quantizer.codebook, cut.model.quantizer.codebook)


def test_without_restarts_no_unused_code_moves() -> None:
    stage = make_stage(care=NO_CARE)
    before = with_useless_codes(stage, 6)
    take_step(stage)
    assert torch.equal(stage.model.quantizer.codebook[:6], before[:6])


@pytest.mark.parametrize(
    "progress, step, due",
    [(0.0, 0, True), (0.1, 100, True), (0.1, 101, False), (0.2, 200, False), (0.9, 300, False)],
)
def test_restarts_come_at_their_rhythm_while_training_is_young(progress: float, step: int, due: bool) -> None:
    care = CodebookCareConfig(restart_every=100, restart_until=0.2)
    assert care.is_due(progress, step * 768, 768) == due
    assert not CodebookCareConfig(restart_every=0).is_due(progress, step * 768, 768)


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    weights = ReconstructionLossConfig(quantization_weight=3.0, lpips_weight=0, adversarial_weight=0)
    stage, images = make_stage(weights), image_batch(GLOBAL_BATCH).data
    reconstruction = make_tokenizer()(images)
    metrics = take_step(stage)
    pixels = pixel_loss(reconstruction.images, images, weights)
    torch.testing.assert_close(metrics["pixel_loss"], pixels)
    torch.testing.assert_close(metrics["quantization_loss"], reconstruction.quantization_loss)
    torch.testing.assert_close(metrics["loss"], pixels + 3 * reconstruction.quantization_loss)
    assert not any(value.requires_grad for value in metrics.values())


def test_splitting_the_batch_changes_no_weight() -> None:
    whole, cut = make_stage(), make_stage(accumulation=2)
    one, other = take_step(whole), take_step(cut)
    torch.testing.assert_close(one["loss"], other["loss"])
    torch.testing.assert_close(one["gradient_norm"], other["gradient_norm"])
    for a, b in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_lpips_is_neither_built_nor_reported_at_weight_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.tokenizer_loop.load_lpips", lambda path: pytest.fail("LPIPS was built"))
    assert "lpips" not in take_step(make_stage())


def test_lpips_adds_its_weighted_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    paths: list[str] = []
    monkeypatch.setattr("training.tokenizer_loop.load_lpips", lambda path: paths.append(path) or FakeLPIPS())
    weights = ReconstructionLossConfig(lpips_weight=0.5, lpips_backbone="vgg.pth", adversarial_weight=0)
    metrics = take_step(make_stage(weights))
    expected = metrics["pixel_loss"] + 0.5 * metrics["lpips"] + metrics["quantization_loss"]
    assert paths == ["vgg.pth"] and metrics["lpips"] > 0
    torch.testing.assert_close(metrics["loss"], expected)


def test_before_its_start_the_adversarial_term_changes_nothing() -> None:
    plain, adversarial = make_stage(), make_stage(ADVERSARIAL)
    take_step(plain)
    metrics = take_step(adversarial, context(0.49))
    assert metrics["adversarial_loss"] == metrics["discriminator_loss"] == 0
    assert adversarial.discriminator.updates == 0
    for a, b in zip(plain.model.parameters(), adversarial.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_from_its_start_both_players_take_one_step_each(accumulation: int) -> None:
    stage = make_stage(ADVERSARIAL, accumulation=accumulation)
    metrics = take_step(stage, context(0.5))
    assert metrics["discriminator_loss"] > 0
    assert (stage.engines["model"].updates, stage.discriminator.updates) == (1, 1)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_splitting_the_batch_changes_no_weight_while_the_players_play(accumulation: int) -> None:
    """The adaptive weight is that of the whole batch; taken of each part, it would be another one."""
    whole, cut = make_stage(ADVERSARIAL), make_stage(ADVERSARIAL, accumulation=accumulation)
    for step in range(3):
        where = context(0.5, samples_seen=step * GLOBAL_BATCH, learning_rate=1e-4)
        one, other = take_step(whole, where), take_step(cut, where)
        for name in ("gradient_norm", "loss", "adversarial_loss", "discriminator_loss"):
            assert one[name].item() == pytest.approx(other[name].item(), rel=1e-4), (step, name)
    assert parameters_close(whole.model, cut.model)


def parameters_close(one: VQVAE, other: VQVAE) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs)


def test_metrics_keep_their_names_when_the_adversarial_term_starts() -> None:
    stage = make_stage(ADVERSARIAL)
    assert take_step(stage, context(0.0)).keys() == take_step(stage, context(0.9)).keys()


def test_the_adversarial_term_makes_reconstructions_look_more_real_to_the_same_judge() -> None:
    stage = make_stage(replace(ADVERSARIAL, adversarial_weight=10.0))  # so that it outweighs the pixel loss
    stage.discriminator.step = lambda **options: torch.tensor(0.0)  # a judge that does not learn
    images, judge = image_batch(GLOBAL_BATCH).data, stage.discriminator.model
    before = judge(stage.model(images).images).mean()
    take_step(stage, context(0.9))
    assert judge(stage.model(images).images).mean() > before  # high logits stand for real images


def test_neither_player_gets_a_gradient_from_the_others_loss() -> None:
    stage = make_stage(ADVERSARIAL)
    take_step(stage, context(0.9))
    assert stage.discriminator.gradients_before == []
    assert all(parameter.requires_grad for parameter in stage.discriminator.model.parameters())
    assert all(parameter.grad is None for parameter in stage.model.parameters())  # cleared by its own step before


def test_the_window_counts_codes_since_the_last_look() -> None:
    stage = make_stage()
    take_step(stage)
    use = stage.window_metrics()
    codes = make_tokenizer().encode(image_batch(GLOBAL_BATCH).data)
    assert use["codebook_use_all"] == len(codes.unique()) / 16
    assert use["codebook_use"] == [len(codes[:, :1].unique()) / 16, len(codes[:, 1:].unique()) / 16]
    assert stage.window_metrics()["codebook_use_all"] == 0


def validated(stage: TokenizerStage, monkeypatch: pytest.MonkeyPatch, *, offset: float) -> dict[str, Any]:
    """Validate a model that is off by `offset` everywhere and gives code i to image i."""

    def forward(images: Tensor) -> Reconstruction:
        codes = (images[:, 0, 0, 0] * 10).round().long()[:, None].expand(-1, 5)
        return Reconstruction(images + offset, codes, torch.zeros(()))

    monkeypatch.setattr(stage.model, "forward", forward)
    return stage.validate()


def flat_images(*values: float) -> Batch:
    images = torch.tensor(values)[:, None, None, None].expand(-1, 3, 8, 8)
    return Batch(images, torch.zeros(len(values)), torch.arange(len(values)), torch.ones(len(values)))


def test_psnr_is_averaged_over_images_not_over_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    # at 0.9, clamping to 1 leaves an error of 0.1: 26.02 dB
    batches = [flat_images(0.1, 0.2, 0.3), flat_images(0.9)]
    found = validated(make_stage(validation=batches), monkeypatch, offset=0.2)
    assert found["psnr"] == pytest.approx((3 * 20 + 20 * math.log10(2 / 0.1)) / 4)


def test_padding_counts_neither_in_the_error_nor_in_the_codes_used(monkeypatch: pytest.MonkeyPatch) -> None:
    padded = flat_images(0.1, 0.9).with_weights(1, 0)
    found = validated(make_stage(validation=[padded]), monkeypatch, offset=0.2)
    assert found["psnr"] == pytest.approx(20)
    assert found["codebook_use_all"] == 1 / 16


def test_training_goes_on_in_training_mode_after_a_validation() -> None:
    stage = make_stage(validation=[image_batch(2)])
    stage.validate()
    assert not stage.model.training
    take_step(stage)
    assert stage.model.training


def test_the_initial_weights_are_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = build_tokenizer(VQVAE_CONFIG, seed=3)
    untouched = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), untouched)  # the global generator is as it was
    torch.manual_seed(2)
    same, other = build_tokenizer(VQVAE_CONFIG, seed=3), build_tokenizer(VQVAE_CONFIG, seed=4)
    assert parameters_equal(one, same) and not parameters_equal(one, other)


def parameters_equal(one: VQVAE, other: VQVAE) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
