"""The attention benchmark: the ways that it times, side by side, are those that a model can take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import command

from launchers import benchmark
from launchers.bench import attention as benchmark_attention
from launchers.bench.attention import LAYERS_ON_CUDA, SCHEDULES, attention_contestants, forward_and_backward
from launchers.bench.config import BenchmarkConfig
from models.attention import MASKED, PER_SCALE, BlockCausalAttention
from models.scales import Scales

TINY = (((1, 2, 3), 2, 1), ((1, 2), 3, 2))


def test_the_ways_are_timed_beside_the_dense_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_attention, "SCHEDULES", TINY)
    monkeypatch.setattr(benchmark_attention, "ON_CUDA", TINY)
    benchmark.launch(command(BenchmarkConfig(what="attention", repeats=2, out=str(tmp_path / "b.json"))))
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    names = [row["name"] for row in rows]
    assert names[:2] == [f"14 tokens, {MASKED}", f"14 tokens, {PER_SCALE}"] and f"5 tokens, {MASKED}" in names
    assert all(row["ratio"] == 1.0 for row in rows if MASKED in row["name"])
    assert all(row["mfu"] > 0 and row["bandwidth_share"] > 0 for row in rows)


def test_flops_are_those_of_the_pairs_seen_and_bytes_those_of_every_tensor_once() -> None:
    (first, *_), *_ = attention_contestants((((1, 2), 3, 2),))
    pairs = 1 + 4 * 5  # the first token sees itself, the four of the second scale all five
    forward = 2 * 2 * pairs * 2 * 64
    tensors, itemsize = 4 + 8, 2 if torch.cuda.is_available() else 4
    assert first.flops_per_image == 3 * forward and first.bytes_per_image == tensors * 5 * 2 * 64 * itemsize


def test_each_call_handles_its_images_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = LAYERS_ON_CUDA if torch.cuda.is_available() else 1
    counts = [{each.call() for each in compared} for compared in attention_contestants(TINY)]
    assert counts == [{2 * layers}, {3 * layers}]
    q, k, v, gradient = drawn = torch.randn(4, 2, 1, 14, 64)
    taken, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *arguments: taken.append(grad(*arguments)))
    forward_and_backward(BlockCausalAttention(Scales((1, 2, 3))), drawn)()
    leaves = [part.clone().requires_grad_() for part in (q, k, v)]
    wanted = grad(BlockCausalAttention(Scales((1, 2, 3)), MASKED)(*leaves, softmax_scale=1.0), leaves, gradient)
    torch.testing.assert_close(taken[0], wanted, rtol=1e-4, atol=1e-4)


def test_the_token_counts_are_those_of_256_512_and_1024_pixels() -> None:
    assert [Scales(patch_nums).num_tokens for patch_nums, *_ in SCHEDULES] == [680, 2240, 9451]
