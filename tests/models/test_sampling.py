"""Guidance, top-k, top-p, and the noise of an image: a function of seed, token and code alone."""

import math

import pytest
import torch
from torch import Tensor

from models import sampling
from models.sampling import (
    Sampling,
    choose_tokens,
    filter_logits,
    find_candidates,
    guide,
    gumbel_noise,
    image_seeds,
    smooth_code_vectors,
    splitmix64,
)


def test_a_strength_for_every_scale_takes_the_place_of_the_ramp() -> None:
    assert Sampling(cfg=3.0).schedule(4) == (0.0, 1.0, 2.0, 3.0)
    assert Sampling(cfg=3.0, guidance=(0.0, 2.0, 0.0)).schedule(3) == (0.0, 2.0, 0.0)
    with pytest.raises(ValueError, match="has 3 strengths, the model 4 scales"):
        Sampling(guidance=(0.0, 2.0, 0.0)).schedule(4)


def test_no_guidance_is_the_conditional_model() -> None:
    conditional, unconditional = torch.randn(2, 5)
    assert torch.equal(guide(conditional, unconditional, 0.0), conditional)
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), 2 * conditional - unconditional)


@pytest.mark.parametrize("top_p, kept", [(0.2, {0}), (0.45, {0}), (0.55, {0, 1}), (0.75, {0, 1}), (0.85, {0, 1, 2})])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: set[int]) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    filtered = filter_logits(logits, 0, top_p)
    assert set(filtered.isfinite().nonzero().flatten().tolist()) == kept
    assert torch.equal(filtered[sorted(kept)], logits[sorted(kept)])


def test_top_p_applies_to_what_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert filter_logits(logits, 0, 0.6).isfinite().sum() == 2  # 0.4 + 0.3 reach 0.6
    assert filter_logits(logits, 2, 0.5).isfinite().sum() == 1  # 0.4 / 0.7 reaches 0.5 alone


def plainly_filtered(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """What `filter_logits` and `choose_tokens` must be equal to, with all codes sorted and all noise drawn."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], -torch.inf)
    if 0 < top_p < 1:
        ascending, order = logits.sort(dim=-1, stable=True)
        is_cut = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        is_cut[..., -1] = False
        logits = logits.masked_fill(is_cut.scatter(-1, order, is_cut), -torch.inf)
    return logits


LOGITS = {
    "any": lambda x: x,
    "many_alike": lambda x: x.round(),
    "all_alike": lambda x: 0 * x,
    "bfloat16": lambda x: x.bfloat16().float(),
    "few": lambda x: x.masked_fill(x < 2, -torch.inf).index_fill(-1, torch.tensor([0]), 1.0),
}


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize(
    "top_k, top_p", [(0, 0.0), (0, 0.3), (1, 0.96), (2, 1.0), (50, 0.001), (50, 0.96), (98, 0.9999), (99, 0.3)]
)
def test_filters_and_draws_are_to_the_last_bit_those_of_sorting_everything(kind: str, top_k: int, top_p: float) -> None:
    drawn = 3 * torch.randn(4, 6, 99, generator=torch.Generator().manual_seed(0))
    logits, seeds, tokens = LOGITS[kind](drawn), torch.arange(4), slice(9, 15)
    plain = plainly_filtered(logits, top_k, top_p)
    assert torch.equal(filter_logits(logits, top_k, top_p), plain)
    chosen = (plain + gumbel_noise(seeds, tokens, 99)).argmax(dim=-1)
    assert torch.equal(choose_tokens(logits, seeds, tokens, top_k=top_k, top_p=top_p), chosen)


def test_with_top_k_no_row_is_sorted_and_no_noise_is_drawn_for_codes_that_are_cut() -> None:
    logits = torch.randn(2, 3, 500, generator=torch.Generator().manual_seed(0))
    assert find_candidates(logits, 40, 0.0).codes.shape == (2, 3, 40)
    assert find_candidates(logits, 40, 0.5).codes.shape[-1] < 40


@pytest.mark.parametrize("kind", ["any", "bfloat16"])
def test_a_host_looks_at_no_result_but_whether_more_codes_tie_than_were_looked_at(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look waits for a GPU."""
    looks = []
    monkeypatch.setattr(sampling, "_without_empty_columns", lambda found: found)  # which is for CPUs alone
    for name in ("__bool__", "__int__", "item"):
        monkeypatch.setattr(Tensor, name, lambda self, name=name: looks.append(name) or False)
    logits = LOGITS[kind](3 * torch.randn(2, 6, 4096, generator=torch.Generator().manual_seed(0)))
    choose_tokens(logits, torch.arange(2), slice(9, 15), top_k=900, top_p=0.96)
    assert looks == ["__bool__"]


@pytest.mark.parametrize("top_k", [0, 3])
def test_logits_that_are_not_numbers_still_give_codes_of_the_vocabulary(top_k: int) -> None:
    """They are refused once the image is done, in one place."""
    tokens = choose_tokens(torch.full((1, 2, 9), torch.nan), torch.tensor([0]), slice(0, 2), top_k=top_k, top_p=0.9)
    assert tokens.min() >= 0 and tokens.max() < 9


@pytest.mark.parametrize("vocab_size", [1, 7, 8, 33, 4096])
def test_noise_of_some_codes_is_that_of_all_at_these_codes(vocab_size: int) -> None:
    seeds, tokens = torch.tensor([3, 2**60]), slice(2, 5)
    codes = torch.randint(vocab_size, (2, 3, 11), generator=torch.Generator().manual_seed(0))
    everything = gumbel_noise(seeds, tokens, vocab_size)
    assert torch.equal(gumbel_noise(seeds, tokens, vocab_size, codes=codes), everything.gather(-1, codes))


def draw(probabilities: list[float], number: int) -> Tensor:
    """One token for each of `number` images with seeds 0, 1, 2, ..., all with the same probabilities: (number,)."""
    logits = torch.tensor(probabilities).log().expand(number, 1, len(probabilities))
    return choose_tokens(logits, torch.arange(number), slice(3, 4)).squeeze(1)


def test_tokens_are_drawn_with_their_probabilities_and_never_where_cut() -> None:
    probabilities, number = [0.1, 0.0, 0.6, 0.3, 0.0], 40_000
    shares = draw(probabilities, number).bincount(minlength=5) / number
    assert shares[1] == 0 and shares[4] == 0
    # five standard deviations of a share of 0.6 or less among 40,000
    assert (shares - torch.tensor(probabilities)).abs().max() < 5 * math.sqrt(0.6 * 0.4 / number)


def test_without_seeds_the_likeliest_token_is_taken() -> None:
    assert choose_tokens(torch.tensor([[[0.0, 2.0, 1.0]]]), None, slice(0, 1)).tolist() == [[1]]


def test_noise_has_the_moments_of_a_gumbel_distribution_and_no_two_numbers_are_alike() -> None:
    noise = gumbel_noise(torch.arange(20), slice(0, 50), 200)
    assert noise.shape == (20, 50, 200) and noise.dtype == torch.float32 and noise.isfinite().all()
    assert abs(noise.mean() - 0.5772) < 0.015  # Euler's constant; 5 sigma = 0.0143
    assert abs(noise.std() - math.pi / math.sqrt(6)) < 0.02
    assert noise.unique().numel() > 0.98 * noise.numel()  # 200,000 draws of 2^23 values


def test_noise_of_neighbouring_seeds_tokens_and_codes_is_uncorrelated() -> None:
    noise = gumbel_noise(torch.arange(40), slice(0, 40), 40)
    noise = noise - noise.mean()
    for dimension in range(3):
        shifted = noise.roll(1, dims=dimension)
        assert abs((noise * shifted).mean() / noise.square().mean()) < 5 / math.sqrt(noise.numel())


def test_noise_depends_on_seed_and_place_alone() -> None:
    together = gumbel_noise(torch.tensor([5, 9, 2**62]), slice(0, 7), 11)
    assert torch.equal(gumbel_noise(torch.tensor([9]), slice(3, 6), 11), together[1:2, 3:6])
    assert torch.equal(gumbel_noise(torch.tensor([2**62]), slice(0, 7), 11), together[2:])


def test_noise_taken_in_turns_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, seeds, codebook = torch.randn(5, 3, 8), torch.arange(5), torch.randn(8, 4)
    tokens = choose_tokens(logits, seeds, slice(0, 3))
    vectors = smooth_code_vectors(logits, seeds, slice(0, 3), codebook, progress=0.5)
    monkeypatch.setattr(sampling, "MAX_NUMBERS_ON_CPU", 2 * 3 * 8)
    assert torch.equal(choose_tokens(logits, seeds, slice(0, 3)), tokens)
    assert torch.equal(smooth_code_vectors(logits, seeds, slice(0, 3), codebook, progress=0.5), vectors)


def test_the_mixing_function_is_that_of_splitmix64() -> None:
    def exact(x: int) -> int:
        mask = 2**64 - 1
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    assert exact(0) == 0xE220A8397B1DCDAF  # the published first output of seed 0
    for value in (0, 1, 2**31, 2**63 - 1):
        assert splitmix64(torch.tensor(value)).item() % 2**64 == exact(value)


def test_smoothing_mixes_codes_and_sharpens_towards_the_drawn_one() -> None:
    logits, seeds, codebook = torch.randn(400, 1, 6), torch.arange(400), torch.eye(6)
    tokens = choose_tokens(logits, seeds, slice(0, 1))
    early, late = (
        smooth_code_vectors(logits, seeds, slice(0, 1), codebook, progress=progress) for progress in (0.0, 1.0)
    )  # rows are the shares of the codes
    torch.testing.assert_close(early.sum(-1), torch.ones(400, 1))
    assert torch.equal(early.argmax(-1), tokens)  # at first the same noise picks the same code
    assert early.amax(-1).mean() < 0.97 < late.amax(-1).mean()


@pytest.mark.parametrize(
    "progress, sharpening, temperature",
    [
        (0.0, 1.0, 0.27),
        (0.5, 1.5, 0.14175),
        (1.0, 2.0, 0.0135),
    ],
)
def test_smoothing_is_a_gumbel_softmax_with_the_published_constants(
    progress: float, sharpening: float, temperature: float
) -> None:
    logits, seeds, codebook = torch.randn(3, 2, 5), torch.arange(3), torch.randn(5, 4)
    noise = gumbel_noise(seeds, slice(7, 9), 5)
    mixed = smooth_code_vectors(logits, seeds, slice(7, 9), codebook, progress=progress)
    expected = ((sharpening * logits + noise) / temperature).softmax(dim=-1) @ codebook
    torch.testing.assert_close(mixed, expected)


def test_smoothing_without_chance_takes_the_likeliest_code_and_never_one_that_is_cut() -> None:
    codebook = torch.randn(3, 4)
    logits = torch.tensor([[[-torch.inf, 1.0, 0.0]]])
    assert torch.equal(smooth_code_vectors(logits, None, slice(0, 1), codebook, progress=0.0)[0, 0], codebook[1])
    shares = smooth_code_vectors(logits.expand(50, 1, 3), torch.arange(50), slice(0, 1), torch.eye(3), progress=0.3)
    assert (shares[..., 0] == 0).all() and shares.isfinite().all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cfg": -1.0}, "cfg -1.0"),
        ({"cfg": math.nan}, "cfg nan"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 2.0}, "top_p 2.0"),
        ({"guidance": (0.0, -1.0)}, r"guidance \(0.0, -1.0\)"),
    ],
)
def test_meaningless_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**change)


def test_seeds_are_one_per_image_and_in_range() -> None:
    assert image_seeds(range(3), 3, torch.device("cpu")).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="got 2 seeds for 3 images"):
        image_seeds([1, 2], 3, torch.device("cpu"))
    with pytest.raises(ValueError, match="got 0 seeds"):
        image_seeds(None, 3, torch.device("cpu"))
    with pytest.raises(ValueError, match="seed -1 is outside"):
        image_seeds([-1], 1, torch.device("cpu"))
