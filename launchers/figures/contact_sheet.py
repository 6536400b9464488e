"""Draw the contact sheet of a packed folder: pictures of every class, read from the shards as training reads them.

One glance shows whether colours, orientation and classes are right. Pictures keep their proportions; small ones are
enlarged without smoothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.files.atomic import atomic_file
from data_pipeline.files.hashing import permutation
from data_pipeline.images.decoding import image_of
from data_pipeline.loading.plan import Stream
from data_pipeline.making.pack_report import printable
from data_pipeline.making.packing import FILES_NAME
from data_pipeline.shards.index import Index
from data_pipeline.shards.reader import ShardReader

SHEET_NAME = "contact_sheet.png"
COLUMNS, ROWS = 8, 6
SIDE, GAP, LINE = 160, 10, 16  # pixels: of a picture at most, between two, of a line of text
LARGE, SMALL = 13, 10  # of the letters
INK, PALE, PAPER, EDGE = (0, 0, 0), (110, 110, 110), (255, 255, 255), (205, 205, 205)


def write_contact_sheet(packed: Path, *, seed: int) -> Path:
    """Draw training pictures of a folder that pack_images filled, chosen by seed; return the file in that folder."""
    folder, path = packed / "train", packed / SHEET_NAME
    index = Index.read(folder, kind="images")
    labels = np.fromiter((row["label"] for row in _rows(folder)), np.int64, index.num_samples)
    chosen = choose(labels, COLUMNS * ROWS, seed=seed)
    names = _file_names(folder, chosen)
    reader = ShardReader(folder, index)
    sheet = _paper(len(chosen))
    for cell, sample_id in enumerate(chosen):
        class_name = index.meta["classes"][labels[sample_id]]
        _draw(sheet, cell, image_of(reader.read(sample_id)), class_name, names[sample_id])
    with atomic_file(path) as file:
        sheet.save(file, format="PNG")
    return path


def choose(labels: np.ndarray, count: int, *, seed: int) -> list[int]:
    """Choose at most `count` samples at random, as equally many of each class as there are, and return their numbers.

    labels: (samples,), the class of each. The numbers come sorted by class. With more classes than `count`, as many
    classes as there is room for have one sample each.
    """
    order = permutation(len(labels), seed, Stream.SHEET)
    by_class: dict[int, list[int]] = {}
    for sample_id in order.tolist():
        of_its_class = by_class.setdefault(int(labels[sample_id]), [])
        if len(of_its_class) < count:
            of_its_class.append(sample_id)
    taken = sorted((turn, place) for place, ids in enumerate(by_class.values()) for turn in range(len(ids)))[:count]
    classes = list(by_class.values())
    return sorted((classes[place][turn] for turn, place in taken), key=lambda sample_id: (labels[sample_id], sample_id))


def _rows(folder: Path) -> Iterator[dict[str, str | int]]:
    """Read what packing noted of each sample, in the order of the samples."""
    with open(folder / FILES_NAME, encoding="ascii") as file:
        yield from map(json.loads, file)


def _file_names(folder: Path, chosen: list[int]) -> dict[int, str]:
    wanted, last = set(chosen), max(chosen)
    return {number: str(row["file"]) for number, row in enumerate(islice(_rows(folder), last + 1)) if number in wanted}


def _paper(num_pictures: int) -> Image.Image:
    columns = min(COLUMNS, num_pictures)
    rows = -(-num_pictures // columns)
    width, height = SIDE + GAP, SIDE + 2 * LINE + GAP
    return Image.new("RGB", (columns * width + GAP, rows * height + GAP), PAPER)


def _draw(sheet: Image.Image, cell: int, image: Image.Image, class_name: str, file_name: str) -> None:
    row, column = divmod(cell, COLUMNS)
    left, top = GAP + column * (SIDE + GAP), GAP + row * (SIDE + 2 * LINE + GAP)
    picture = _fitted(image)
    x, y = left + (SIDE - picture.width) // 2, top + (SIDE - picture.height) // 2
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=EDGE)
    sheet.paste(picture, (x, y))
    _write(draw, (left, top + SIDE + 2), class_name, size=LARGE, ink=INK)
    _write(draw, (left, top + SIDE + 2 + LINE), file_name.rsplit("/", 1)[-1], size=SMALL, ink=PALE)


def _fitted(image: Image.Image) -> Image.Image:
    """Scale a picture to be as large as fits into a cell."""
    longer = max(image.size)
    if longer > SIDE:
        size = (max(1, image.width * SIDE // longer), max(1, image.height * SIDE // longer))
        return image.resize(size, Image.Resampling.LANCZOS)
    factor = SIDE // longer
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _write(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, *, size: int, ink: tuple[int, int, int]
) -> None:
    """Write one line of text, cut to the width of a cell."""
    font, text = ImageFont.load_default(size), printable(text)[:80]
    if draw.textlength(text, font=font) > SIDE:
        while draw.textlength(f"{text}...", font=font) > SIDE:
            text = text[:-1]
        text += "..."
    draw.text(place, text, fill=ink, font=font)
