"""Drawing the images of a sampling plan, unit by unit, over the ranks: models in, uint8 pictures into the files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

from launchers.sampling.files import SampleFiles
from launchers.sampling.pictures import to_uint8
from launchers.sampling.plan import SamplePlan
from models.generation import generate_scales
from models.sampling import Sampling
from models.var import VAR
from models.vqvae import VQVAE
from training.engine.distributed import World, agree_on_error
from training.engine.engine import PRECISIONS
from training.engine.host_memory import keep_freed_memory

import numpy as np
import torch
from torch import Tensor

DECODED_TOGETHER = 4  # images; on a CPU they are decoded one by one
SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True)
class Sampler:
    """A pair of models that draws a unit so that no image depends on the others around it.

    Matrix products of another shape, or split over threads in another way, are rounded differently. So batches are
    padded to one size, and decoded a fixed number of images at a time: on the CPU one, by one thread.
    """

    var: VAR
    tokenizer: VQVAE
    sampling: Sampling
    plan: SamplePlan

    def draw(self, unit: int) -> np.ndarray:
        """Draw the images of a unit, (n, H, W, 3) uint8."""
        images = self.plan.unit(unit)
        padded = np.resize(images, self.plan.batch)  # by repeating them
        labels = torch.from_numpy(self.plan.labels(padded)).to(self.var.position_embedding.device)
        seeds = torch.from_numpy(self.plan.seeds(padded))
        drawn = generate_scales(self.var, self.tokenizer, labels, self.sampling, seeds=seeds)
        if self.sampling.smooth:
            return decode_in_parts(self.tokenizer.decode_features, drawn.f_hat[: len(images)])
        # not from f_hat, whose last bit depends on the size of the batch
        return decode_in_parts(self.tokenizer.decode, drawn.codes[: len(images)])


def speed_up(var: VAR, tokenizer: VQVAE, precision: str, *, compiles: bool) -> None:
    """Make two frozen models fast, once they are on their device.

    precision: of the transformer, and of the decoder if it is bf16; in fp16 the decoder would overflow and stays in
    fp32. compiles: compile the transformer's steps, and on a GPU the decoder; on a CPU that gains nothing.
    """
    keep_freed_memory()
    var.to(PRECISIONS[precision])
    tokenizer.prepare_decoder(PRECISIONS[decoder_precision(precision)])
    if compiles:
        compile_both(var, tokenizer)


def decoder_precision(precision: str) -> str:
    """Choose the decoder's precision beside a transformer in `precision`."""
    return "bf16" if precision == "bf16" else "fp32"


def compile_both(var: VAR, tokenizer: VQVAE) -> None:
    """Compile the transformer's steps, and on a GPU the decoder, of models that are prepared otherwise."""
    var.compile_generation()
    if var.position_embedding.device.type != "cpu":
        tokenizer.decoder.compile(dynamic=False)


def decode_in_parts(decode: Callable[[Tensor], Tensor], source: Tensor) -> np.ndarray:
    """Decode `source` (n, ...) into images (n, H, W, 3) uint8, always the same number of them together."""
    number, on_cpu = len(source), source.device.type == "cpu"
    together = 1 if on_cpu else DECODED_TOGETHER
    rows = torch.arange(-(-number // together) * together, device=source.device) % number
    parts = source[rows].split(together)
    if not on_cpu:
        return to_uint8(torch.cat([decode(part) for part in parts])[:number])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of each of the workers; the parts share the cores instead
    try:
        with ThreadPoolExecutor(threads) as workers:
            return np.concatenate([to_uint8(images) for images in workers.map(decode, parts)])[:number]
    finally:
        torch.set_num_threads(threads)


def draw_all(
    sampler: Sampler, files: SampleFiles, pending: Sequence[int], world: World, report: Callable[[str], None]
) -> None:
    """Draw and store the pending units, one on each rank at a time. A collective: where one rank fails, all stop.

    Raises:
        OSError: the disk is full or gone.
        ValueError: another rank had an error, or the batch is too large for the GPU.
    """
    plan = sampler.plan
    progress = Progress(plan.num_images, sum(len(plan.unit(unit)) for unit in pending), report)
    writing: Future[None] | None = None
    with ThreadPoolExecutor(1) as writer:  # stores a unit while the next one is drawn
        for first in range(0, len(pending), world.world_size):
            together = pending[first : first + world.world_size]
            mine = together[world.rank : world.rank + 1]  # none on the last ranks, at the end
            images, error = draw_one(sampler, mine[0]) if mine else (None, None)
            agree_on_error(failure_of(writing) or error, world)
            writing = writer.submit(files.write, mine[0], images) if images is not None else None
            progress.add(sum(len(plan.unit(unit)) for unit in together))
        agree_on_error(failure_of(writing), world)


def draw_one(sampler: Sampler, unit: int) -> tuple[np.ndarray | None, Exception | None]:
    """Draw a unit; return its images, or the error if a user can do something about it."""
    try:
        return sampler.draw(unit), None
    except torch.OutOfMemoryError:
        return None, ValueError(f"batch is {sampler.plan.batch}, too large for the GPU's memory; choose a smaller one")
    except ValueError as error:
        return None, error


def failure_of(writing: Future[None] | None) -> Exception | None:
    """Wait for a unit to be stored; return the error if a user can do something about it."""
    try:
        if writing is not None:
            writing.result()
    except (OSError, ValueError) as error:
        return error
    return None


class Progress:
    """A line every few seconds, and at the end: how many images there are, and how long the others will take."""

    def __init__(self, total: int, left: int, report: Callable[[str], None]) -> None:
        self.total, self.left, self.report = total, left, report
        self.drawn = 0
        self.started = self.reported = time.monotonic()

    def add(self, images: int) -> None:
        """Count images that have been drawn."""
        self.drawn += images
        self.left -= images
        now = time.monotonic()
        if now - self.reported < SECONDS_BETWEEN_LINES and self.left:
            return
        self.reported = now
        rate = self.drawn / max(now - self.started, 1e-9)
        to_go = timedelta(seconds=round(self.left / rate))
        self.report(f"images {self.total - self.left:,} of {self.total:,}  {rate:.3g}/s  {to_go} to go")
