"""Ways in which the bytes of a file go bad, chosen at random, and a few small JPEGs to do it to."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from data_pipeline.shards.members import Sample

MUTATIONS = ("flip", "byte", "zero block", "noise", "swap blocks", "repeat", "remove", "cut", "insert", "digits")


def make_images(count: int, side: int = 16) -> list[Sample]:
    """Small JPEGs of noise, with labels 0 and 1."""
    generator = np.random.default_rng(0)
    samples = []
    for number in range(count):
        buffer = io.BytesIO()
        pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=90)
        samples.append(Sample(f"{number:09d}", {"cls": b"%d" % (number % 2), "jpg": buffer.getvalue()}))
    return samples


def mutate(content: bytes, kind: str, generator: np.random.Generator) -> bytes:
    """A copy of `content` with one mutation of a kind."""
    data = bytearray(content)
    size = len(data)
    place, other = (int(value) for value in generator.integers(0, size, 2))
    length = int(generator.integers(1, 1500))
    block, other_block = place // 512 * 512, other // 512 * 512
    if kind == "flip":
        data[place] ^= 1 << int(generator.integers(8))
    elif kind == "byte":
        data[place] = int(generator.integers(256))
    elif kind == "zero block":
        data[block : block + 512 * (1 + length % 8)] = bytes(min(512 * (1 + length % 8), size - block))
    elif kind == "noise":
        data[place : place + length] = generator.bytes(min(length, size - place))
    elif kind == "swap blocks":
        data[block : block + 512], data[other_block : other_block + 512] = (
            data[other_block : other_block + 512],
            data[block : block + 512],
        )
    elif kind == "repeat":
        data[place:place] = data[other : other + length]
        del data[size:]
    elif kind == "remove":
        del data[place : place + length]
        data += bytes(size - len(data))
    elif kind == "cut":
        del data[place:]
    elif kind == "insert":
        data[place:place] = generator.bytes(length)
    elif kind == "digits":  # where a tar header keeps its sizes and its sum
        field = block + int(generator.choice([124, 136, 148, 156]))
        data[field : field + 8] = bytes(generator.integers(48, 56, 8, dtype=np.uint8))[: max(0, size - field)]
    return bytes(data[: max(size, len(data))])
