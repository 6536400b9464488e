"""Every way to end has its code and its one line, and what is a mistake in the program stays a traceback."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from repository import ROOT

from data_pipeline.files.claim import Claimed
from data_pipeline.files.damage import DamagedData
from data_pipeline.loading.ahead import WorkerFailed
from data_pipeline.remote.open import RemoteError
from launchers.setup import exit_codes
from launchers.setup.exit_codes import EXIT_ERROR, EXIT_LOST_PEERS, describe, exit_code, lost_its_peers
from training.checkpoints.checkpoint import CheckpointsFailing
from training.checkpoints.commit import DamagedCheckpoint, UnreadableCheckpoint
from training.engine.distributed import RankFailure, World, sum_over_ranks
from training.supervision.bad_samples import TooManyBadSamples
from training.supervision.divergence import TrainingDiverged
from training.supervision.stopping import Stopped
from training.supervision.watch import EXIT_NO_PROGRESS
from training.tracking.mlflow import TrackerUnavailable

# what gloo said when a peer was killed, and when it was silent
CLOSED = "[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1967. This is typically a crash."
SILENT = "[/x/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete"
ENDINGS: list[tuple[BaseException, int]] = [
    (ValueError("x"), 64),
    (FileNotFoundError("x"), 64),
    (PermissionError(errno.EACCES, "Permission denied", "data"), 64),
    (DamagedCheckpoint("x"), 65),
    (DamagedData("x"), 65),
    (TooManyBadSamples("x"), 65),
    (TrackerUnavailable("x"), 69),
    (RemoteError("x"), 69),
    (TrainingDiverged("x"), 70),
    (WorkerFailed("x"), 71),
    (OSError(errno.ENOSPC, "No space left on device", "runs/a"), 73),
    (Claimed("x"), 73),
    (OSError(errno.EROFS, "Read-only file system", "runs/a"), 73),
    (UnreadableCheckpoint("x"), 74),
    *((OSError(number, os.strerror(number), "runs/a"), 74) for number in (errno.EIO, errno.ESTALE, errno.EMFILE)),
    *((OSError(number, os.strerror(number)), 74) for number in (errno.ECONNRESET, errno.ETIMEDOUT, errno.EPIPE)),
    (RankFailure("rank 1: stale file handle", errno.ESTALE, None), 74),
    (RankFailure("rank 1: no space left", errno.ENOSPC, None), 73),
    (RankFailure("rank 1: damaged shard", None, 65), 65),
    (RankFailure("rank 1: no such file", errno.ENOENT, None), 64),
    (CheckpointsFailing(errno.ENOSPC, "No space left on device", "runs/a"), 74),
    (Stopped("SIGUSR1 on rank 1", Path("runs/a/checkpoints/step-7")), 75),
    (RuntimeError(CLOSED), 76),
    (RuntimeError(SILENT), 76),
    (dist.DistNetworkError("The client socket has timed out after 4000ms"), 76),
    (KeyboardInterrupt(), 130),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), EXIT_ERROR),
    (KeyError("x"), EXIT_ERROR),
]


@pytest.mark.parametrize(("error", "code"), ENDINGS, ids=lambda value: getattr(type(value), "__name__", None))
def test_each_exception_has_its_code(error: BaseException, code: int) -> None:
    assert exit_code(error) == code
    assert "\n" not in describe(error)


def test_the_table_for_people_has_every_code_of_the_source() -> None:
    documented = {int(code) for code in re.findall(r"^(\d+)", exit_codes.__doc__ or "", re.MULTILINE)}
    sources = [
        path.read_text() for top in ("training", "data_pipeline", "launchers") for path in (ROOT / top).rglob("*.py")
    ]
    written = {int(code) for text in sources for code in re.findall(r"exit_code: ClassVar\[int\] = (\d+)", text)}
    assert len(written) >= 6 and written <= documented
    assert EXIT_NO_PROGRESS == EXIT_LOST_PEERS and {code for _, code in ENDINGS} <= documented


def test_no_package_of_ours_and_no_torch_is_needed_to_know_a_code() -> None:
    program = (
        "import sys; from launchers.setup.exit_codes import exit_code; assert exit_code(ValueError()) == 64;"
        "print([name for name in sys.modules if name.partition('.')[0] in ('torch', 'training', 'data_pipeline')])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"


def test_a_lost_peer_is_one_line_that_names_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def collective(values: torch.Tensor) -> None:
        raise RuntimeError(CLOSED)

    monkeypatch.setattr(dist, "all_reduce", collective)
    with pytest.raises(RuntimeError) as caught:
        sum_over_ranks(torch.zeros(1), World(world_size=2))
    assert describe(caught.value).startswith("lost another rank in distributed.sum_over_ranks; see its own message. ([")


def test_a_silent_peer_is_said_to_be_silent() -> None:
    assert describe(RuntimeError(SILENT)).startswith("waited in vain for another rank in a collective;")


def test_a_rendezvous_without_the_others_is_a_lost_peer() -> None:
    with pytest.raises(Exception) as caught:
        dist.TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=0.2), wait_for_workers=True)
    assert lost_its_peers(caught.value) and exit_code(caught.value) == 76


def test_a_port_that_is_taken_is_a_matter_of_settings() -> None:
    store = dist.TCPStore("127.0.0.1", 0, 1, True)
    with pytest.raises(dist.DistNetworkError) as caught:
        dist.TCPStore("127.0.0.1", store.port, 1, True)
    assert exit_code(caught.value) == 64 and "MASTER_PORT is in use" in describe(caught.value)
