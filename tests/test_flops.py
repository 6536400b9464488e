"""Operations per image: the closed form against a counter, and against the numbers recomputed from the paper."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.scales import PATCH_NUMS_256, PATCH_NUMS_512, Scales
from models.var import VAR, VARConfig
from training.flops import attention_pairs, forward_macs, training_flops


def test_attention_pairs_count_what_the_block_causal_mask_allows() -> None:
    for patch_nums in ((1,), (2, 3), (1, 2, 3, 4)):
        scales = Scales(patch_nums)
        assert attention_pairs(scales) == scales.block_causal_mask().sum().item()


def test_attention_pairs_of_the_published_schedules() -> None:
    assert attention_pairs(Scales(PATCH_NUMS_256)) == 286_434
    assert attention_pairs(Scales(PATCH_NUMS_512)) == 3_269_850


@pytest.mark.parametrize("norm", ["adaln", "shared_adaln", "layer_norm"])
@pytest.mark.parametrize("patch_nums", [(1, 2, 3), (2, 3)])
def test_forward_macs_are_what_a_counter_sees(patch_nums: tuple[int, ...], norm: str) -> None:
    config = VARConfig(
        depth=2, patch_nums=patch_nums, vocab_size=8, code_width=4, num_classes=3, norm=norm
    )
    with torch.device("meta"):
        model = VAR(config)
        inputs = torch.empty(1, config.scales.num_tokens - config.scales.first_tokens, config.code_width)
        labels = torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(inputs, labels)
    # the counter sees attention over the full square, of which the mask leaves only some pairs any information
    unused_pairs = config.scales.num_tokens**2 - attention_pairs(config.scales)
    expected = forward_macs(config) + 2 * unused_pairs * config.width * config.depth
    assert counter.get_total_flops() == 2 * expected


@pytest.mark.parametrize("depth, flops", [(6, 5.77e10), (16, 8.96e11), (20, 1.72e12), (24, 2.93e12), (30, 5.65e12)])
def test_training_flops_of_the_published_sizes(depth: int, flops: float) -> None:
    # recomputed from the released code by hand, block-causal; 0.5 %: they were written down with three digits
    assert training_flops(VARConfig(depth=depth)) == pytest.approx(flops, rel=5e-3)


def test_training_costs_three_forward_passes_of_two_flops_a_mac() -> None:
    config = VARConfig(depth=6)
    assert training_flops(config) == 3 * 2 * forward_macs(config)


def test_adaln_is_counted_once_per_image_not_per_token() -> None:
    own, shared = VARConfig(depth=16), VARConfig(depth=16, norm="shared_adaln")
    assert forward_macs(own) - forward_macs(shared) == 15 * 6 * own.width**2
