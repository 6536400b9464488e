"""Tars as somebody else would write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import webdataset
from shard_mutations import make_images

from data_pipeline.shards.members import Sample


def write_theirs(path: Path, samples: list[Sample], *, label: str = "cls") -> None:
    """As somebody else would: WebDataset's writer, times, captions, labels in cls or in json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            number = int(sample.members["cls"])
            labels: dict[str, Any] = {"cls": number} if label == "cls" else {"json": {label: number, "text": "a cat"}}
            writer.write({"__key__": sample.key, "jpeg": sample.members["jpg"], "txt": "a cat", **labels})


def write_two(folder: Path) -> Path:
    """Write ten pictures of two classes into two tars."""
    samples = make_images(10)
    for number in range(2):
        write_theirs(folder / f"part-{number:03d}.tar", samples[5 * number : 5 * number + 5])
    return folder
