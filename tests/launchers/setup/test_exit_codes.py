"""Every way to end has its code and its one line, and what is a mistake in the program stays a traceback."""

from __future__ import annotations

import errno
import re
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data_pipeline.loading.read_ahead import WorkerFailed
from launchers.setup import exit_codes
from launchers.setup.exit_codes import CODES, EXIT_ERROR, describe, exit_code, lost_its_peers
from training.checkpoints.checkpoint import CheckpointsFailing
from training.checkpoints.commit import DamagedCheckpoint
from training.supervision.divergence import TrainingDiverged
from training.supervision.stopping import Stopped
from training.tracking.mlflow import TrackerUnavailable

# what gloo said when a peer was killed, and when it was silent
CLOSED = "[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1967. This is typically a crash."
SILENT = "[/x/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete"


@pytest.mark.parametrize(
    "error, code",
    [
        (ValueError("x"), 64),
        (FileNotFoundError("x"), 64),
        (PermissionError(errno.EACCES, "Permission denied", "data"), 64),
        (DamagedCheckpoint("x"), 65),
        (TrackerUnavailable("x"), 69),
        (TrainingDiverged("x"), 70),
        (WorkerFailed("x"), 71),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), 73),
        (OSError(errno.EROFS, "Read-only file system", "runs/a"), 73),
        (CheckpointsFailing("x"), 74),
        (Stopped("SIGUSR1 on rank 1", Path("runs/a/checkpoints/step-7")), 75),
        (RuntimeError(CLOSED), 76),
        (RuntimeError(SILENT), 76),
        (dist.DistNetworkError("The client socket has timed out after 4000ms"), 76),
        (KeyboardInterrupt(), 130),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), EXIT_ERROR),
        (KeyError("x"), EXIT_ERROR),
        (AssertionError("x"), EXIT_ERROR),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_each_exception_has_its_code(error: BaseException, code: int) -> None:
    assert exit_code(error) == code
    assert "\n" not in describe(error)


def test_the_documented_codes_are_those_of_the_table() -> None:
    documented = {int(code) for code in re.findall(r"^(\d+)", exit_codes.__doc__ or "", re.MULTILINE)}
    assert set(CODES.values()) <= documented
    assert {0, 1, 73, 76} <= documented


def collective() -> None:
    raise RuntimeError(CLOSED)


def test_a_lost_peer_is_one_line_that_names_the_place() -> None:
    try:
        dist_error_in_our_code()
    except RuntimeError as error:
        line = describe(error)
    assert line.startswith("lost another rank in distributed.sum_over_ranks; see its own message. ([")


def dist_error_in_our_code() -> None:
    from training.engine.distributed import World, sum_over_ranks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.engine.distributed.dist.all_reduce", lambda values: collective())
        sum_over_ranks(torch.zeros(1), World(world_size=2))


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
