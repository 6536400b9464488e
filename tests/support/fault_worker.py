"""What the ranks of forked worlds do while faults are injected: write checkpoints, or train as the launcher does."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from seams import reach
from tiny import VAR_CONFIG, PlainEngine
from torch import Tensor, nn

from data_pipeline.loading import loader
from data_pipeline.loading.datasets import CodeDataset
from launchers import train as train_launcher
from training.checkpoints.checkpoint import CheckpointFailed, Checkpoints, Retention, TrainState
from training.engine.distributed import World, join_world, leave_world
from training.losses import TokenScores, token_scores
from training.supervision.bad_samples import BadSamples, TooManyBadSamples
from training.supervision.stopping import LOOK_SECONDS, Stopping
from training.var_loop import VARStage


def make_engine() -> PlainEngine:
    """A few numbers that two or three ranks cannot share evenly."""
    model = nn.Linear(7, 3)
    model.register_buffer("count", torch.zeros(()))
    return PlainEngine(model)


def set_step(engine: PlainEngine, step: int) -> None:
    """Make everything that a checkpoint holds a function of the step."""
    shapes = {name: tensor.shape for name, tensor in engine.state.tensors()}
    engine.state.load(lambda name: torch.full(shapes[name], step + len(name) / 100))
    engine.state.load_scalars({"step": float(step)})


def content(engine: PlainEngine) -> dict[str, Any]:
    """Everything that a checkpoint must bring back, as plain data."""
    return {name: tensor.flatten().tolist() for name, tensor in engine.state.tensors()} | engine.state.scalars()


def content_at(step: int) -> dict[str, Any]:
    """The content of the checkpoint of a step."""
    engine = make_engine()
    set_step(engine, step)
    return content(engine)


def open_checkpoints(root: Path, world: World, said: list[str]) -> Checkpoints:
    return Checkpoints(
        root,
        retention=Retention(last=2),
        world=world,
        model_config=VAR_CONFIG,
        identity={"seed": 0},
        report=said.append,
    )


def save_checkpoints(root: str, saves: int) -> dict[str, Any]:
    """Resume, then go on for `saves` steps with a checkpoint of each, whether or not one fails."""
    world = join_world(timeout_seconds=60)
    outcome: dict[str, Any] = {"resumed": None, "content": None, "said": [], "failures": [], "saved": []}
    engine = make_engine()
    checkpoints = open_checkpoints(Path(root), world, outcome["said"])
    state = checkpoints.resume({"model": engine})
    if state is not None:
        outcome |= {"resumed": state.step, "content": content(engine)}
    state = state or TrainState()
    for _ in range(saves):
        state.step += 1
        set_step(engine, state.step)
        try:
            outcome["saved"].append(checkpoints.save({"model": engine}, state).name)
        except CheckpointFailed as failure:
            outcome["failures"].append(str(failure))
    leave_world()
    return outcome


class NothingAhead(Iterator[Any]):
    """Asks for an item when it is asked for one; in the place of ThreadAhead."""

    def __init__(self, items: Iterator[Any], **_: Any) -> None:
        self._items = items

    def __next__(self) -> Any:
        return next(self._items)

    def close(self) -> None:
        """Nothing is to be ended."""


def train(arguments: list[str], attempt: int, samples: str) -> None:
    """launchers/train.py with a command line. Notes which samples this rank reads in `samples`, before each step.

    A line holds the attempt, the rank, and the numbers and epochs of the samples of one micro-batch.
    """
    read = CodeDataset.read_narrow

    def noting_read(dataset: CodeDataset, ids: np.ndarray, epochs: np.ndarray) -> tuple[Tensor, Tensor]:
        if Path(dataset.folder).name == "train":
            line = {"attempt": attempt, "rank": int(os.environ["RANK"]), "ids": ids.tolist(), "epochs": epochs.tolist()}
            with open(samples, "a") as file:
                file.write(json.dumps(line) + "\n")
        return read(dataset, ids, epochs)

    CodeDataset.read_narrow = noting_read
    loader.ThreadAhead = NothingAhead  # what is read ahead is not what a step takes
    CodeDataset.read_together = 1  # nor what is read with it
    CodeDataset.try_one = lambda dataset: None  # reads a sample that no step sees
    VARStage.train_step = faulty(VARStage.train_step)
    sys.argv = ["train.py", *arguments]
    train_launcher.main()


def faulty(train_step: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """A stage's step behind the seam "loop.step", and the loss of each of its forward passes behind "loop.loss"."""

    def score(*arguments: Any) -> TokenScores:
        scores = token_scores(*arguments)
        return replace(scores, loss=reach("loop.loss", scores.loss))

    def step(*arguments: Any) -> dict[str, Tensor]:
        reach("loop.step")
        with mock.patch("training.var_loop.token_scores", score):
            return train_step(*arguments)

    return step


def share_bad_samples(run: str, limit: int, met: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Share what each rank has met, once; what this one then knows, said, and is refused for."""
    world = join_world(timeout_seconds=60)
    said: list[str] = []
    bad = BadSamples(Path(run), limit, world, lambda: met[world.rank])
    count = bad.share(said.append)["bad_samples"]
    refused = ""
    try:
        bad.refuse_too_many()
    except TooManyBadSamples as error:
        refused = str(error)
    leave_world()
    return {"count": count, "said": said, "refused": refused}


def agree_to_stop(run: str) -> list[str]:
    """Ask in each of five steps whether to stop; rank 0 makes the stop file in the third."""
    world = join_world(timeout_seconds=60)
    stopping, answers = Stopping(Path(run), world), []
    for step in range(5):
        if step == 2 and world.is_rank_zero:
            (Path(run) / "stop").touch()
            time.sleep(LOOK_SECONDS)
        answers.append(stopping.agreed())
    leave_world()
    return answers


def say_hello(numbers: list[int]) -> dict[str, Any]:
    """For tests of the harness: pass two seams for each number, and return what came out."""
    return {
        "rank": os.environ["RANK"],
        "passed": [[reach("hello.first", number), reach("hello.second", number)] for number in numbers],
    }
