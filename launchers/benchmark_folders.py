"""What `benchmark.py data` reads if it is given no folder: code shards, image shards, and the same images as files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.codes import CodeFormat
from data_pipeline.images import encoded_image
from data_pipeline.index import Index
from data_pipeline.labels import label_of
from data_pipeline.members import Sample
from data_pipeline.reader import ShardReader
from data_pipeline.shards import write_shards
from models.scales import PATCH_NUMS_256, Scales

CODE_SAMPLES, VIEWED_SAMPLES, IMAGE_SAMPLES = 20_000, 4_000, 1_536
VIEWS = 16  # as launchers/encode_codes.py stores of a training image
IMAGE_SIDE = 288
META: dict[str, Any] = {"classes": [str(label) for label in range(1000)]}


def made_codes(folder: Path, *, views: int, samples: int) -> Index:
    """Code shards as the paper's at 256 pixels, of random codes."""
    generator = np.random.default_rng(0)
    num_tokens = Scales(PATCH_NUMS_256).num_tokens
    layout = CodeFormat(num_tokens, views=views, bits=12)
    records = (layout.pack(i % 1000, generator.integers(0, 4096, (views, num_tokens))) for i in range(samples))
    meta = {"patch_nums": list(PATCH_NUMS_256), "vocab_size": 4096, "num_tokens": num_tokens}
    meta |= {"bits": 12, "views": views, "tokenizer_sha256": "0" * 64}
    stored = (Sample(f"{i:09d}", {layout.suffix: record}) for i, record in enumerate(records))
    return write_shards(stored, folder, kind="codes", meta=META | meta, samples_per_shard=samples // 2)


def made_images(folder: Path) -> Index:
    """Image shards as pack_images makes them: JPEGs of noise smoothed a little, with a short side of 288 pixels."""
    generator = np.random.default_rng(0)
    stored = (
        Sample(f"{i:09d}", {"cls": b"%d" % (i % 1000), "jpg": made_jpeg(generator)}) for i in range(IMAGE_SAMPLES)
    )
    return write_shards(stored, folder, kind="images", meta=META, samples_per_shard=IMAGE_SAMPLES // 2)


def made_jpeg(generator: np.random.Generator) -> bytes:
    coarse = Image.fromarray(generator.integers(0, 256, (36, 36, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


def files_of(shards: str, folder: Path) -> Path:
    """The images of packed shards as files in folders of classes, as other loaders want them."""
    reader = ShardReader(shards, Index.read(shards, kind="images"))
    for number in range(len(reader)):
        sample = reader.read(number)
        place = folder / f"{label_of(sample):04d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:09d}.jpg").write_bytes(encoded_image(sample))
    return folder
