"""Generation: guidance, top-k, top-p, seeds."""
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.autoencoder import AutoencoderConfig
from models.generation import filter_logits, generate, guidance_schedule, guide, sample_tokens
from models.quantizer import QuantizerConfig
from models.var import VAR, VARConfig
from models.vqvae import VQVAE, VQVAEConfig

CONFIG = VARConfig(depth=2, patch_nums=(1, 2, 4), vocab_size=24, code_width=4, num_classes=5)
SAMPLING = {"cfg": 2.0, "top_k": 12, "top_p": 0.9}
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1])


@pytest.fixture(scope="module")
def var() -> VAR:
    """Weights large enough for logits to differ between tokens and classes."""
    var, generator = VAR(CONFIG), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in var.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return var


@pytest.fixture(scope="module")
def tokenizer() -> VQVAE:
    torch.manual_seed(0)
    autoencoder = AutoencoderConfig(width=32, multipliers=(1, 1), num_res_blocks=1, code_width=4)
    tokenizer = VQVAE(VQVAEConfig(CONFIG.patch_nums, autoencoder, QuantizerConfig(vocab_size=24, code_width=4)))
    tokenizer.quantizer.codebook.data.normal_()
    return tokenizer


def teacher_forced_logits(var: VAR, tokenizer: VQVAE, codes: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return var(tokenizer.teacher_forcing_inputs(codes), labels)


def test_codes_are_tokens_of_every_scale(var: VAR, tokenizer: VQVAE) -> None:
    codes = generate(var, tokenizer, LABELS, seeds=range(7), **SAMPLING)
    assert codes.shape == (7, 21) and codes.dtype == torch.int64
    assert 0 <= codes.min() and codes.max() < 24
    assert tokenizer.decode(codes).shape == (7, 3, 8, 8)


def test_a_seed_gives_the_same_image_in_a_batch_of_1_and_of_7(var: VAR, tokenizer: VQVAE) -> None:
    together = generate(var, tokenizer, LABELS, seeds=torch.arange(100, 107), **SAMPLING)
    for i, label in enumerate(LABELS):
        assert torch.equal(generate(var, tokenizer, label[None], seeds=[100 + i], **SAMPLING)[0], together[i])


def test_another_seed_gives_another_image_and_the_global_seed_changes_nothing(var: VAR, tokenizer: VQVAE) -> None:
    torch.manual_seed(1)
    first = generate(var, tokenizer, LABELS, seeds=[5] * 7, **SAMPLING)
    torch.manual_seed(2)
    assert torch.equal(generate(var, tokenizer, LABELS, seeds=[5] * 7, **SAMPLING), first)
    assert not torch.equal(generate(var, tokenizer, LABELS, seeds=[6] * 7, **SAMPLING), first)
    assert torch.equal(first[0], first[5])      # the same class and the same seed


def test_without_guidance_the_null_class_does_not_matter(var: VAR, tokenizer: VQVAE) -> None:
    before = generate(var, tokenizer, LABELS, seeds=range(7), cfg=0.0)
    null_row = var.class_embedding.weight.data[CONFIG.null_class]
    kept = null_row.clone()
    null_row.add_(10.0)
    without, with_guidance = (generate(var, tokenizer, LABELS, seeds=range(7), cfg=cfg) for cfg in (0.0, 2.0))
    null_row.copy_(kept)
    assert torch.equal(without, before)
    assert not torch.equal(with_guidance, before)


def test_top_k_of_1_without_guidance_is_the_argmax_of_the_conditional_model_and_needs_no_seed(
        var: VAR, tokenizer: VQVAE) -> None:
    codes = generate(var, tokenizer, LABELS, cfg=0.0, top_k=1)
    assert torch.equal(teacher_forced_logits(var, tokenizer, codes, LABELS).argmax(dim=-1), codes)


def test_top_k_of_1_with_guidance_is_the_argmax_of_the_guided_teacher_forced_logits(var: VAR, tokenizer: VQVAE) -> None:
    codes = generate(var, tokenizer, LABELS, cfg=3.0, top_k=1)
    conditional = teacher_forced_logits(var, tokenizer, codes, LABELS)
    unconditional = teacher_forced_logits(var, tokenizer, codes, torch.full_like(LABELS, CONFIG.null_class))
    t = torch.tensor(guidance_schedule(3.0, 3))[CONFIG.scales.scale_ids()][:, None]
    assert torch.equal(((1 + t) * conditional - t * unconditional).argmax(dim=-1), codes)


def test_guidance_grows_linearly_from_0_at_the_first_scale_to_cfg_at_the_last() -> None:
    assert guidance_schedule(3.0, 4) == [0.0, 1.0, 2.0, 3.0]
    assert guidance_schedule(3.0, 1) == [0.0]


def test_no_guidance_is_the_conditional_model() -> None:
    conditional, unconditional = torch.randn(2, 5)
    assert torch.equal(guide(conditional, unconditional, 0.0), conditional)
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), 2 * conditional - unconditional)


def test_top_k_keeps_the_k_likeliest() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    assert filter_logits(logits, 2, 0.0).tolist() == [-torch.inf, 3.0, -torch.inf, 2.0]


@pytest.mark.parametrize("top_p, kept", [(0.2, {0}), (0.45, {0}), (0.55, {0, 1}), (0.75, {0, 1}), (0.85, {0, 1, 2})])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: set[int]) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    filtered = filter_logits(logits, 0, top_p)
    assert set(filtered.isfinite().nonzero().flatten().tolist()) == kept
    assert torch.equal(filtered[sorted(kept)], logits[sorted(kept)])


def test_top_p_applies_to_what_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert filter_logits(logits, 0, 0.6).isfinite().sum() == 2      # 0.4 + 0.3 reach 0.6
    assert filter_logits(logits, 2, 0.5).isfinite().sum() == 1      # 0.4 / 0.7 reaches 0.5 alone


@pytest.mark.parametrize("top_k, top_p", [(0, 0.0), (0, 1.0), (4, 0.0), (900, 1.0)])
def test_filters_that_are_off_or_wider_than_the_vocabulary_keep_everything(top_k: int, top_p: float) -> None:
    logits = torch.randn(2, 3, 4)
    assert torch.equal(filter_logits(logits, top_k, top_p), logits)


def test_tokens_are_drawn_with_their_probabilities_and_never_where_cut() -> None:
    logits = torch.tensor([0.1, 0.0, 0.6, 0.3, 0.0]).log()          # two tokens cut off, one of them the last
    uniforms = (torch.arange(10_000) + 0.5) / 10_000                # evenly spread, so counts are exact to one
    tokens = sample_tokens(logits.expand(1, 10_000, 5), uniforms[None])
    counts = tokens.flatten().bincount(minlength=5)
    torch.testing.assert_close(counts, torch.tensor([1000, 0, 6000, 3000, 0]), rtol=0, atol=1)


def test_the_extreme_uniforms_draw_the_first_and_the_last_possible_token() -> None:
    logits = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf])
    largest_below_1 = 1 - 2**-24                                    # of float32 draws
    assert sample_tokens(logits.expand(1, 2, 4), torch.tensor([[0.0, largest_below_1]])).tolist() == [[1, 2]]


def test_one_seed_per_image_is_required() -> None:
    with pytest.raises(ValueError, match="got 2 seeds for 3 images"):
        generate(VAR(CONFIG), VQVAE(tiny_tokenizer_config()), torch.zeros(3, dtype=torch.int64), seeds=[1, 2])


@pytest.mark.parametrize("change, message", [
    ({"patch_nums": (1, 2, 3, 4)}, r"patch_nums \(1, 2, 3, 4\)"), ({"vocab_size": 25}, "vocab_size 25"),
    ({"code_width": 8}, "code_width 8"),
])
def test_a_transformer_of_another_tokenizer_is_refused(tokenizer: VQVAE, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(VAR(replace(CONFIG, **change)), tokenizer, LABELS, seeds=range(7))


@pytest.mark.parametrize("change, message", [
    ({"cfg": -1.0}, "cfg -1.0"), ({"top_k": -1}, "top_k -1"), ({"top_p": 2.0}, "top_p 2.0"),
])
def test_meaningless_sampling_settings_are_refused(var: VAR, tokenizer: VQVAE, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(var, tokenizer, LABELS, seeds=range(7), **change)


def tiny_tokenizer_config() -> VQVAEConfig:
    return VQVAEConfig(CONFIG.patch_nums, AutoencoderConfig(width=32, multipliers=(1,), num_res_blocks=1, code_width=4),
                       QuantizerConfig(vocab_size=24, code_width=4))
