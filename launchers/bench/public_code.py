"""The public VAR code as something to measure beside: found in a checkout that the user has, run in its own process.

It gets our weights in its own format, so that both do the same work. Nothing of it lies in this project.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from launchers.setup.loading import write_public
from models.reference import check_public
from models.var import SHARED_ADALN, VAR
from models.vqvae import VQVAE

WORKER = Path(__file__).with_name("public_worker.py")
NEEDED = ("models/var.py", "models/vqvae.py", "models/quant.py", "utils/amp_sc.py")


class PublicCode:
    """The public models with the weights of ours, behind a pipe. Use it in a `with` statement.

    Raises FileNotFoundError for a path without the public code, ValueError for models it cannot have, or with the last
    line that it printed when it fails.
    """

    def __init__(self, checkout: str, var: VAR, tokenizer: VQVAE, *, precision: str) -> None:
        check_checkout(checkout)
        check_public(var.config)
        self._folder = tempfile.TemporaryDirectory()
        self._errors: BinaryIO = (Path(self._folder.name) / "stderr").open("w+b")
        folder = Path(self._folder.name)
        write_public(folder / "var.pth", var)
        write_public(folder / "tokenizer.pth", tokenizer)
        config = var.config
        self._settings = {
            "checkout": str(Path(checkout).resolve()),
            "folder": str(folder),
            "precision": precision,
            "patch_nums": list(config.patch_nums),
            "vocab_size": config.vocab_size,
            "code_width": config.code_width,
            "tokenizer_width": tokenizer.config.autoencoder.width,
            "num_classes": config.num_classes,
            "depth": config.depth,
            "shared_adaln": config.norm == SHARED_ADALN,
        }
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> PublicCode:
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self._ask(self._settings)
        except BaseException:  # what is not entered is not left
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        with suppress(BrokenPipeError):  # it may have ended without reading its last request
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()
        self._folder.cleanup()

    def timed(self, what: str, *, batch: int, **settings: Any) -> PublicCall:
        """Doing `what` (train_step, sample, encode or decode) with `batch` images, as something to time."""
        work = {"what": what, "batch": batch, **settings}
        return PublicCall(lambda: self._ask(work), batch, release=lambda: self._ask({"what": "release"}))

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # what it said at the end is told below
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(
                f"the public code in {self._settings['checkout']} stopped: {self._last_words()}; "
                "see that what its requirements.txt names is installed"
            )
        return json.loads(line)

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


class PublicCall:
    """One kind of work of the public code. A call does it to the end, and returns how many images it was."""

    def __init__(self, work: Callable[[], dict[str, int]], batch: int, *, release: Callable[[], object]) -> None:
        """work: does it, and tells the memory that it took. release: gives back what is kept for the next call."""
        self._work = work
        self._release = release
        self._batch = batch
        self._memory: dict[str, int] = {}

    def __call__(self) -> int:
        self._memory = self._work()
        return self._batch

    def memory(self) -> dict[str, int]:
        """`peak_bytes` and `working_bytes` of the latest call on a GPU, as benchmark_timing.py has them; else empty."""
        return self._memory

    def release(self) -> None:
        """Let other processes have the GPU memory that this one does not use between two calls."""
        self._release()


def check_checkout(checkout: str) -> None:
    """Raise FileNotFoundError where the public code is not at `checkout`."""
    for name in NEEDED:
        if not (Path(checkout) / name).is_file():
            raise FileNotFoundError(
                f"against is {checkout!r}, which has no {name}; give the folder of a clone of FoundationVision/VAR"
            )
