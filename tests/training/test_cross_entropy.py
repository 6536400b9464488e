"""The cross-entropy in parts is the plain one, and makes no float32 copy of all logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from training import cross_entropy
from training.cross_entropy import token_cross_entropy

TOKENS, CODES = 50, 33


def make_logits(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(TOKENS, CODES, generator=generator)).to(dtype).requires_grad_()
    weights = torch.randn(TOKENS, generator=generator)
    return logits, torch.randint(CODES, (TOKENS,), generator=generator), weights


@pytest.mark.parametrize(
    "dtype, numbers_at_once",
    [(torch.float32, 1), (torch.float32, 7 * CODES), (torch.bfloat16, 7 * CODES), (torch.float16, 2**24)],
)
def test_losses_and_gradients_are_the_plain_ones(
    dtype: torch.dtype, numbers_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "NUMBERS_AT_ONCE", numbers_at_once)
    logits, codes, weights = make_logits(dtype)
    before = logits.detach().clone()
    loss = token_cross_entropy(logits, codes)
    plain_logits = before.clone().requires_grad_()
    plain = F.cross_entropy(plain_logits.float(), codes, reduction="none")
    torch.testing.assert_close(loss, plain)
    (loss @ weights).backward()
    (plain @ weights).backward()
    assert logits.grad.dtype == dtype and torch.equal(logits, before)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2  # the last bit of 16-bit numbers
    torch.testing.assert_close(logits.grad, plain_logits.grad, rtol=tolerance, atol=tolerance)


class LargestFloat32(TorchDispatchMode):
    """Remembers the most elements that a float32 tensor has had."""

    largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        results = function(*arguments, **(keywords or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, Tensor) and result.dtype == torch.float32:
                self.largest = max(self.largest, result.numel())
        return results


def test_no_float32_tensor_is_as_large_as_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "NUMBERS_AT_ONCE", 5 * CODES)
    logits, codes, _ = make_logits(torch.bfloat16)
    with LargestFloat32() as watched:
        token_cross_entropy(logits, codes).sum().backward()
    assert 0 < watched.largest <= 5 * CODES
