"""The recorder sees the bytes that live at a mark, and the most that lived before it."""

from __future__ import annotations

import pytest
import torch
from allocations import AllocationRecorder

MIB = 2**20


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it counts the GPU's bytes")
def test_live_and_peak_bytes_are_those_of_the_tensors() -> None:
    with AllocationRecorder() as recorder:
        kept = torch.ones(4 * MIB, dtype=torch.uint8)
        torch.ones(16 * MIB, dtype=torch.uint8)
        recorder.mark("first")
        more = torch.ones(2 * MIB, dtype=torch.uint8)
        recorder.mark("second")
        del kept, more
        recorder.mark("third")
    first, second, third = recorder.phases
    assert [phase.name for phase in recorder.phases] == ["first", "second", "third"]
    assert first.live == pytest.approx(4 * MIB, rel=0.01) and first.peak == pytest.approx(20 * MIB, rel=0.01)
    assert second.live == pytest.approx(6 * MIB, rel=0.01) and second.peak == pytest.approx(6 * MIB, rel=0.01)
    assert third.live == pytest.approx(0, abs=MIB / 10)
