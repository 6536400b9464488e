"""Under DeepSpeed, too, no switch that trades speed or memory changes twenty losses by more than rounding."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT, SUPPORT
from workers import importing

WORKER = SUPPORT / "switches_worker.py"


@pytest.mark.slow
@pytest.mark.gpu  # there also FlexAttention
def test_twenty_losses_of_each_switch_are_the_plain_ones(tmp_path: Path) -> None:
    command = [sys.executable, str(WORKER), str(tmp_path / "losses.json")]
    environment = importing(ROOT, SUPPORT)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    losses = json.loads((tmp_path / "losses.json").read_text())
    plain = losses.pop("plain")
    assert plain[-1] < plain[0] - 0.01 and len(plain) == 20 and len(losses) >= 9
    for switch, found in losses.items():
        assert found == pytest.approx(plain, rel=1e-4), switch
