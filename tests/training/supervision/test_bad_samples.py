"""Bad samples: each counted once over ranks and restarts; strict runs end at the damage, others at the limit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fork_world import ForkServer
from tiny import Study, train_var

from data_pipeline.files.damage import DamagedData
from data_pipeline.shards.index import Index
from data_pipeline.shards.members import row_type
from launchers.setup.settings import TrainConfig
from training.engine.distributed import World
from training.supervision.bad_samples import BadSamples, TooManyBadSamples
from training.tracking.record import RunRecord


def fact(sample: int, shard: str = "shard-000000.tar") -> dict[str, Any]:
    return {"shard": shard, "sample": sample, "reason": f"{shard}: sample {sample} is bad", "substitute": sample + 1}


def listed(run: Path) -> list[int]:
    return [json.loads(line)["sample"] for line in (run / "bad_samples.jsonl").read_text().splitlines()]


def test_each_bad_sample_is_listed_and_said_once_over_restarts(tmp_path: Path) -> None:
    said: list[str] = []
    met = iter([[fact(3), fact(3)], [], [fact(3), fact(5)]])
    bad = BadSamples(tmp_path / "run", 9, World(), lambda: next(met))
    assert [bad.share(said.append)["bad_samples"] for _ in range(3)] == [1, 1, 2]
    assert listed(tmp_path / "run") == [3, 5] and len(said) == 2
    assert "sample 3 is bad" in said[0] and "replaced by sample 4" in said[0]
    again = BadSamples(tmp_path / "run", 9, World(), lambda: [fact(5), fact(5, "shard-000001.tar")])
    assert again.count == 2
    assert again.share(said.append) == {"bad_samples": 3} and listed(tmp_path / "run") == [3, 5, 5]


def test_all_ranks_know_of_what_any_has_met_and_end_together(fork_server: ForkServer, tmp_path: Path) -> None:
    met = [[fact(1), fact(2)], [fact(2), fact(7)]]  # of rank 0 and of rank 1
    world = fork_server.run("fault_worker:share_bad_samples", {"run": str(tmp_path), "limit": 2, "met": met})
    first, second = world.results
    assert first == second and first["count"] == 3 and len(first["said"]) == 3, world.explain()
    assert first["refused"].startswith("3 bad samples") and listed(tmp_path) == [1, 2, 7]


def test_a_list_that_cannot_be_written_ends_all_ranks(fork_server: ForkServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    arguments = {"run": str(tmp_path / "file"), "limit": 2, "met": [[fact(1)], []]}
    world = fork_server.run("fault_worker:share_bad_samples", arguments)
    assert [code for code in world.exit_codes if code] == [1, 1]
    assert all("rank 0: " in rank.stderr for rank in world.ranks), world.explain()


def test_a_line_that_a_kill_has_cut_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "bad_samples.jsonl").write_text(json.dumps(fact(1)) + '\n{"shard": "sh')
    bad = BadSamples(tmp_path, 2, World(), lambda: [fact(2)])
    assert bad.count == 1
    bad.share(lambda line: None)
    assert BadSamples(tmp_path, 2, World(), list).count == 2  # what came after the cut line is not lost with it


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


def test_a_strict_run_ends_where_it_meets_the_damage(study: Study, tmp_path: Path) -> None:
    config = config_on_damaged(study, tmp_path, "strict", [1])
    with pytest.raises(DamagedData, match="shard-000000.tar: damaged shard, member vq12 of sample 1"):
        train_var(config)
    assert not (Path(config.run) / "bad_samples.jsonl").exists()


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_run_with_a_quarantine_goes_on_and_counts(study: Study, tmp_path: Path, part: str) -> None:
    config = config_on_damaged(study, tmp_path, "quarantine:2", [0, 1], part=part)
    train_var(config)
    assert sorted(listed(Path(config.run))) == [0, 1]  # of two epochs, each once
    text = (Path(config.run) / "bad_samples.jsonl").read_text()
    assert text.count(f"{part}/shard-000000.tar") >= 2
    records = [record for record, _ in RunRecord(Path(config.run)).read_after()]
    assert [record["bad_samples"] for record in records if "bad_samples" in record][-1] == 2


def test_one_more_than_allowed_ends_the_run_and_every_start_after(study: Study, tmp_path: Path) -> None:
    config = config_on_damaged(study, tmp_path, "quarantine:1", [0, 1])
    for _ in range(2):
        with pytest.raises(TooManyBadSamples, match="2 bad samples, data.bad_samples allows 1"):
            train_var(config)
    assert len(listed(Path(config.run))) == 2
