"""The memory benchmark sets predictions beside what a step through DeepSpeed allocates."""

from __future__ import annotations

import pytest
from fork_world import ForkServer

from launchers.bench.memory import MeasuredStep, compare


def test_errors_are_relative_to_what_was_measured() -> None:
    rows = compare("d8", MeasuredStep(10, 20, 110, 40), MeasuredStep(10, 25, 100, 50))
    assert [row["error"] for row in rows] == pytest.approx([0, -0.2, 0.1, -0.2, 0.1])
    assert rows[-1]["name"] == "d8: peak" and rows[-1]["peak_bytes"] == 100


@pytest.mark.slow
def test_every_stage_and_way_of_checkpointing_is_measured(fork_server: ForkServer) -> None:
    world = fork_server.run("memory_worker:benchmark", {"depth": 2, "batch": 2}, world_size=1, timeout=300)
    assert world.exit_codes == [0], world.explain()
    rows = world.results[0]
    assert len(rows) == 2 * 3 * 5 and all(row["peak_bytes"] > 0 for row in rows)
