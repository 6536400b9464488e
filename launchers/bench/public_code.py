"""The public VAR code as something to measure beside ours: found in a user's checkout, run in a process of its own.

It gets our weights in its own format, the same precision and as many threads as this process has, so that both do the
same work with the same means. Nothing of it lies in this project.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from launchers.setup.loading import write_public
from models.reference import check_public
from models.var import SHARED_ADALN, VAR
from models.vqvae import VQVAE

import torch

WORKER = Path(__file__).with_name("public_worker.py")
NEEDED = ("models/var.py", "models/vqvae.py", "models/quant.py", "utils/amp_sc.py")


class PublicCode:
    """The public models with the weights of ours, behind a pipe. Use it in a `with` statement.

    Raises:
        FileNotFoundError: the public code is not at the path.
        ValueError: the public code has no such models; or it failed, with the last line that it printed.
    """

    def __init__(self, checkout: str, var: VAR, tokenizer: VQVAE, *, precision: str) -> None:
        for name in NEEDED:
            if not (Path(checkout) / name).is_file():
                raise FileNotFoundError(
                    f"against is {checkout!r}, which has no {name}; give the folder of a clone of FoundationVision/VAR"
                )
        check_public(var.config)
        self._models = (var, tokenizer)
        self._checkout, self._precision = str(Path(checkout).resolve()), precision
        self._folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> PublicCode:
        folder, (var, tokenizer) = Path(self._folder.name), self._models
        write_public(folder / "var.pth", var)
        write_public(folder / "tokenizer.pth", tokenizer)
        with (folder / "stderr").open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        config = var.config
        settings = {
            "checkout": self._checkout,
            "folder": str(folder),
            "precision": self._precision,
            "threads": torch.get_num_threads(),
            "patch_nums": list(config.patch_nums),
            "vocab_size": config.vocab_size,
            "code_width": config.code_width,
            "tokenizer_width": tokenizer.config.autoencoder.width,
            "num_classes": config.num_classes,
            "depth": config.depth,
            "shared_adaln": config.norm == SHARED_ADALN,
        }
        assert self._process.stdin and self._process.stdout, "pipes were asked for"
        self._requests, self._answers = self._process.stdin, self._process.stdout
        try:
            self.ask(settings)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(BrokenPipeError):  # it may have ended without reading its last request
            self._requests.close()
        self._process.kill()
        self._process.wait()
        self._answers.close()
        self._folder.cleanup()

    def timed(self, what: str, *, batch: int, **settings: Any) -> PublicCall:
        """Return a call that does `what` (train_step, sample, encode or decode) with `batch` images."""
        return PublicCall(self, {"what": what, "batch": batch, **settings})

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        with suppress(BrokenPipeError):  # its last words are told below
            print(json.dumps(request), file=self._requests, flush=True)
        line = self._answers.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        printed = (Path(self._folder.name) / "stderr").read_text(errors="replace").strip() or "it said nothing"
        raise ValueError(
            f"the public code in {self._checkout} stopped: {printed.splitlines()[-1]}; "
            "see that what its requirements.txt names is installed"
        )


class PublicCall:
    """One kind of work of the public code. Calling it does the work to its end, and returns how many images it was."""

    def __init__(self, public: PublicCode, request: dict[str, Any]) -> None:
        self._public = public
        self._request = request
        self.memory: dict[str, int] = {}  # on a GPU peak_bytes and working_bytes of the latest call (timing.py)

    def __call__(self) -> int:
        self.memory = self._public.ask(self._request)
        return self._request["batch"]

    def release(self) -> None:
        """Let other processes have the GPU memory that this one does not use between two calls."""
        self._public.ask({"what": "release"})
