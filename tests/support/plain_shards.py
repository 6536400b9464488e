"""A packed folder of images that are no pictures: seven samples of sizes around a tar block."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.shards.index import Index
from data_pipeline.shards.members import Sample
from data_pipeline.shards.writer import write_shards

META = {"classes": ["cat", "dog"]}
SIZES = (0, 1, 511, 512, 513, 1022, 3000)
SAMPLES = [Sample(f"{i:09d}", {"cls": b"1", "png": bytes([65 + i]) * size}) for i, size in enumerate(SIZES)]


def pack(folder: Path, samples: list[Sample] = SAMPLES, *, samples_per_shard: int = 3) -> Index:
    return write_shards(samples, folder, kind="images", meta=META, samples_per_shard=samples_per_shard)
