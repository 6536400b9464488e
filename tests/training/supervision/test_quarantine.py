"""Training on a damaged shard: strict runs end at the damage; others go on, count it, and stop at the limit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import Study, train_var

from data_pipeline.files.damage import DamagedData
from data_pipeline.shards.index import Index
from data_pipeline.shards.members import row_type
from launchers.setup.settings import TrainConfig
from training.supervision.bad_samples import TooManyBadSamples
from training.tracking.record import RunRecord


def damage(folder: Path, samples: list[int]) -> None:
    """Flip a bit in the codes of some samples of the first shard."""
    index = Index.read(folder)
    shard = index.shards[0]
    table = np.frombuffer((folder / shard.members_name).read_bytes(), dtype=row_type(index.record_parts))
    content = bytearray((folder / shard.name).read_bytes())
    for sample in samples:
        content[int(table["content"][sample]) + 3] ^= 1
    (folder / shard.name).write_bytes(content)


def config_on_damaged(
    study: Study, folder: Path, policy: str, samples: list[int], *, part: str = "train"
) -> TrainConfig:
    """A run on a copy of the codes in which some samples of a part are damaged."""
    shutil.copytree(study.folder / "codes", folder / "codes")
    damage(folder / "codes" / part, samples)
    config = replace(study.train_config(), run=str(folder / "run"))
    paths = {"train": str(folder / "codes/train"), "validation": str(folder / "codes/val")}
    return replace(config, data=replace(config.data, bad_samples=policy, **paths))


def listed(config: TrainConfig) -> list[dict]:
    return [json.loads(line) for line in (Path(config.run) / "bad_samples.jsonl").read_text().splitlines()]


def test_a_strict_run_ends_where_it_meets_the_damage(study: Study, tmp_path: Path) -> None:
    config = config_on_damaged(study, tmp_path, "strict", [1])
    with pytest.raises(DamagedData, match="shard-000000.tar: damaged shard, member vq12 of sample 1"):
        train_var(config)
    assert not (Path(config.run) / "bad_samples.jsonl").exists()


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_run_with_a_quarantine_goes_on_and_counts(study: Study, tmp_path: Path, part: str) -> None:
    config = config_on_damaged(study, tmp_path, "quarantine:2", [0, 1], part=part)
    train_var(config)
    facts = listed(config)
    assert {fact["sample"] for fact in facts} == {0, 1} and len(facts) == 2  # of two epochs, each once
    assert all(f"{part}/shard-000000.tar" in fact["shard"] and fact["reason"] for fact in facts)
    records = [record for record, _ in RunRecord(Path(config.run)).read_after()]
    assert [record["bad_samples"] for record in records if "bad_samples" in record][-1] == 2


def test_one_more_than_allowed_ends_the_run_and_every_start_after(study: Study, tmp_path: Path) -> None:
    config = config_on_damaged(study, tmp_path, "quarantine:1", [0, 1])
    for _ in range(2):
        with pytest.raises(TooManyBadSamples, match="2 bad samples, data.bad_samples allows 1"):
            train_var(config)
    assert len(listed(config)) == 2
