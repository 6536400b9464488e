"""The attention benchmark times forward and backward passes of the kinds of attention that a model can have."""

from __future__ import annotations

import pytest
import torch

from launchers.bench import attention
from launchers.bench.attention import LAYERS, SCHEDULES, attention_contestants, forward_and_backward
from models.attention import MASKED, PER_SCALE, BlockCausalAttention
from models.scales import Scales

TINY = (((1, 2, 3), 2, 1), ((1, 2), 3, 2))
DEVICE = attention.device_type()


def test_each_call_handles_its_images_and_the_dense_mask_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEDULES, DEVICE, TINY)
    compared = list(attention_contestants())
    names = [[each.name for each in contestants][:2] for contestants in compared]
    assert names == [[f"{tokens} tokens, {way}" for way in (MASKED, PER_SCALE)] for tokens in (14, 5)]
    assert [{each.call() for each in contestants} for contestants in compared] == [
        {images * LAYERS[DEVICE]} for images in (2, 3)
    ]
    pairs = 1 + 4 * 5  # the first token sees itself, the four of the second scale all five
    assert compared[1][0].flops_per_image == 3 * (2 * 2 * pairs * 2 * 64)  # forward and twice backward, two heads


def test_a_call_takes_the_gradients_of_the_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, gradient = drawn = torch.randn(4, 2, 1, 14, 64)
    taken, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *arguments: taken.append(grad(*arguments)))
    forward_and_backward(BlockCausalAttention(Scales((1, 2, 3))), drawn)()
    leaves = [part.clone().requires_grad_() for part in (q, k, v)]
    wanted = grad(BlockCausalAttention(Scales((1, 2, 3)), MASKED)(*leaves, softmax_scale=1.0), leaves, gradient)
    torch.testing.assert_close(taken[0], wanted, rtol=1e-4, atol=1e-4)
