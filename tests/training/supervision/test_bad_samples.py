"""The bad samples of a run: each counted once, whichever rank meets it and however often the run starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fork_world import ForkServer

from training.engine.distributed import World
from training.supervision.bad_samples import BadSamples


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
