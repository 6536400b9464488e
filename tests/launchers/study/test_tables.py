"""The report's tables: every number as it was measured, aligned, and no table of nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from study_examples import planted_fit, planted_runs, planted_study

from launchers.study import tables
from launchers.study.reading import Source
from training.laws.study_fit import COMPUTE, PARAMETERS

RUNS = planted_runs((6, 8, 10), noise=1e-3)
STUDY, FIT = planted_study(RUNS), planted_fit(RUNS)


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]


def test_all_tables_are_rectangular_and_without_rows_there_is_none() -> None:
    study = replace(STUDY, source=Source({"loss_last": 4.2, "loss_avg": 5.0}, {}))
    bare = replace(STUDY, runs=tuple(replace(run, training={}) for run in STUDY.runs))
    nothing = replace(FIT, laws=(), frontiers=(), parametric=(), seeds=())
    for read, fit in ((study, FIT), (bare, nothing)):
        laws = tables.laws_of(fit, PARAMETERS)
        found = [tables.laws_table(laws), tables.trust_table(laws), tables.held_out_table(laws)]
        found += [tables.sensitivity_table(laws), tables.frontier_table(fit), tables.parametric_table(fit)]
        found += [tables.seeds_table(fit), tables.gap_table(read), tables.entropy_table(read)]
        found += [tables.irreducible_table(read, fit)]
        if fit is nothing:
            assert set(found) == {""}
        found += [tables.runs_table(read), tables.metrics_table(read), tables.compute_table(read)]
        for table in filter(None, found):
            assert len({len(row) for row in cells(table)}) == 1 and len(cells(table)) > 2


def test_compute_is_counted_four_ways() -> None:
    row = cells(tables.compute_table(STUDY))[2]
    totals = [RUNS[0].compute(name)[-1] for name in ("exact", "dense_mask", "six_nt", "paper")]
    assert row[0] == "d6-seed0" and [float(cell) for cell in row[2:6]] == pytest.approx(totals, rel=1e-5)
    assert float(row[7]) == pytest.approx(totals[2] / totals[0], rel=1e-5)
    gap = cells(tables.gap_table(STUDY))[2]
    assert float(gap[3]) == float(gap[5]) == pytest.approx(0.05), "validation minus training"


def test_a_reason_is_said_once_for_all_its_sizes_and_metrics() -> None:
    laws = [law for law in FIT.laws if law.variable == COMPUTE]
    common = ("d6: too early", "d8: too early", "12 points lie outside")
    laws = [replace(law, left_out=common + (("d8: odd",) if law.metric == "loss_avg" else ())) for law in laws]
    assert tables.left_out_lines(laws) == [
        *("d6, d8: too early (all metrics)", "12 points lie outside (all metrics)", "d8: odd (loss_avg)")
    ]


def test_the_lowest_loss_of_each_run_stands_beside_the_entropy() -> None:
    source = Source({"loss_last": 6.0, "loss_avg": 6.5}, {"loss_last": 6.01})
    rows = cells(tables.entropy_table(replace(STUDY, source=source)))[2:]
    assert len(rows) == 2 * len(RUNS)
    lowest = np.nanmin(RUNS[0].metrics["loss_last"])
    assert float(rows[0][5]) == pytest.approx(lowest - 6.0, abs=1e-5)
    assert float(rows[0][6]) == pytest.approx(lowest - 6.01, abs=1e-5) and rows[-1][6] == "–"
