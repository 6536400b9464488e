"""The bidirectionality of attention, where it can be told without a computer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.laws.dependency import bidirectionality, later_share

SIDEWAYS = [[0.5, 0.5, 0.0], [0.1, 0.9, 0.0], [0.0, 0.1, 0.9]]  # what a token gives to itself counts for nothing


@pytest.mark.parametrize(
    ("attention", "share", "both_ways"),
    [
        (torch.full((9, 9), 1 / 9), 0.5, 1.0),
        (torch.ones(5, 5).tril(), 0.0, 0.0),
        (torch.ones(5, 5).triu(), 1.0, 0.0),
        (torch.tensor(SIDEWAYS), 0.5 / 0.7, 0.4 / 0.7),
        (torch.eye(4), 0.0, 0.0),
        (torch.ones(1, 1), 0.0, 0.0),
    ],
)
def test_attention_has_the_direction_that_is_seen_in_it(attention: Tensor, share: float, both_ways: float) -> None:
    weights = (attention / attention.sum(dim=-1, keepdim=True))[None]
    assert later_share(weights).item() == pytest.approx(share)
    assert bidirectionality(weights).item() == pytest.approx(both_ways)
