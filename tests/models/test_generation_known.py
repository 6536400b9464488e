"""Drawing around tokens that are known: they stay, the rest is drawn, and editing is drawing around a picture's own."""

from __future__ import annotations

import pytest
import torch
from drawing_models import CONFIG, LABELS, SAMPLING, decided_var, make_images, spread_tokenizer

from models.generation import KnownTokens, edit, generate, generate_scales
from models.sampling import Sampling
from models.var import VAR
from models.vqvae import VQVAE


@pytest.fixture(scope="module")
def var() -> VAR:
    return decided_var()


@pytest.fixture(scope="module")
def tokenizer() -> VQVAE:
    return spread_tokenizer()


def test_masks_are_one_for_all_images_or_one_each(var: VAR, tokenizer: VQVAE) -> None:
    with pytest.raises(ValueError, match="keep_mask holds 2 masks for 7 images"):
        edit(var, tokenizer, make_images(), torch.ones(2, 4, 4), LABELS, seeds=range(7))


def test_known_tokens_come_out_as_they_went_in_and_the_rest_is_drawn(var: VAR, tokenizer: VQVAE) -> None:
    generator = torch.Generator().manual_seed(2)
    known = KnownTokens(torch.randint(24, (7, 21), generator=generator), torch.rand(7, 21, generator=generator) > 0.5)
    drawn = generate_scales(var, tokenizer, LABELS, Sampling(), seeds=range(7), known=known).codes
    assert torch.equal(drawn[known.mask], known.codes[known.mask])
    assert not torch.equal(drawn[~known.mask], known.codes[~known.mask])


def test_knowing_what_would_be_drawn_anyway_changes_nothing(var: VAR, tokenizer: VQVAE) -> None:
    """Teacher-forced first scales: the later ones are drawn as if the first had been drawn too."""
    free = generate(var, tokenizer, LABELS, seeds=range(7), **SAMPLING)
    first_two = (CONFIG.scales.scale_ids() < 2).expand(7, 21)
    forced = generate_scales(
        var, tokenizer, LABELS, Sampling(**SAMPLING), seeds=range(7), known=KnownTokens(free, first_two)
    )
    assert torch.equal(forced.codes, free)


@pytest.mark.parametrize("keep_coarsest", [True, False])
def test_editing_keeps_the_tokens_of_the_mask_exactly(var: VAR, tokenizer: VQVAE, keep_coarsest: bool) -> None:
    images, mask = make_images(), torch.zeros(4, 4)
    mask[:2] = 1
    codes = edit(var, tokenizer, images, mask, LABELS, seeds=range(7), keep_coarsest=keep_coarsest)
    original, scales = tokenizer.encode(images), CONFIG.scales
    coarsest, middle, last = (drawn == given for drawn, given in zip(scales.split(codes), scales.split(original)))
    assert coarsest.all() == keep_coarsest
    assert middle[:, :2].all() and last[:, :8].all()
    assert not middle[:, 2:].all() and not last[:, 8:].all()


def test_a_mask_that_keeps_everything_gives_the_reconstruction_and_one_that_keeps_nothing_a_free_draw(
    var: VAR, tokenizer: VQVAE
) -> None:
    images, settings = make_images(), {"seeds": range(7), "keep_coarsest": False, "cfg": 1.0, "top_k": 0, "top_p": 0.9}
    assert torch.equal(edit(var, tokenizer, images, torch.ones(4, 4), LABELS, **settings), tokenizer.encode(images))
    del settings["keep_coarsest"]
    free = generate(var, tokenizer, LABELS, **settings)
    assert torch.equal(edit(var, tokenizer, images, torch.zeros(4, 4), LABELS, **settings, keep_coarsest=False), free)


def test_each_image_may_have_a_mask_of_its_own(var: VAR, tokenizer: VQVAE) -> None:
    images, masks = make_images(), torch.rand(7, 4, 4, generator=torch.Generator().manual_seed(3)) > 0.5
    together = edit(var, tokenizer, images, masks, LABELS, seeds=range(7))
    for i in (0, 6):
        alone = edit(var, tokenizer, images[i : i + 1], masks[i], LABELS[i : i + 1], seeds=[i])
        assert torch.equal(alone[0], together[i])


def test_smoothing_leaves_known_tokens_alone(var: VAR, tokenizer: VQVAE) -> None:
    codes = generate(var, tokenizer, LABELS, seeds=range(7))
    all_known = KnownTokens(codes, torch.ones_like(codes, dtype=torch.bool))
    smooth = generate_scales(var, tokenizer, LABELS, Sampling(smooth=True), seeds=range(7), known=all_known)
    assert torch.equal(
        smooth.f_hat, generate_scales(var, tokenizer, LABELS, Sampling(), seeds=range(7), known=all_known).f_hat
    )


def test_known_tokens_of_another_shape_are_refused(var: VAR, tokenizer: VQVAE) -> None:
    known = KnownTokens(torch.zeros(7, 20, dtype=torch.int64), torch.zeros(7, 20, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"known codes have shape \(7, 20\).* expected \(7, 21\)"):
        generate_scales(var, tokenizer, LABELS, Sampling(), seeds=range(7), known=known)
