"""Checkpoints that are whole or absent.

A checkpoint is written to a temporary folder, its files are listed with size and sha256 in manifest.json, and the
folder is renamed to `step-00001234`: the rename is the commit. Inside are the shards of each engine, and `weights/`,
which is a model on disk: `config.json` and `model.safetensors` with the whole float32 weights. A checkpoint that also
has a file named `keep` is not forgotten when newer ones come.

No random state is stored, because none exists: every draw of training is a function of the seed and `samples_seen`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from training.distributed import World, agree_on_error, agree_on_value, barrier
from training.engine import Engine
from training.model_on_disk import (
    committed_checkpoints,
    describe,
    file_sha256,
    fsync,
    latest_checkpoint,
    write_json,
    write_model,
)

FORMAT = 1
KEEP = "keep"  # the manifest does not list it, so that people may add it and take it away


@dataclass
class TrainState:
    """All that a run must remember besides weights and optimiser."""

    step: int = 0
    samples_seen: int = 0


class Checkpoints:
    """The checkpoints of one run folder.

    `identity` is what a run cannot change and still be the same run, besides its model: its tokenizer, data, seed.
    """

    def __init__(self, root: Path, *, keep: int, world: World, model_config: Any, identity: Mapping[str, Any]) -> None:
        self.root = root
        self.keep = keep
        self.world = world
        self.model_config = describe(model_config)
        self.identity = dict(identity)

    def latest(self) -> Path | None:
        """The newest committed checkpoint, or None."""
        return latest_checkpoint(self.root)

    def agreed_latest(self) -> Path | None:
        """The newest committed checkpoint, after all ranks have seen the same one. A collective."""
        found = self.latest()
        agree_on_value(found and found.name, "the newest checkpoint", self.world)
        return found

    def save(self, engines: Mapping[str, Engine], state: TrainState, *, is_kept: bool = False) -> Path:
        """Write and commit a checkpoint of all engines; the one named "model" is also written whole. A collective."""
        final = self.root / f"step-{state.step:08d}"
        temporary = self.root / f".tmp-{final.name}"
        agree_on_error(self._make_room(temporary) if self.world.is_rank_zero else None, self.world)
        for tag, engine in engines.items():
            engine.save(temporary, tag)
        weights = engines["model"].full_state_dict()
        barrier(self.world)
        agree_on_value(sorted(_relative_files(temporary)), f"the files in {temporary}", self.world)
        error = self._commit(temporary, final, weights, state, is_kept) if self.world.is_rank_zero else None
        agree_on_error(error, self.world)
        return final

    def _make_room(self, temporary: Path) -> Exception | None:
        """Remove what an interrupted save or removal has left behind, and make the folder to write to."""
        try:
            for leftover in [*self.root.glob(".tmp-*"), *self.root.glob(".old-*")]:
                shutil.rmtree(leftover)
            temporary.mkdir(parents=True)
        except OSError as error:
            return error
        return None

    def _commit(
        self, temporary: Path, final: Path, weights: dict[str, Tensor], state: TrainState, is_kept: bool
    ) -> Exception | None:
        try:
            write_model(temporary / "weights", weights, self.model_config)
            manifest = {
                "format": FORMAT,
                **asdict(state),
                "world_size": self.world.world_size,
                "model": self.model_config,
                "identity": self.identity,
                "files": _list_files(temporary),
            }
            write_json(temporary / "manifest.json", manifest)
            if is_kept:
                (temporary / KEEP).touch()
            shutil.rmtree(final, ignore_errors=True)
            os.rename(temporary, final)
            fsync(self.root)
            self._forget_old()
        except (OSError, SafetensorError) as error:
            return error
        return None

    def _forget_old(self) -> None:
        passing = [path for path in committed_checkpoints(self.root) if not (path / KEEP).exists()]
        for old in passing[: -self.keep]:
            doomed = old.with_name(f".old-{old.name}")
            os.rename(old, doomed)
            shutil.rmtree(doomed)

    def refuse_misfit(self, path: Path) -> None:
        """Raise ValueError if the checkpoint is of another model, tokenizer, data or seed, or of other ranks."""
        manifest = read_manifest(path)
        for what, ours in (("model", self.model_config), ("identity", self.identity)):
            self._refuse_difference(path, what, flatten(ours), flatten(manifest[what]))
        if manifest["world_size"] != self.world.world_size:
            raise ValueError(
                f"{path}: written by {manifest['world_size']} ranks, this run has {self.world.world_size}; "
                f"start it with {manifest['world_size']}, or choose another run folder"
            )

    def restore(self, path: Path, engines: Mapping[str, Engine]) -> TrainState:
        """Load a checkpoint into the engines. A collective.

        Raises:
            ValueError: damaged, of another model, or written by another number of ranks.
        """
        self.refuse_misfit(path)
        manifest = read_manifest(path)
        agree_on_error(_first_damage(path, manifest) if self.world.is_rank_zero else None, self.world)
        for tag, engine in engines.items():
            engine.load(path, tag)
        return TrainState(step=manifest["step"], samples_seen=manifest["samples_seen"])

    def _refuse_difference(self, path: Path, what: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
        kind = "of another model" if what == "model" else "of another run"
        for name, value in ours.items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"{path}: checkpoint {kind}: its {name} is {theirs.get(name)}, this run has {value}; "
                    "change it back or choose another run folder"
                )


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check a checkpoint's manifest."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}/manifest.json is not valid JSON ({error}); remove this checkpoint") from None
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: checkpoint format {manifest.get('format')}, this version reads {FORMAT}")
    return manifest


def _first_damage(path: Path, manifest: dict[str, Any]) -> Exception | None:
    for name, listed in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return ValueError(f"{file}: missing; remove {path} to go on from an earlier checkpoint")
        if file.stat().st_size != listed["bytes"] or file_sha256(file) != listed["sha256"]:
            return ValueError(f"{file}: damaged (size or sha256); remove {path} to go on from an earlier checkpoint")
    return None


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names: {"model": {"depth": 16}} becomes {"model.depth": 16}."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _relative_files(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def _list_files(folder: Path) -> dict[str, dict[str, Any]]:
    listed = {}
    for name in sorted(_relative_files(folder)):
        fsync(folder / name)
        listed[name] = {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
    return listed
