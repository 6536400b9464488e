"""What a packing found, counted: samples of each class, sizes of pictures, and why files were left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.making.claims import Entry, shard_of
from data_pipeline.shards.index import ShardEntry

MAX_REASONS = 1000  # that are kept apart


@dataclass
class SplitCount:
    """What is counted of the images of a split, or of one shard; plain JSON by `to_json`, and added up by `add_json`.

    widths, heights: in pixels, as stored and upright. classes: by number.
    """

    images: int = 0
    bytes: int = 0  # of the image files in the shards
    skipped: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    widths: Counter[str] = field(default_factory=Counter)
    heights: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def add_image(self, label: int, width: int, height: int, num_bytes: int) -> None:
        self.images += 1
        self.bytes += num_bytes
        for counter, value in ((self.classes, label), (self.widths, width), (self.heights, height)):
            counter[str(value)] += 1

    def add_skipped(self, reason: str) -> None:
        self.skipped += 1
        self.reasons[reason if reason in self.reasons or len(self.reasons) < MAX_REASONS else "other reasons"] += 1

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__}

    def add_json(self, other: Mapping[str, Any]) -> None:
        """Count what `to_json` gave of another shard too."""
        for name, value in other.items():
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
            else:
                getattr(self, name).update(value)

    def summary(self, class_names: list[str]) -> dict[str, Any]:
        """The report of a split: smallest, median and largest of everything, and the table of classes."""
        table = {name: self.classes[str(label)] for label, name in enumerate(class_names)}
        return {
            "images": self.images,
            "image_bytes": self.bytes,
            "width": spread(self.widths),
            "height": spread(self.heights),
            "samples_per_class": {**spread(Counter(Counter(table.values()))), "table": table},
            "skipped": self.skipped,
            "reasons": dict(self.reasons.most_common()),
        }


@dataclass
class SplitTotal:
    """What the entries of a split's shards say together."""

    shards: list[ShardEntry] = field(default_factory=list)
    count: SplitCount = field(default_factory=SplitCount)
    first_skipped: tuple[str, ...] = ()  # name and reason, if one was

    def add(self, entry: Entry) -> None:
        """Take in what packing a shard left: "shard", "count" and "skipped"."""
        if (shard := shard_of(entry)) is not None:
            self.shards.append(shard)
        self.count.add_json(entry["count"])
        if entry["skipped"] and not self.first_skipped:
            self.first_skipped = entry["skipped"][0]["file"], entry["skipped"][0]["reason"]


def spread(histogram: Mapping[str, int] | Mapping[int, int]) -> dict[str, int]:
    """Smallest, (lower) median and largest value of a histogram: value -> how often."""
    values = sorted((int(value), count) for value, count in histogram.items() if count)
    if not values:
        return {"min": 0, "median": 0, "max": 0}
    half, seen = (sum(count for _, count in values) + 1) // 2, 0
    for median, count in values:
        seen += count
        if seen >= half:
            break
    return {"min": values[0][0], "median": median, "max": values[-1][0]}


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """The report of a packing for people."""
    said = []
    for split, found in report["splits"].items():
        size = " x ".join("{min}/{median}/{max}".format(**found[side]) for side in ("width", "height"))
        each = "{min}/{median}/{max}".format(**found["samples_per_class"])
        said.append(
            f"{split:5}  {found['images']} images of {found['listed']} files in {found['shards']} shards, "
            f"{found['bytes'] / 1e6:.1f} MB"
        )
        said.append(f"       smallest/median/largest: {each} images a class, {size} pixels")
        if found["first_skipped"]:
            name, reason = found["first_skipped"]
            said.append(f"       {found['skipped']} skipped, see skipped.jsonl, the first: {printable(name)}: {reason}")
        said += [f"       {count} skipped: {reason}" for reason, count in list(found["reasons"].items())[:5]]
        if len(found["reasons"]) > 5:
            said.append(f"       {len(found['reasons']) - 5} more reasons are in report.json")
    if report["unused"]:
        first = ", ".join(map(printable, report["unused"][:3]))
        said.append(f"unused {len(report['unused'])} names beside the class folders: {first}")
    if report["num_hidden"]:
        said.append(f"unused {report['num_hidden']} hidden names, which begin with a dot")
    return said


def printable(name: str) -> str:
    """A file name for one line of a terminal: as it is, or in quotes with escapes for what cannot be printed."""
    return name if name.isprintable() else ascii(name)
