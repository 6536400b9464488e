"""Generation: one loop for free drawing, known tokens and editing; guidance where it is needed and nowhere else."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from drawing_models import CONFIG, LABELS, SAMPLING, decided_var, make_images, spread_tokenizer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.generation import GuidedModel, edit, generate, generate_scales, known_part
from models.sampling import Sampling
from models.var import VAR
from models.vqvae import VQVAE


@pytest.fixture(scope="module")
def var() -> VAR:
    return decided_var()


@pytest.fixture(scope="module")
def tokenizer() -> VQVAE:
    return spread_tokenizer()


def teacher_forced_logits(var: VAR, tokenizer: VQVAE, codes: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return var(tokenizer.teacher_forcing_inputs(codes), labels)


def test_a_seed_gives_the_same_image_in_a_batch_of_1_of_7_and_of_50(var: VAR, tokenizer: VQVAE) -> None:
    labels, seeds = torch.arange(50) % 5, torch.arange(100, 150)
    together = generate(var, tokenizer, labels, seeds=seeds, **SAMPLING)
    for batch in (1, 7):
        parts = [
            generate(var, tokenizer, part, seeds=part_seeds, **SAMPLING)
            for part, part_seeds in zip(labels.split(batch), seeds.split(batch))
        ]
        assert torch.equal(torch.cat(parts), together)


def test_another_seed_gives_another_image_and_the_global_seed_changes_nothing(var: VAR, tokenizer: VQVAE) -> None:
    torch.manual_seed(1)
    first = generate(var, tokenizer, LABELS, seeds=[5] * 7, **SAMPLING)
    torch.manual_seed(2)
    assert torch.equal(generate(var, tokenizer, LABELS, seeds=[5] * 7, **SAMPLING), first)
    assert not torch.equal(generate(var, tokenizer, LABELS, seeds=[6] * 7, **SAMPLING), first)
    assert torch.equal(first[0], first[5])  # the same class and the same seed


def test_without_guidance_the_null_class_does_not_matter(var: VAR, tokenizer: VQVAE) -> None:
    before = generate(var, tokenizer, LABELS, seeds=range(7), cfg=0.0)
    null_row = var.class_embedding.weight.data[CONFIG.null_class]
    kept = null_row.clone()
    null_row.add_(10.0)
    without, with_guidance = (generate(var, tokenizer, LABELS, seeds=range(7), cfg=cfg) for cfg in (0.0, 2.0))
    null_row.copy_(kept)
    assert torch.equal(without, before)
    assert not torch.equal(with_guidance, before)


def test_top_k_of_1_with_guidance_is_the_argmax_of_the_guided_teacher_forced_logits(var: VAR, tokenizer: VQVAE) -> None:
    codes = generate(var, tokenizer, LABELS, cfg=3.0, top_k=1)
    conditional = teacher_forced_logits(var, tokenizer, codes, LABELS)
    unconditional = teacher_forced_logits(var, tokenizer, codes, torch.full_like(LABELS, CONFIG.null_class))
    t = torch.tensor([0.0, 1.5, 3.0])[CONFIG.scales.scale_ids()][:, None]
    assert torch.equal(((1 + t) * conditional - t * unconditional).argmax(dim=-1), codes)


def guided_teacher_forced_logits(
    var: VAR, tokenizer: VQVAE, codes: Tensor, labels: Tensor, schedule: tuple[float, ...]
) -> Tensor:
    """What generation must have seen, computed without a cache: (B, L, V)."""
    conditional = teacher_forced_logits(var, tokenizer, codes, labels)
    unconditional = teacher_forced_logits(var, tokenizer, codes, torch.full_like(labels, var.config.null_class))
    t = torch.tensor(schedule)[var.scales.scale_ids()][:, None]
    return (1 + t) * conditional - t * unconditional


VARIANTS = {
    "adaln": {},
    "shared_adaln": {"norm": "shared_adaln"},
    "layer_norm": {"norm": "layer_norm"},
    "no_qk_norm": {"qk_norm": False},
}


@pytest.fixture(params=VARIANTS, scope="module")
def variant(request: pytest.FixtureRequest) -> VAR:
    return decided_var(replace(CONFIG, **VARIANTS[request.param]))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The guided logits of every scale, as generation sees them."""
    logits, forward = [], GuidedModel.logits
    monkeypatch.setattr(
        GuidedModel, "logits", lambda self, inputs, k: logits.append(forward(self, inputs, k)) or logits[-1]
    )
    return logits


@pytest.mark.parametrize("schedule", [(0.0, 1.5, 3.0), (0.0, 0.0, 2.0), (0.0, 2.0, 0.0), (2.0, 0.0, 1.0), (0.0,) * 3])
def test_cached_generation_equals_running_the_whole_prefix_again(
    variant: VAR, tokenizer: VQVAE, schedule: tuple[float, ...], seen: list[Tensor]
) -> None:
    """Also where guidance sets in late, pauses or ends early."""
    codes = generate_scales(variant, tokenizer, LABELS, Sampling(guidance=schedule), seeds=range(7)).codes
    expected = guided_teacher_forced_logits(variant, tokenizer, codes, LABELS, schedule)
    torch.testing.assert_close(torch.cat(seen, dim=1), expected, rtol=1e-5, atol=1e-5)


def test_cached_editing_equals_running_the_whole_prefix_again(
    variant: VAR, tokenizer: VQVAE, seen: list[Tensor]
) -> None:
    images, mask = make_images(), torch.tensor([[True, True, False, False]] * 4)
    codes = edit(variant, tokenizer, images, mask, LABELS, cfg=3.0, top_k=1)
    logits = guided_teacher_forced_logits(variant, tokenizer, codes, LABELS, (0.0, 1.5, 3.0))
    torch.testing.assert_close(torch.cat(seen, dim=1), logits, rtol=1e-5, atol=1e-5)
    known = known_part(tokenizer, images, mask, keep_coarsest=True)
    assert torch.equal(torch.where(known.mask, known.codes, logits.argmax(dim=-1)), codes)


def flops_of(var: VAR, tokenizer: VQVAE, sampling: Sampling) -> int:
    with FlopCounterMode(display=False) as counter:
        generate_scales(var, tokenizer, LABELS, sampling, seeds=range(7))
    return counter.get_total_flops()


def test_without_guidance_the_transformer_costs_half_and_scales_without_it_cost_nothing_extra(
    var: VAR, tokenizer: VQVAE
) -> None:
    decoding = sum_of_phi_flops(tokenizer)
    free, ramp, early = (
        flops_of(var, tokenizer, sampling) - decoding
        for sampling in (Sampling(cfg=0), Sampling(cfg=1.5), Sampling(guidance=(1.0, 1.0, 0.0)))
    )
    assert ramp == 2 * free - 2 * 7 * CONFIG.width * CONFIG.vocab_size  # at the first scale t is 0
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cache, classes = var.allocate_cache(7), var.class_vectors(LABELS)
        for k, tokens in enumerate(CONFIG.patch_nums[:2]):
            var.forward_scale(None if k == 0 else torch.zeros(7, tokens**2, 4), classes, k, cache)
    assert early - free == counter.get_total_flops()  # two scales of the unconditional half, not three


def test_one_image_without_a_class_takes_no_guidance_from_the_others(var: VAR, tokenizer: VQVAE) -> None:
    labels = LABELS.clone()
    labels[3] = CONFIG.null_class
    with_classes, mixed = (generate(var, tokenizer, each, cfg=3.0, seeds=range(7)) for each in (LABELS, labels))
    others = torch.arange(7) != 3
    assert torch.equal(mixed[others], with_classes[others]) and not torch.equal(mixed, with_classes)
    alone = generate(var, tokenizer, labels[3:4], cfg=0.0, seeds=[3])
    assert torch.equal(mixed[3:4], alone)


@pytest.mark.parametrize("filters", [{"top_k": 3, "top_p": 0}, {"top_k": 0, "top_p": 0.5}])
def test_smooth_mixtures_hold_no_code_that_could_not_be_drawn(tokenizer: VQVAE, filters: dict) -> None:
    var, other = VAR(CONFIG), deepcopy(tokenizer)
    torch.nn.init.zeros_(var.head.weight)
    var.head.bias.data[:3] = 3.0  # the three likeliest codes everywhere, which have three quarters of the probability
    other.quantizer.codebook.data[3:] = 100.0
    sampling = Sampling(cfg=0, smooth=True, **filters)
    maps = [generate_scales(var, each, LABELS, sampling, seeds=range(7)).f_hat for each in (tokenizer, other)]
    assert torch.equal(*maps)


def test_without_a_class_there_is_nothing_to_guide_towards_and_no_second_half(var: VAR, tokenizer: VQVAE) -> None:
    labels = torch.full_like(LABELS, CONFIG.null_class)
    flops, codes = [], []
    for cfg in (0.0, 3.0):
        with FlopCounterMode(display=False) as counter:
            codes.append(generate(var, tokenizer, labels, cfg=cfg, seeds=range(7)))
        flops.append(counter.get_total_flops())
    assert torch.equal(*codes) and flops[0] == flops[1]


@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
def test_logits_that_are_not_numbers_are_an_error_and_no_image(tokenizer: VQVAE, damage: float) -> None:
    var = VAR(CONFIG)
    var.head.bias.data[3] = damage
    with pytest.raises(ValueError, match="logits are not finite in torch.float32"):
        generate(var, tokenizer, LABELS, seeds=range(7))


def sum_of_phi_flops(tokenizer: VQVAE) -> int:
    """What adding three scales to f_hat of seven images costs."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for k, side in enumerate(CONFIG.patch_nums):
            tokenizer.quantizer.embed_scale(torch.zeros(7, side**2, dtype=torch.int64), k)
    return counter.get_total_flops()


def test_the_feature_map_is_that_of_the_codes_unless_sampling_is_smooth(var: VAR, tokenizer: VQVAE) -> None:
    plain, smooth = (
        generate_scales(var, tokenizer, LABELS, Sampling(smooth=smooth), seeds=range(7)) for smooth in (False, True)
    )
    assert torch.equal(tokenizer.decode_features(plain.f_hat), tokenizer.decode(plain.codes))
    difference = smooth.f_hat - tokenizer.quantizer.decode(smooth.codes)
    assert 0 < difference.abs().mean() < smooth.f_hat.abs().mean()


def test_an_unconditional_model_draws_with_the_null_class_as_its_only_label(tokenizer: VQVAE) -> None:
    var = decided_var(replace(CONFIG, num_classes=0))
    codes = generate(var, tokenizer, torch.zeros(3, dtype=torch.int64), cfg=0, seeds=range(3))
    guided = generate(var, tokenizer, torch.zeros(3, dtype=torch.int64), cfg=2, seeds=range(3))
    assert torch.equal(codes, guided)  # there is no class to be guided towards


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_valid_codes_close_to_the_float32_ones(tokenizer: VQVAE, dtype: torch.dtype) -> None:
    var = decided_var()
    exact = generate(var, tokenizer, LABELS, seeds=range(7), **SAMPLING)
    half = generate(var.to(dtype), tokenizer, LABELS, seeds=range(7), **SAMPLING)
    assert half.min() >= 0 and half.max() < 24
    assert (half == exact)[:, 0].all() and (half == exact).float().mean() > 0.5


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.tensor([6]), "label 6 is not one of 0 to 5, where 5 is the null class"),
        (torch.tensor([-1]), "label -1"),
        (torch.zeros(1, 1, dtype=torch.int64), r"labels have shape \(1, 1\)"),
    ],
)
def test_labels_that_the_model_does_not_know_are_refused(
    var: VAR, tokenizer: VQVAE, labels: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(var, tokenizer, labels, seeds=[0])
