"""Checkpoints of a run: what is in them, how all ranks write and read them together, and which one counts.

A checkpoint is a folder `step-00001234`, committed by the rules of training/checkpoints/commit.py. `weights/` and, where weights
are averaged, `ema/` are models on disk; `state/` holds all else as whole named tensors: AdamW's moments, the weights of
further engines, and every rank's random state. The ranks share the writing, each a file of its own. Because tensors are
whole, a checkpoint is read under any ZeRO stage and by any number of ranks. Nothing in it is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError

from data_pipeline.files.nested import flatten
from training.checkpoints import commit
from training.checkpoints.commit import DamagedCheckpoint, Entry, read_manifest
from training.checkpoints.model_on_disk import describe, latest_checkpoint
from training.checkpoints.random_state import random_state, set_random_state
from training.checkpoints.share import SavedTensors, Share
from training.engine.distributed import World, agree_on_error, agree_on_value, gather_objects
from training.engine.engine import Engine


class CheckpointFailed(OSError):
    """A checkpoint could not be written; the ones before it are as they were, and training can go on."""


class CheckpointsFailing(OSError):
    """Checkpoints fail again and again, or the last one of a run did."""

    exit_code: ClassVar[int] = 74


@dataclass
class TrainState:
    """All that a run must remember besides weights and optimiser."""

    step: int = 0
    samples_seen: int = 0  # position in the stream of samples; after a roll back more than step * global batch
    useful_seconds: float = field(default=0.0, compare=False)  # spent on the steps that led here


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `last`, those of steps that `every` divides (0: none), and kept ones."""

    last: int = 2
    every: int = 0


class Checkpoints:
    """The checkpoints of one run folder.

    `identity` is what a run cannot change and still be the same run, besides its model: its tokenizer, data, seed.
    `config` is all settings, of which a checkpoint keeps a copy. `say` hears of damage.
    """

    def __init__(
        self,
        root: Path,
        *,
        retention: Retention,
        world: World,
        model_config: Any,
        identity: Mapping[str, Any],
        config: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.root = root
        self.retention = retention
        self.world = world
        self.model_config = describe(model_config)
        self.identity = dict(identity)
        self.config = json.loads(json.dumps(config or {}))  # tuples become lists, as they come back from a manifest
        self.say = say

    def latest(self) -> Path | None:
        """The newest committed checkpoint, or None; its contents are not verified."""
        return latest_checkpoint(self.root)

    def save(
        self, engines: Mapping[str, Engine], state: TrainState, *, is_kept: bool = False, notes: Mapping[str, Any] = {}
    ) -> Path:
        """Write and commit a checkpoint of all engines; the one named "model" is also written whole. A collective.

        notes: further plain facts for the manifest.

        Raises:
            CheckpointFailed: on all ranks alike, with what each rank said. The checkpoints are as they were.
        """
        final = self.root / commit.folder_name(state.step)
        if not self._damage(final):  # it is there already: the state of a step is a function of the run
            return final
        temporary = self.root / f"{commit.TEMPORARY}{final.name}"
        try:
            self._write_and_commit(engines, temporary, final, {**asdict(state), **notes}, is_kept)
        except (OSError, ValueError) as problem:
            if self.world.is_rank_zero:
                shutil.rmtree(temporary, ignore_errors=True)
            newest = self.latest()
            rest = f"the newest is {newest.name}" if newest else "there is none yet"
            raise CheckpointFailed(f"{final.name} is not saved, {rest}: {problem}") from None
        return final

    def _write_and_commit(
        self, engines: Mapping[str, Engine], temporary: Path, final: Path, facts: dict[str, Any], is_kept: bool
    ) -> None:
        agree_on_error(self._on_rank_zero(self._make_room, temporary, final), self.world)
        written, problem = self._write(self._gather(engines), temporary)
        agree_on_error(problem, self.world)
        files = {name: entry for part in gather_objects(written, self.world) for name, entry in part.items()}
        manifest = self._manifest(engines, facts, files)
        agree_on_error(self._on_rank_zero(self._publish, temporary, final, manifest, is_kept), self.world)

    def _on_rank_zero(self, act: Callable[..., None], *arguments: Any) -> Exception | None:
        if not self.world.is_rank_zero:
            return None
        try:
            act(*arguments)
        except (OSError, ValueError) as error:
            return error
        return None

    def _make_room(self, temporary: Path, final: Path) -> None:
        commit.make_room(self.root, temporary)
        if final.exists():  # damaged
            commit.set_aside(final)

    def _gather(self, engines: Mapping[str, Engine]) -> Share:
        """This rank's share of the state, on the CPU. Every rank sees every tensor go by."""
        share = Share(self.world, self.model_config)
        for tag, engine in engines.items():
            for name, tensor in engine.state.tensors():
                share.offer(f"{tag}/{name}", tensor)
        share.add_random_state(random_state(self.world.device))
        return share

    def _write(self, share: Share, temporary: Path) -> tuple[dict[str, Entry], Exception | None]:
        try:
            return {
                name: commit.write_file(temporary / name, content, Path(name).parts[0])
                for name, content in share.files()
            }, None
        except (OSError, SafetensorError) as error:
            return {}, OSError(str(error))

    def _manifest(
        self, engines: Mapping[str, Engine], facts: dict[str, Any], files: dict[str, Entry]
    ) -> dict[str, Any]:
        return {
            "format": commit.FORMAT,
            **facts,
            "world_size": self.world.world_size,
            "model": self.model_config,
            "identity": self.identity,
            "config": self.config,
            "config_sha256": hashlib.sha256(json.dumps(self.config).encode()).hexdigest(),
            "engines": {tag: engine.state.scalars() for tag, engine in engines.items()},
            "files": dict(sorted(files.items())),
        }

    def _publish(self, temporary: Path, final: Path, manifest: dict[str, Any], is_kept: bool) -> None:
        if is_kept:
            (temporary / commit.KEEP).touch()
        commit.publish(temporary, final, manifest)
        try:
            commit.settle(self.root)
            commit.forget_old(self.root, keep=self.retention.last, keep_every=self.retention.every)
        except OSError as error:
            self.say(f"warning: {final.name} is saved, but older checkpoints could not be removed ({error})")

    def resume(self, engines: Mapping[str, Engine]) -> TrainState | None:
        """Load the newest checkpoint that is as it was written; None if there is none at all. A collective.

        Damaged ones are renamed out of the way, and said.

        Raises:
            DamagedCheckpoint: there are checkpoints, but none is whole.
            ValueError: the one found is of another model, tokenizer, data or seed, or of another version.
        """
        names = [path.name for path in commit.candidates(self.root)]
        agree_on_value(names, "the checkpoints", self.world)
        for name in names:
            path = self.root / name
            damage = self._damage(path)
            if not damage:
                self.refuse_misfit(path)
                return self._load(path, engines)
            self._set_aside(path, damage)
        if names:
            raise DamagedCheckpoint(
                f"{self.root}: none of {len(names)} checkpoints is whole, see the lines above; they were renamed to "
                f"{commit.DAMAGED}*. Put a good one back, or start anew in another run folder"
            )
        return None

    def _damage(self, path: Path) -> str:
        """What is wrong with a checkpoint, the same on all ranks, which share the reading; empty: nothing."""
        damage = commit.structural_damage(path)
        if not damage:
            manifest = read_manifest(path)
            mine = list(manifest["files"])[self.world.rank :: self.world.world_size]
            damage = commit.content_damage(path, manifest, mine)
        return next(filter(None, gather_objects(damage, self.world)), "")

    def _set_aside(self, path: Path, damage: str) -> None:
        older = [other.name for other in commit.candidates(self.root) if other < path]
        agree_on_error(self._on_rank_zero(commit.set_aside, path), self.world)
        self.say(
            f"warning: {damage}; {f'falling back to {older[0]}' if older else 'there is no older checkpoint'} "
            f"({path.name} is now {commit.DAMAGED}{path.name}-*)"
        )

    def _load(self, path: Path, engines: Mapping[str, Engine]) -> TrainState:
        manifest = read_manifest(path)
        with SavedTensors(path, list(manifest["files"])) as saved:
            for tag, engine in engines.items():
                if "step" not in manifest["engines"].get(tag, {}):
                    raise DamagedCheckpoint(f"{path / commit.MANIFEST} says nothing of the engine '{tag}'")
                engine.state.load(lambda name, tag=tag: saved.read(f"{tag}/{name}"))
                engine.state.load_scalars(manifest["engines"][tag])
            if manifest["world_size"] == self.world.world_size:
                set_random_state(saved.random_state(self.world.rank), self.world.device)
        return TrainState(**{each.name: manifest[each.name] for each in fields(TrainState)})

    def refuse_misfit(self, path: Path) -> None:
        """Raise ValueError if the checkpoint is of another model, tokenizer, data or seed."""
        manifest = read_manifest(path)
        for what, ours in (("model", self.model_config), ("identity", self.identity)):
            kind = "of another model" if what == "model" else "of another run"
            theirs = flatten(manifest[what])
            for name, value in flatten(ours).items():
                if theirs.get(name) != value:
                    raise ValueError(
                        f"{path}: checkpoint {kind}: its {name} is {theirs.get(name)}, this run has {value}; "
                        "change it back or choose another run folder"
                    )

    def changed_settings(self, path: Path) -> Iterator[str]:
        """What is set otherwise than when a checkpoint was written, as "name: old -> new"."""
        theirs, ours = flatten(read_manifest(path)["config"]), flatten(self.config)
        for name in sorted(theirs.keys() | ours.keys()):
            if theirs.get(name) != ours.get(name):
                yield f"{name}: {theirs.get(name)} -> {ours.get(name)}"
