"""The bidirectionality of attention, where it can be told without a computer."""

from __future__ import annotations

import pytest
import torch

from training.laws.dependency import bidirectionality, later_share


def normalised(weights: torch.Tensor) -> torch.Tensor:
    return (weights / weights.sum(dim=-1, keepdim=True))[None]


def test_uniform_attention_goes_both_ways() -> None:
    attention = torch.full((2, 9, 9), 1 / 9)
    assert later_share(attention).tolist() == pytest.approx([0.5, 0.5])
    assert bidirectionality(attention).tolist() == pytest.approx([1.0, 1.0])


def test_causal_attention_goes_one_way_in_either_direction() -> None:
    backward, forward = normalised(torch.ones(5, 5).tril()), normalised(torch.ones(5, 5).triu())
    assert later_share(torch.cat([backward, forward])).tolist() == [0, 1]
    assert bidirectionality(torch.cat([backward, forward])).tolist() == [0, 0]


def test_attention_to_oneself_does_not_count() -> None:
    attention = torch.tensor([[[0.5, 0.5, 0.0], [0.1, 0.9, 0.0], [0.0, 0.1, 0.9]]])
    assert later_share(attention).item() == pytest.approx(0.5 / 0.7)
    assert bidirectionality(attention).item() == pytest.approx(2 * 0.2 / 0.7)


def test_without_any_attention_to_others_there_is_no_direction() -> None:
    assert bidirectionality(torch.eye(4)[None]).item() == 0
    assert bidirectionality(torch.ones(1, 1, 1)).item() == 0
