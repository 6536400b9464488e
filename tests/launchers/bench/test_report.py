"""A report says when, by which command, on what and with which versions its figures came about, and no more."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT

from launchers.bench.config import BenchmarkConfig
from launchers.bench.report import begin_report, unfinished_rows, write_report

CONFIG = BenchmarkConfig(what="data")


def test_a_report_says_what_its_figures_depend_on() -> None:
    report = begin_report(CONFIG, ["data", "out=my figures.json"])
    assert set(report) == {"date", "command", "machine", "versions", "settings", "finished", "rows"}
    assert abs((datetime.now(UTC) - datetime.fromisoformat(report["date"])).total_seconds()) < 60
    assert report["command"] == "python launchers/benchmark.py data 'out=my figures.json'"
    assert set(report["machine"]) == {"card", "card_bytes", "cpu", "cores", "threads", "ranks"}
    names = {"python", "torch", "cuda", "cudnn", "driver", "deepspeed", "nextscale", "commit", "flash-attn", "xformers"}
    assert set(report["versions"]) == names and report["versions"]["torch"] == torch.__version__
    assert report["machine"]["threads"] == torch.get_num_threads()


def test_no_host_and_no_path_of_its_user_is_in_it() -> None:
    written = json.dumps(begin_report(CONFIG, []))
    places = [str(Path.cwd()), str(ROOT), str(Path.home()) + "/", platform.node() or "a host"]
    assert not [place for place in places if place in written]


@pytest.mark.parametrize(
    ("change", "goes_on"),
    [({}, True), ({"finished": True}, False), ({"versions": {}}, False), ({"machine": {"card": "other"}}, False)],
)
def test_a_report_goes_on_only_if_it_was_cut_short_and_nothing_has_changed(
    change: dict[str, Any], goes_on: bool, tmp_path: Path
) -> None:
    out, rows = str(tmp_path / "made" / "b.json"), [{"name": "a"}]
    write_report(begin_report(CONFIG, []) | {"rows": rows} | change, out)
    assert unfinished_rows(begin_report(CONFIG, ["data"]), out) == (rows if goes_on else [])


def test_a_card_may_have_another_driver_when_a_report_goes_on(tmp_path: Path) -> None:
    out, rows = str(tmp_path / "b.json"), [{"name": "a"}]
    report = begin_report(CONFIG, [])
    write_report(report | {"rows": rows, "versions": report["versions"] | {"driver": "580.1"}}, out)
    assert unfinished_rows(report | {"versions": report["versions"] | {"driver": "580.2"}}, out) == rows


@pytest.mark.parametrize("content", [None, "no json", "[]", "{}"])
def test_a_file_that_is_no_report_holds_no_rows(content: str | None, tmp_path: Path) -> None:
    out = tmp_path / "b.json"
    if content is not None:
        out.write_text(content)
    assert unfinished_rows(begin_report(CONFIG, []), str(out)) == []
