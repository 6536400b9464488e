"""What was read, joined and compared, and a sample that has been damaged on its way."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from data_pipeline.loading.batches import Batch


def joined(batches: Iterable[Batch]) -> Batch:
    batches = list(batches)
    names = ("data", "labels", "positions", "weights")
    return Batch(**{name: torch.cat([getattr(batch, name) for batch in batches]) for name in names})


def assert_same(first: Batch, second: Batch) -> None:
    for name in ("data", "labels", "positions", "weights"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=0, atol=0)


def flip_a_sample(shard: Path) -> None:
    """Damage the second sample of a shard of `pack_codes`, in all of its views."""
    content = bytearray(shard.read_bytes())
    content[1536:1566] = bytes(byte ^ 1 for byte in content[1536:1566])
    shard.write_bytes(content)
