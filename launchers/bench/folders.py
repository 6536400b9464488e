"""What `benchmark.py data` reads if it is given no folder: code shards, image shards, and the same images as files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.images.decoding import encoded_image, label_of
from data_pipeline.shards.codes import CodeFormat
from data_pipeline.shards.index import Index
from data_pipeline.shards.members import Sample
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.writer import write_shards
from models.var import VARConfig

CODE_SAMPLES, VIEWED_SAMPLES, IMAGE_SAMPLES = 20_000, 10_000, 1_536
CODE_SHARDS = 128  # as many as pack_images and encode_codes make of ImageNet
VIEWS = 16  # as launchers/encode_codes.py stores of a training image
IMAGE_SIDE = 288
IMAGE_CLASSES = 1000


def made_codes(folder: Path, model: VARConfig, *, views: int, samples: int, shards: int = 2) -> Index:
    """Code shards for a model, of random codes, packed as `encode_codes` does it."""
    num_tokens, vocab_size, classes = model.scales.num_tokens, model.vocab_size, model.num_classes
    generator = np.random.default_rng(0)
    layout = CodeFormat.for_vocab(num_tokens, vocab_size, views)
    drawn = (generator.integers(0, vocab_size, (views, num_tokens)) for _ in range(samples))
    records = (layout.pack(number % classes, codes) for number, codes in enumerate(drawn))
    meta = {"patch_nums": list(model.patch_nums), "vocab_size": vocab_size, "num_tokens": num_tokens}
    meta |= {"bits": layout.bits, "views": views, "tokenizer_sha256": "0" * 64} | class_names(classes)
    stored = (Sample(f"{number:09d}", {layout.suffix: record}) for number, record in enumerate(records))
    return write_shards(stored, folder, kind="codes", meta=meta, samples_per_shard=-(-samples // shards))


def class_names(number: int) -> dict[str, Any]:
    """Of an index, whose classes have numbers for names."""
    return {"classes": [str(label) for label in range(number)]}


def made_images(folder: Path) -> Index:
    """Image shards as pack_images makes them: JPEGs of noise smoothed a little, with a short side of 288 pixels."""
    generator = np.random.default_rng(0)
    stored = (
        Sample(f"{i:09d}", {"cls": b"%d" % (i % IMAGE_CLASSES), "jpg": made_jpeg(generator)})
        for i in range(IMAGE_SAMPLES)
    )
    meta = class_names(IMAGE_CLASSES)
    return write_shards(stored, folder, kind="images", meta=meta, samples_per_shard=IMAGE_SAMPLES // 2)


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
