"""Block-causal attention: its ways give the same numbers and gradients; only the plain one has L x L of them."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from models.attention import ATTENTIONS, FLEX, MASKED, PER_SCALE, BlockCausalAttention, flex_block_mask
from models.scales import PATCH_NUMS_256, PATCH_NUMS_512, PATCH_NUMS_1024, Scales

SCALES = Scales((1, 2, 3))
SCHEDULES = [(1, 2, 3), (2, 3, 12, 14), PATCH_NUMS_256]
CPU = torch.device("cpu")


def draw(scales: Scales, *, batch: int = 2, heads: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, batch, heads, scales.num_tokens, 64, generator=generator)
    return tuple(part.clone().requires_grad_() for part in drawn.unbind(0))


def test_attention_is_softmax_over_this_and_earlier_scales() -> None:
    q, k, v = draw(SCALES)
    ids = SCALES.scale_ids()
    weights = (0.3 * q @ k.transpose(2, 3)).masked_fill(ids[:, None] < ids[None, :], -torch.inf).softmax(dim=-1)
    for way in ATTENTIONS:
        found = BlockCausalAttention(SCALES, way)(q.detach(), k.detach(), v.detach(), softmax_scale=0.3)
        torch.testing.assert_close(found, (weights @ v).detach())


@pytest.mark.parametrize("patch_nums", [*SCHEDULES, PATCH_NUMS_512, PATCH_NUMS_1024])
def test_results_and_gradients_are_those_of_the_dense_mask(patch_nums: tuple[int, ...]) -> None:
    scales, found = Scales(patch_nums), {}
    for way in (MASKED, PER_SCALE):
        q, k, v = draw(scales) if scales.num_tokens <= 680 else draw(scales, batch=1, heads=1)
        out = BlockCausalAttention(scales, way)(q, k, v, softmax_scale=0.3)
        found[way] = (out, *torch.autograd.grad(out.square().sum(), (q, k, v)))
    for ours, plain in zip(found[PER_SCALE], found[MASKED], strict=True):
        assert (ours - plain).norm() < 2e-6 * plain.norm()


@pytest.mark.parametrize("patch_nums", SCHEDULES)
def test_results_of_flex_are_those_of_the_dense_mask(patch_nums: tuple[int, ...]) -> None:
    scales = Scales(patch_nums)
    q, k, v = (part.detach() for part in draw(scales))  # it has gradients on CUDA only
    flex, plain = (BlockCausalAttention(scales, way)(q, k, v, softmax_scale=0.3) for way in (FLEX, MASKED))
    torch.testing.assert_close(flex, plain)


@pytest.mark.parametrize("patch_nums", [*SCHEDULES, PATCH_NUMS_512])
def test_the_blocks_of_flex_are_those_of_the_mask(patch_nums: tuple[int, ...]) -> None:
    """Made from the ends of the scales, without a mask of all pairs."""
    scales = Scales(patch_nums)
    ids, length = scales.scale_ids(), scales.num_tokens
    wanted = create_block_mask(lambda b, h, q, k: ids[q] >= ids[k], None, None, length, length, device="cpu")
    found = flex_block_mask(scales, CPU)
    assert found.seq_lengths == wanted.seq_lengths and torch.equal(found.to_dense(), wanted.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks"):
        assert torch.equal(getattr(found, name), getattr(wanted, name))


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives back."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, Tensor):
                self.numel = max(self.numel, each.numel())
        return out


@pytest.mark.parametrize("patch_nums", [PATCH_NUMS_256, PATCH_NUMS_512, PATCH_NUMS_1024])
def test_nothing_grows_with_the_square_of_the_tokens(patch_nums: tuple[int, ...]) -> None:
    scales = Scales(patch_nums)
    q, k, v = draw(scales, batch=1, heads=1)
    with LargestTensor() as seen:
        BlockCausalAttention(scales)(q, k, v, softmax_scale=1.0).sum().backward()
    assert seen.numel == q.numel() < scales.num_tokens**2
    mask = flex_block_mask(scales, CPU)
    kept = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    assert sum(each.numel() for each in kept) < scales.num_tokens**2 / 1000
    with LargestTensor() as seen:  # the measure would show it
        BlockCausalAttention(SCALES, MASKED)(*draw(SCALES), softmax_scale=1.0)
    assert seen.numel >= SCALES.num_tokens**2


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ValueError, match="attention 'fast' is not one of per_scale, flex, masked"):
        BlockCausalAttention(SCALES, "fast")
