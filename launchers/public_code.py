"""The public VAR code as something to measure beside: found in a checkout that the user has, run in its own process.

It gets our weights in its own format, so that both do the same work. Nothing of it lies in this project.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from launchers.export_weights import write_public
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
        self.peak_bytes = 0  # of the worst call so far, on a GPU
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
        self._ask(self._settings)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()
        self._folder.cleanup()

    def call(self, what: str, *, batch: int, **settings: Any) -> int:
        """Do `what` (train_step, sample, encode or decode) with `batch` images, to the end; returns how many."""
        answer = self._ask({"what": what, "batch": batch, **settings})
        self.peak_bytes = max(self.peak_bytes, answer["peak_bytes"])
        return batch

    def timed(self, what: str, *, batch: int, **settings: Any) -> Callable[[], int]:
        """The same as something to time."""
        return lambda: self.call(what, batch=batch, **settings)

    def peak(self) -> dict[str, int]:
        """The column of a row that only this process knows."""
        return {"peak_bytes": self.peak_bytes} if self.peak_bytes else {}

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


def check_checkout(checkout: str) -> None:
    """Raise FileNotFoundError where the public code is not at `checkout`."""
    for name in NEEDED:
        if not (Path(checkout) / name).is_file():
            raise FileNotFoundError(
                f"against is {checkout!r}, which has no {name}; give the folder of a clone of FoundationVision/VAR"
            )
