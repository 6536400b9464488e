"""Checkpoints that are whole or absent, and models on disk.

A checkpoint is written to a temporary folder, its files are listed with size and sha256 in manifest.json, and the
folder is renamed to `step-00001234`: the rename is the commit. Inside are the shards of each engine, and `weights/`,
which is a model on disk: `config.json` and `model.safetensors` with the whole float32 weights.

No random state is stored, because none exists: every draw of training is a function of the seed and `samples_seen`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.distributed import World, agree_on_error, agree_on_value, barrier
from training.engine import Engine

FORMAT = 1


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

    def save(self, engines: Mapping[str, Engine], state: TrainState) -> Path:
        """Write and commit a checkpoint of all engines; the one named "model" is also written whole. A collective."""
        final = self.root / f"step-{state.step:08d}"
        temporary = self.root / f".tmp-{final.name}"
        agree_on_error(self._make_room(temporary) if self.world.is_rank_zero else None, self.world)
        for tag, engine in engines.items():
            engine.save(temporary, tag)
        weights = engines["model"].full_state_dict()
        barrier(self.world)
        agree_on_value(sorted(_relative_files(temporary)), f"the files in {temporary}", self.world)
        error = self._commit(temporary, final, weights, state) if self.world.is_rank_zero else None
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

    def _commit(self, temporary: Path, final: Path, weights: dict[str, Tensor], state: TrainState) -> Exception | None:
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
            _write_json(temporary / "manifest.json", manifest)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(temporary, final)
            _fsync(self.root)
            self._forget_old()
        except (OSError, SafetensorError) as error:
            return error
        return None

    def _forget_old(self) -> None:
        for old in committed_checkpoints(self.root)[: -self.keep]:
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


def committed_checkpoints(root: Path) -> list[Path]:
    """All committed checkpoints under `root`, oldest first."""
    return sorted(path.parent for path in root.glob("step-*/manifest.json"))


def latest_checkpoint(root: Path) -> Path | None:
    found = committed_checkpoints(root)
    return found[-1] if found else None


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
        if file.stat().st_size != listed["bytes"] or _sha256(file) != listed["sha256"]:
            return ValueError(f"{file}: damaged (size or sha256); remove {path} to go on from an earlier checkpoint")
    return None


def write_model(folder: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write a model on disk: config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    _write_json(folder / "config.json", config)


@dataclass(frozen=True)
class ModelOnDisk:
    """A model's folder, found from a run folder, a checkpoint or the folder itself."""

    folder: Path

    @classmethod
    def find(cls, path: str | Path) -> ModelOnDisk:
        """Accepts a run folder (its newest checkpoint counts), a checkpoint, or a folder with config.json.

        Raises:
            FileNotFoundError: there is no model at `path`.
        """
        path = Path(path)
        candidates = [path, path / "weights"]
        newest = latest_checkpoint(path / "checkpoints")
        if newest is not None:
            candidates.append(newest / "weights")
        for folder in candidates:
            if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
                return cls(folder)
        raise FileNotFoundError(
            f"{path}: no model there; give a run folder that has a checkpoint, or a folder with config.json and "
            "model.safetensors"
        )

    def config(self, kind: str) -> dict[str, Any]:
        """The model's config as plain data; `kind` is the class that must have been written, such as "VAR"."""
        try:
            config = json.loads((self.folder / "config.json").read_text())
        except ValueError as error:
            raise ValueError(f"{self.folder}/config.json is not valid JSON ({error}); export the model again") from None
        if config.get("kind") != kind:
            raise ValueError(f"{self.folder}: holds a {config.get('kind')}, a {kind} is needed; check the path")
        return {name: value for name, value in config.items() if name != "kind"}

    def fill(self, model: nn.Module) -> nn.Module:
        """Put the weights into `model`, which may be on the meta device, and return it in eval mode, frozen."""
        file = self.folder / "model.safetensors"
        try:
            model.load_state_dict(load_file(file), assign=True)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{file}: cannot be loaded ({str(error).splitlines()[0]}); export it again") from None
        return model.eval().requires_grad_(False)

    def sha256(self) -> str:
        """The identity of config and weights together; code shards carry it for their tokenizer."""
        parts = _sha256(self.folder / "config.json"), _sha256(self.folder / "model.safetensors")
        return hashlib.sha256("".join(parts).encode()).hexdigest()


def describe(config: Any) -> dict[str, Any]:
    """A model's config dataclass as plain data, with the kind of model: VARConfig becomes {"kind": "VAR", ...}."""
    plain = json.loads(json.dumps(asdict(config)))
    return {"kind": type(config).__name__.removesuffix("Config"), **plain}


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
        _fsync(folder / name)
        listed[name] = {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
    return listed


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
    _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
