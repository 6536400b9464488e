"""A training run of a few steps in forked ranks: its command line, what it recorded, and which samples it used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fork_world import EndedWorld, ForkServer, RunningWorld
from tiny import VQVAE_CONFIG, Study, make_study

from data_pipeline.loading.plan import Plan
from data_pipeline.shards.index import Index
from training.checkpoints import commit

GLOBAL_BATCH, STEPS, CHECKPOINT_EVERY = 4, 12, 3
# what depends on the clock
INCIDENTAL = ("images_per_second", "tokens_per_second", "data_wait_share", "goodput", "time")
ODD = replace(VQVAE_CONFIG, quantizer=replace(VQVAE_CONFIG.quantizer, vocab_size=17))  # what two ranks cannot halve


def make_odd_study(folder: Path) -> Study:
    return make_study(folder, ODD)


@dataclass
class Run:
    """One run folder, and the command that starts and resumes it."""

    server: ForkServer
    study: Study
    folder: Path
    settings: Sequence[str] = ()  # as on the command line, after those that all runs here share
    attempts: int = field(default=0)

    def command_line(self) -> list[str]:
        codes = self.study.folder / "codes"
        epochs = STEPS * GLOBAL_BATCH / Index.read(codes / "train").num_samples
        model = ["depth=1", "patch_nums=[1,2]", "vocab_size=17", "code_width=4", "num_classes=3"]
        loop = [f"global_batch={GLOBAL_BATCH}", f"epochs={epochs}", "log_every=2", "validate_every=2"]
        engine = ["zero_stage=3", "precision=fp32", "micro_batch=2", "reduce_bucket_size=1000000"]
        engine += ["prefetch_bucket_size=100000", "persistence_threshold=100"]
        return [
            *(f"run={self.folder}", f"tokenizer={self.study.folder / 'tokenizer'}"),
            *(f"data.train={codes / 'train'}", f"data.validation={codes / 'val'}", "data.workers=0"),
            *(f"model.{setting}" for setting in model),
            *(f"engine.{setting}" for setting in engine),
            *(f"loop.{setting}" for setting in [*loop, f"checkpoint_every={CHECKPOINT_EVERY}"]),
            *("optimizer.base_lr=0.064", "tracking.mlflow=false", *self.settings),
        ]

    def start(self, *settings: str, world_size: int = 2, **options: Any) -> RunningWorld:
        """Type the command, with more settings if need be."""
        self.attempts += 1
        arguments = {
            "arguments": [*self.command_line(), *settings],
            "attempt": self.attempts,
            "samples": str(self.folder) + ".samples",
        }
        return self.server.start("fault_worker:train", arguments, world_size=world_size, **options)

    def go(self, *settings: str, expect: int | None = 0, faults_may_miss: bool = False, **options: Any) -> EndedWorld:
        """Type the command and see it end, on all ranks with the exit code `expect` unless that is None."""
        world = self.start(*settings, **options).wait(faults_may_miss=faults_may_miss)
        assert expect is None or set(world.exit_codes) == {expect}, world.explain()
        return world

    def records(self) -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [{name: value for name, value in json.loads(line).items() if name not in INCIDENTAL} for line in lines]

    def curve(self, name: str = "loss_avg") -> list[float | None]:
        return [record[name] for record in self.records() if record["kind"] == "train"]

    def history(self, event: str) -> list[dict[str, Any]]:
        lines = map(json.loads, (self.folder / "history.jsonl").read_text().splitlines())
        return [line for line in lines if line["event"] == event]

    def saved_steps(self) -> list[int]:
        """The steps of the checkpoints there are, oldest first; each of them must be whole."""
        steps = []
        for folder in reversed(commit.candidates(self.folder / "checkpoints")):
            manifest = commit.read_manifest(folder)
            assert not commit.structural_damage(folder)
            assert not commit.content_damage(folder, manifest, list(manifest["files"]))
            steps.append(manifest["step"])
        return steps

    def final_weights(self) -> bytes:
        return (self.folder / "checkpoints" / f"step-{STEPS:08d}" / "weights" / "model.safetensors").read_bytes()

    def used_samples(self) -> list[int]:
        """Stream positions of the samples behind the final weights, sorted: an attempt's later ones were lost with it.

        What an attempt begins with is where the one before it was resumed from.
        """
        attempts: dict[int, list[int]] = {}
        for line in map(json.loads, Path(str(self.folder) + ".samples").read_text().splitlines()):
            attempts.setdefault(line["attempt"], []).extend(self._positions(line["ids"], line["epochs"]))
        used: list[int] = []
        for positions in (attempts[number] for number in sorted(attempts)):
            used = [position for position in used if position < min(positions)] + positions
        return sorted(used)

    def _positions(self, ids: list[int], epochs: list[int]) -> list[int]:
        shards = tuple(shard.samples for shard in Index.read(self.study.folder / "codes" / "train").shards)
        stream = zip(*Plan(shards, 0).samples(0, 2 * STEPS * GLOBAL_BATCH), strict=True)
        place = {(int(sample), int(epoch)): position for position, (sample, epoch) in enumerate(stream)}
        return [place[sample, epoch] for sample, epoch in zip(ids, epochs, strict=True)]
