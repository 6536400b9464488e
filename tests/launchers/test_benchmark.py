"""What is measured can be asked for by name, and goes to the screen and to a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fork_world import ForkServer
from tiny import command

from launchers import benchmark
from launchers.bench.config import BENCHMARKS, OURS, BenchmarkConfig
from launchers.bench.suite import plan_suite, title_of


def test_every_benchmark_that_can_be_asked_for_is_there() -> None:
    assert set(benchmark.BENCHMARKED) | {"suite"} == set(BENCHMARKS)


@pytest.mark.parametrize("what", ["data", "suite"])
def test_rows_go_to_the_screen_and_to_a_file(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"name": "a row", "peak_bytes": 2**30}]
    monkeypatch.setitem(benchmark.BENCHMARKED, "data", lambda config: rows)
    monkeypatch.setattr(benchmark, "benchmark_suite", lambda config, report: rows)
    benchmark.launch(command(BenchmarkConfig(what=what, out=str(tmp_path / "b.json"))))
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["rows"] == rows and report["settings"]["what"] == what and report["finished"]
    assert "a row  1.00 GiB" in capsys.readouterr().out


def test_a_dry_run_of_the_suite_names_its_benchmarks_in_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.launch(command(BenchmarkConfig(what="suite"), dry_run=True))
    titles = [title_of(settings) for settings in plan_suite(BenchmarkConfig(what="suite"))]
    assert capsys.readouterr().out.splitlines()[1:] == titles


def test_several_ranks_are_refused_for_what_is_measured_on_one() -> None:
    with pytest.raises(ValueError, match="2 ranks were started, but sample is measured on one: start it with python"):
        benchmark.check_ranks(BenchmarkConfig(what="sample"), 2)
    benchmark.check_ranks(BenchmarkConfig(what="train", contestants=OURS), 2)


def test_a_gpu_that_training_would_leave_alone_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(ValueError, match="DS_ACCELERATOR is cpu, but there is a GPU.*unset it, or hide the GPU"):
        benchmark.launch(command(BenchmarkConfig(what="attention")))


def test_two_ranks_take_a_step_together_and_one_of_them_reports(tmp_path: Path, fork_server: ForkServer) -> None:
    arguments = ["train", "contestants=ours", "depth=1", "patch_nums=[1,2]", "tokenizer_width=32", "batch=2"]
    arguments += ["repeats=1", "zero_stage=3", f"out={tmp_path / 'b.json'}"]
    order = {"name": "benchmark", "arguments": arguments, "folder": str(tmp_path), "alone": False}
    world = fork_server.run("launcher_worker:launch", order, world_size=2, timeout=120)
    assert world.exit_codes == [0, 0], world.explain()
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["settings"]["zero_stage"] == 3
    assert report["machine"]["ranks"] == 2 and report["rows"][0]["samples_per_second"] > 0
    assert "ours, codes from shards" in world.ranks[0].stdout and "ours" not in world.ranks[1].stdout
