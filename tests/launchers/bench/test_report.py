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
from launchers.bench.report import begin_report, rows_table, unfinished_rows, write_report

CONFIG = BenchmarkConfig(what="data")


def test_a_report_says_what_its_figures_depend_on_and_no_host_and_no_path() -> None:
    report = begin_report(CONFIG, ["data", "out=my figures.json"])
    assert set(report) == {"date", "command", "machine", "versions", "settings", "finished", "rows"}
    assert abs((datetime.now(UTC) - datetime.fromisoformat(report["date"])).total_seconds()) < 60
    assert report["command"] == "python launchers/benchmark.py data 'out=my figures.json'"
    assert set(report["machine"]) == {"card", "card_bytes", "cpu", "cores", "threads", "ranks"}
    names = {"python", "torch", "cuda", "cudnn", "driver", "deepspeed", "nextscale", "commit", "flash-attn", "xformers"}
    assert set(report["versions"]) == names and report["versions"]["torch"] == torch.__version__
    assert report["machine"]["threads"] == torch.get_num_threads()
    places = [str(Path.cwd()), str(ROOT), str(Path.home()) + "/", platform.node() or "a host"]
    assert not [place for place in places if place in json.dumps(report)]


def goes_on(tmp_path: Path, **change: Any) -> bool:
    """Whether a report that was written with other entries goes on, which it does with its rows."""
    out, rows = str(tmp_path / "made" / "b.json"), [{"name": "a"}]
    write_report(begin_report(CONFIG, []) | {"rows": rows} | change, out)
    found = unfinished_rows(begin_report(CONFIG, ["data"]), out)
    assert found in (rows, [])
    return found == rows


def test_a_report_goes_on_only_if_it_was_cut_short_and_nothing_has_changed(tmp_path: Path) -> None:
    assert goes_on(tmp_path)
    for change in ({"finished": True}, {"versions": {}}, {"machine": {"card": "other"}}, {"settings": {}}):
        assert not goes_on(tmp_path, **change), change
    assert goes_on(tmp_path, versions=begin_report(CONFIG, [])["versions"] | {"driver": "580.1"})  # of the same card


@pytest.mark.parametrize("content", [None, "no json", "[]", "{}"])
def test_a_file_that_is_no_report_holds_no_rows(content: str | None, tmp_path: Path) -> None:
    out = tmp_path / "b.json"
    if content is not None:
        out.write_text(content)
    assert unfinished_rows(begin_report(CONFIG, []), str(out)) == []


def test_the_table_has_the_columns_that_any_row_has() -> None:
    rows = [{"name": "a", "samples_per_second": 1234.5, "mfu": 0.25}, {"name": "b", "reason": "error: no memory"}]
    heading, first, second = rows_table(rows).splitlines()
    assert heading.split() == ["samples/s", "MFU", "reason"]
    assert first.split() == ["a", "1,234.500", "25.0%"] and second.split() == ["b", "error:", "no", "memory"]
