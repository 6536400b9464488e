"""A folder of six small shards, filled by workers that claim them."""

from __future__ import annotations

import time
from pathlib import Path

from data_pipeline.making.claims import Claims, Entry
from data_pipeline.shards.index import is_complete
from data_pipeline.shards.writer import Sample, write_shard

NAMES = tuple(f"shard-{number:06d}" for number in range(6))


PLAN = {"seed": 0, "views": [1, 2], "batch": 64}


def make_claims(folder: Path, plan: dict | None = None) -> Claims:
    plan = PLAN if plan is None else plan
    return Claims(folder, NAMES, plan=plan, is_finished=lambda: is_complete(folder), report=lambda line: None)


def make_shard(folder: Path, name: str, *, seconds: float = 0.0) -> Entry:
    """Three samples that say whose they are; takes `seconds`, most of it with half a shard written."""
    with open(folder.with_suffix(".made"), "a") as made:
        made.write(f"{name}\n")

    def samples():
        for number in range(3):
            time.sleep(seconds / 3)
            yield Sample(f"{name[-1]}{number}", {"cls": name.encode()})

    return {"shard": write_shard(samples(), folder / f"{name}.tar").to_json()}
