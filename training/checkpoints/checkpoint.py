"""Checkpoints of a run: what is in them, how all ranks write and read them together, and which one counts.

A checkpoint is a folder `step-00001234`, committed by the rules of `commit.py`. `weights/` and, where weights are
averaged, `ema/` are models on disk; `state/` holds all else as whole named tensors: AdamW's moments, the weights of
further engines, and every rank's random state. The ranks share the writing, each a file of its own. Because tensors are
whole, a checkpoint is read under any ZeRO stage and by any number of ranks. Nothing in it is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from data_pipeline.files.atomic import fsync
from data_pipeline.files.nested import flatten
from training.checkpoints import commit
from training.checkpoints.commit import DamagedCheckpoint, Entry, UnreadableCheckpoint, read_manifest
from training.checkpoints.model_on_disk import WEIGHTS, describe, model_files
from training.checkpoints.random_state import random_state, set_random_state
from training.checkpoints.weights import check_header
from training.engine.distributed import World, agree_on_value, failing_together, gather_objects
from training.engine.engine import Engine
from training.engine.whole_state import EMA, WEIGHT

MODELS = {f"model/{WEIGHT}/": "weights", f"model/{EMA}/": "ema"}  # prefix of names -> folder of the model on disk
RANDOM = "random"
LATER = ("validation",)  # parts of the identity of which an older checkpoint says nothing


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
    `config` is all settings, of which a checkpoint keeps a copy. `report` is told of damage.
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
        report: Callable[[str], None] = print,
    ) -> None:
        self.root = root
        self.retention = retention
        self.world = world
        self.model_config = describe(model_config)
        self.identity = dict(identity)
        self.config = json.loads(json.dumps(config or {}))  # tuples become lists, as they come back from a manifest
        self.report = report

    def latest(self) -> Path | None:
        """Return the newest committed checkpoint, or None; its contents are not verified."""
        return commit.latest_checkpoint(self.root)

    def save(
        self,
        engines: Mapping[str, Engine],
        state: TrainState,
        *,
        is_kept: bool = False,
        notes: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write and commit a checkpoint of all engines; the one named "model" is also written whole. A collective.

        notes: further plain facts for the manifest.

        Raises:
            CheckpointFailed: on all ranks alike, with what each rank said. The checkpoints are as they were.
        """
        final = self.root / commit.folder_name(state.step)
        temporary = self.root / f"{commit.TEMPORARY}{final.name}"
        facts = {**asdict(state), **(notes or {})}
        try:
            if not self._damage(final):  # it is there already: the state of a step is a function of the run
                return final
            self._write_and_commit(engines, temporary, final, facts, is_kept=is_kept)
        except (OSError, ValueError) as problem:
            if self.world.is_rank_zero:
                shutil.rmtree(temporary, ignore_errors=True)
            newest = self.latest()
            rest = f"the newest is {newest.name}" if newest else "there is none yet"
            raise CheckpointFailed(f"{final.name} is not saved, {rest}: {problem}") from None
        return final

    def _write_and_commit(
        self, engines: Mapping[str, Engine], temporary: Path, final: Path, facts: dict[str, Any], *, is_kept: bool
    ) -> None:
        with failing_together(self.world):
            if self.world.is_rank_zero:
                commit.make_room(self.root, temporary)
                if final.exists():  # damaged
                    commit.set_aside(final)
        share = self._gather(engines)
        written: dict[str, Entry] = {}
        with failing_together(self.world):
            written = {name: commit.write_file(temporary / name, content) for name, content in share.files()}
        files = {name: entry for part in gather_objects(written, self.world) for name, entry in part.items()}
        manifest = self._manifest(engines, facts, files)
        with failing_together(self.world):
            if self.world.is_rank_zero:
                if is_kept:
                    (temporary / commit.KEEP).touch()
                commit.publish(temporary, final, manifest)
                self._tidy(final)

    def _gather(self, engines: Mapping[str, Engine]) -> Share:
        """Return this rank's share of the state, on the CPU. Every rank sees every tensor go by."""
        share = Share(self.world, self.model_config)
        for tag, engine in engines.items():
            for name, tensor in engine.state.tensors():
                share.offer(f"{tag}/{name}", tensor)
        share.add_random_state(random_state(self.world.device))
        return share

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

    def _tidy(self, final: Path) -> None:
        """Force the new name to disk and remove old checkpoints; the new one counts whether or not that succeeds."""
        try:
            fsync(self.root)
            commit.forget_old(self.root, keep=self.retention.last, keep_every=self.retention.every)
        except OSError as error:
            self.report(f"warning: {final.name} is saved, but older checkpoints could not be removed ({error})")

    def resume(self, engines: Mapping[str, Engine]) -> TrainState | None:
        """Load the newest checkpoint that is as it was written; None if there is none at all. A collective.

        Damaged ones are renamed out of the way, and reported.

        Raises:
            DamagedCheckpoint: there are checkpoints, but none is whole.
            UnreadableCheckpoint: one could not be read, on all ranks; nothing was renamed.
            ValueError: the one found is of another model, tokenizer, data or seed, or of another version.
        """
        names = [path.name for path in commit.candidates(self.root)]
        agree_on_value(names, "the checkpoints", self.world)
        for name, older in zip(names, [*names, ""][1:], strict=True):
            damage = self._damage(self.root / name)
            if not damage:
                self.refuse_misfit(self.root / name)
                return self._load(self.root / name, engines)
            with failing_together(self.world):
                if self.world.is_rank_zero:
                    commit.set_aside(self.root / name)
            fallback = f"falling back to {older}" if older else "there is no older checkpoint"
            self.report(f"warning: {damage}; {fallback} ({name} is now {commit.DAMAGED}{name}-*)")
        if names:
            raise DamagedCheckpoint(
                f"{self.root}: none of {len(names)} checkpoints is whole, see the lines above; they were renamed to "
                f"{commit.DAMAGED}*. Put a good one back, or start anew in another run folder"
            )
        return None

    def _damage(self, path: Path) -> str:
        """Return what is wrong with a checkpoint, or "": the same on all ranks, which share the reading.

        Raises:
            UnreadableCheckpoint: a rank could not read it; on all ranks.
        """
        damage, failure = "", ""
        try:
            damage = commit.structural_damage(path)
            if not damage:
                manifest = read_manifest(path)
                mine = list(manifest["files"])[self.world.rank :: self.world.world_size]
                damage = commit.content_damage(path, manifest, mine)
        except UnreadableCheckpoint as error:
            failure = str(error)
        damages, failures = zip(*gather_objects((damage, failure), self.world), strict=True)
        if failure := next(filter(None, failures), ""):
            raise UnreadableCheckpoint(failure)
        return next(filter(None, damages), "")

    def _load(self, path: Path, engines: Mapping[str, Engine]) -> TrainState:
        manifest = read_manifest(path)
        saved = SavedTensors(path, list(manifest["files"]))
        for tag, engine in engines.items():
            if "step" not in manifest["engines"].get(tag, {}):
                raise DamagedCheckpoint(f"{path / commit.MANIFEST} says nothing of the engine '{tag}'")
            engine.state.load(partial(saved.read, tag))
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
                if theirs.get(name) != value and not (name in LATER and name not in theirs):
                    raise ValueError(
                        f"{path}: checkpoint {kind}: its {name} is {theirs.get(name)}, this run has {value}; "
                        "change it back or choose another run folder"
                    )

    def changed_settings(self, path: Path) -> Iterator[str]:
        """Yield what is set otherwise than when a checkpoint was written, as "name: old -> new"."""
        theirs, ours = flatten(read_manifest(path)["config"]), flatten(self.config)
        for name in sorted(theirs.keys() | ours.keys()):
            if theirs.get(name) != ours.get(name):
                yield f"{name}: {theirs.get(name)} -> {ours.get(name)}"


class Share:
    """The part of a checkpoint that one rank writes. All ranks are offered the same tensors in the same order.

    The weights of the engine "model" go to rank 0, as a model on disk in `weights/`; their average, if there is one, to
    the next rank, in `ema/`; every other tensor to the rank that has least so far, in one file each,
    `state/share-00000-of-00008.safetensors`. So all write about as much.
    """

    def __init__(self, world: World, model_config: dict[str, Any]) -> None:
        self.world = world
        self.model_config = model_config
        self._loads = [0] * world.world_size  # elements that each rank has been dealt
        self._models: dict[str, dict[str, Tensor]] = {}
        self._rest: dict[str, Tensor] = {}

    def offer(self, name: str, tensor: Tensor) -> None:
        """Deal a tensor; a copy on the CPU is kept if it falls to this rank."""
        folder = next((folder for prefix, folder in MODELS.items() if name.startswith(prefix)), None)
        if folder is None:
            rank = self._loads.index(min(self._loads))
        else:
            rank = list(MODELS.values()).index(folder) % self.world.world_size
        self._loads[rank] += tensor.numel()
        if rank != self.world.rank:
            return
        kept = tensor.detach().to("cpu", copy=True).contiguous()
        if folder is None:
            self._rest[name] = kept
        else:
            self._models.setdefault(folder, {})[name.split("/", 2)[2]] = kept

    def add_random_state(self, state: dict[str, Tensor]) -> None:
        """Keep this rank's random state."""
        self._rest |= {f"{RANDOM}/{self.world.rank}/{name}": value for name, value in state.items()}

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Yield the name and contents of each file that this rank writes, one in memory at a time."""
        for folder, weights in self._models.items():
            for name, content in model_files(weights, self.model_config).items():
                yield f"{folder}/{name}", content
        yield f"state/share-{self.world.rank:05d}-of-{self.world.world_size:05d}.safetensors", save(self._rest)


class SavedTensors:
    """The tensors of a checkpoint by the names under which they were offered, read when asked for."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        self._places: dict[str, tuple[Any, str]] = {}  # name -> open file, name in it
        for name in (name for name in names if name.endswith(".safetensors")):
            try:
                check_header(folder / name)
                file = safe_open(folder / name, framework="pt")
            except (SafetensorError, ValueError) as error:
                raise DamagedCheckpoint(f"{folder / name} is no file of tensors ({error})") from None
            except OSError as error:
                raise UnreadableCheckpoint.of(folder / name, error) from None
            prefix = next((prefix for prefix, model in MODELS.items() if name == f"{model}/{WEIGHTS}"), "")
            self._places |= {f"{prefix}{inside}": (file, inside) for inside in list(file.keys())}

    def read(self, tag: str, name: str) -> Tensor:
        """Return one tensor of an engine, on the CPU; an average that was never kept begins with the weight itself.

        Raises DamagedCheckpoint if the checkpoint does not have it.
        """
        name = f"{tag}/{name}"
        if name not in self._places and f"/{EMA}/" in name:
            name = name.replace(f"/{EMA}/", f"/{WEIGHT}/", 1)
        if name not in self._places:
            raise DamagedCheckpoint(f"{self.folder} has no {name}; it was written by another version of this program")
        file, inside = self._places[name]
        return file.get_tensor(inside)

    def random_state(self, rank: int) -> dict[str, Tensor]:
        """Return the random state of one rank, by the names of `random_state`."""
        prefix = f"{RANDOM}/{rank}/"
        names = [name.removeprefix(prefix) for name in self._places if name.startswith(prefix)]
        return {name: self.read(f"{RANDOM}/{rank}", name) for name in names}
