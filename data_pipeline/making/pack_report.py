"""Count what a packing found: samples of each class, sizes of pictures, and why files were left out."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

MAX_REASONS = 1000  # that are kept apart


@dataclass
class SplitCount:
    """A count of the images of a split, or of one shard; `vars` of it is plain JSON, which `add_json` adds up.

    bytes: of the image files in the shards. classes: by number. widths, heights: in pixels, upright.
    """

    images: int = 0
    bytes: int = 0
    skipped: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    widths: Counter[str] = field(default_factory=Counter)
    heights: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def add_image(self, label: int, width: int, height: int, num_bytes: int) -> None:
        """Count a picture that is packed, of this class and size in pixels."""
        self.images += 1
        self.bytes += num_bytes
        for counter, value in ((self.classes, label), (self.widths, width), (self.heights, height)):
            counter[str(value)] += 1

    def add_skipped(self, reason: str) -> None:
        """Count a file that is left out."""
        self.skipped += 1
        self._add_reason(reason, 1)

    def add_json(self, other: Mapping[str, Any]) -> None:
        """Count what another shard counted, by the `vars` of its count."""
        for name, value in other.items():
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
            elif name == "reasons":
                for reason, count in value.items():
                    self._add_reason(reason, count)
            else:
                getattr(self, name).update(value)

    def _add_reason(self, reason: str, count: int) -> None:
        self.reasons[reason if reason in self.reasons or len(self.reasons) < MAX_REASONS else "other reasons"] += count

    def summary(self, class_names: list[str]) -> dict[str, Any]:
        """Return the report of a split: smallest, median and largest of everything, and the table of classes."""
        table = {name: self.classes[str(label)] for label, name in enumerate(class_names)}
        return {
            "images": self.images,
            "image_bytes": self.bytes,
            "width": spread(self.widths),
            "height": spread(self.heights),
            "samples_per_class": {**spread(Counter(map(str, table.values()))), "table": table},
            "skipped": self.skipped,
            "reasons": dict(self.reasons.most_common()),
        }


def spread(histogram: Mapping[str, int]) -> dict[str, int]:
    """Return the smallest, the (lower) median and the largest of the values that a histogram counts."""
    values = sorted((int(value), count) for value, count in histogram.items())
    if not values:
        return {"min": 0, "median": 0, "max": 0}
    seen = list(accumulate(count for _, count in values))
    median = values[bisect_left(seen, (seen[-1] + 1) // 2)][0]
    return {"min": values[0][0], "median": median, "max": values[-1][0]}


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """Write the report of a packing, the content of report.json, as lines for people."""
    lines = []
    for split, found in report["splits"].items():
        size = " x ".join("{min}/{median}/{max}".format(**found[side]) for side in ("width", "height"))
        each = "{min}/{median}/{max}".format(**found["samples_per_class"])
        lines.append(
            f"{split:5}  {found['images']} images of {found['listed']} files in {found['shards']} shards, "
            f"{found['bytes'] / 1e6:.1f} MB"
        )
        lines.append(f"       smallest/median/largest: {each} images a class, {size} pixels")
        if found["first_skipped"]:
            first, why = found["first_skipped"]
            lines.append(f"       {found['skipped']} skipped, see skipped.jsonl, the first: {printable(first)}: {why}")
        lines += [f"       {count} skipped: {reason}" for reason, count in list(found["reasons"].items())[:5]]
        if len(found["reasons"]) > 5:
            lines.append(f"       {len(found['reasons']) - 5} more reasons are in report.json")
    if report["unused"]:
        names = ", ".join(map(printable, report["unused"][:3]))
        lines.append(f"unused {report['num_unused']} names beside the class folders: {names}")
    if report["num_hidden"]:
        lines.append(f"unused {report['num_hidden']} hidden names, which begin with a dot")
    return lines


def printable(name: str) -> str:
    """Write a file name for one line of a terminal, in quotes and with escapes if it cannot be printed as it is."""
    return name if name.isprintable() else ascii(name)
