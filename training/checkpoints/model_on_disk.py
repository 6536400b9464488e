"""Models on disk: how a trained or imported model lies in a folder and is found.

A model's folder holds `config.json` and `model.safetensors`. The folder of a transformer may have its tokenizer in
`tokenizer/`, another such folder, and a folder may hold that sub-folder alone. The weights of a checkpoint are such a
folder too. What a config means is the launchers' business: here it is plain data that names its kind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from data_pipeline.files.atomic import bytes_sha256, file_sha256, fsync
from data_pipeline.files.strict_json import read_json
from training.checkpoints.commit import latest_checkpoint
from training.checkpoints.weights import load_safetensors

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# A config that somebody made up must not build modules without end before its weights are looked at
MOST = {"depth": 200, "num_res_blocks": 100, "patch_nums": 128, "multipliers": 1024, "mlp_ratio": 100, "num_phi": 100}
MOST_OF_ALL, MOST_NUMBERS = 2**20, 50
NAMES = {"VAR": "transformer", "VQVAE": "tokenizer"}  # of the kinds, for people


def describe(config: Any) -> dict[str, Any]:
    """Turn a model's config dataclass into plain data that names its kind: VARConfig into {"kind": "VAR", ...}."""
    plain = json.loads(json.dumps(asdict(config)))
    return {"kind": type(config).__name__.removesuffix("Config"), **plain}


def model_files(weights: Mapping[str, Tensor], config: dict[str, Any]) -> dict[str, bytes]:
    """Return the files of a model on disk, by name. Equal models give equal bytes."""
    contiguous = {name: value.contiguous() for name, value in weights.items()}
    return {CONFIG: (json.dumps(config, indent=1) + "\n").encode(), WEIGHTS: save(contiguous)}


def write_model(folder: Path, weights: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    """Write a model on disk and force it there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in model_files(weights, config).items():
        (folder / name).write_bytes(content)
        fsync(folder / name)


def model_sha256(weights: Mapping[str, Tensor], config: dict[str, Any]) -> str:
    """Return the `ModelOnDisk.sha256` that the model would have if it were written."""
    return _joint_sha256(*map(bytes_sha256, model_files(weights, config).values()))


def _joint_sha256(*digests: str) -> str:
    return bytes_sha256("".join(digests).encode())


@dataclass(frozen=True)
class ModelOnDisk:
    """The folder of a model."""

    folder: Path

    @classmethod
    def find(cls, path: str | Path, kind: str) -> ModelOnDisk:
        """Find the model of a kind, "VAR" or "VQVAE".

        path: a run folder (its newest checkpoint is meant), a checkpoint, the model's folder, or its transformer's.

        Raises:
            FileNotFoundError: there is no model at `path`.
            ValueError: there is one of the other kind only, or `path` is a file.
        """
        path = Path(path)
        if path.is_file():
            raise ValueError(
                f"{path}: is a file, a folder with a {NAMES[kind]} is needed; make one of a public checkpoint with "
                f"launchers/import_weights.py --{'var' if kind == 'VAR' else 'tokenizer'} {path} --out DIR"
            )
        found = cls.all_at(path)
        for model in found:
            if model.kind == kind:
                return model
        if found:
            raise ValueError(f"{found[0].folder}: holds a {found[0].kind}, a {kind} is needed; check the path")
        problem = "no model there" if path.exists() else "no such file or folder"
        public = next(iter(sorted(path.glob("*.pth"))), None)
        hint = f"; it has a public file: give {public}" if public else ""
        raise FileNotFoundError(
            f"{path}: {problem}; give a run folder that has a checkpoint, a folder with {CONFIG} and {WEIGHTS}, or a "
            f"public .pth file where one is taken{hint}"
        )

    @classmethod
    def all_at(cls, path: Path) -> list[ModelOnDisk]:
        """Return the models to which a path leads, the likeliest first."""
        newest = latest_checkpoint(path / "checkpoints")
        candidates = [path, path / "weights", *([newest / "weights"] if newest else []), path / "tokenizer"]
        return [cls(folder) for folder in candidates if cls(folder).is_whole]

    @property
    def is_whole(self) -> bool:
        """Tell whether both files are there."""
        return (self.folder / CONFIG).is_file() and (self.folder / WEIGHTS).is_file()

    @property
    def kind(self) -> str:
        """The class that was written, such as "VAR"; ValueError if config.json cannot be read."""
        return str(self._read_config().get("kind"))

    def config(self) -> dict[str, Any]:
        """Return the model's config as plain data, without its kind."""
        return {name: value for name, value in self._read_config().items() if name != "kind"}

    def _read_config(self) -> dict[str, Any]:
        path = self.folder / CONFIG
        try:
            config = read_json(path)
        except ValueError as error:
            raise ValueError(f"{path} {error}; export the model again") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path} holds a {type(config).__name__}, not settings; export the model again")
        if "${" in json.dumps(config):  # config builders would look such a name up, in the environment for one
            raise ValueError(f"{path} holds a reference ${{...}}; a model's settings are plain values")
        if excess := _excess(config):
            raise ValueError(f"{path}: {excess}; export the model again")
        return config

    def fill(self, model: nn.Module) -> nn.Module:
        """Put the weights into `model`, which may be on the meta device, and return it in eval mode, frozen."""
        self._load_into(model, assign=True)
        return model.eval().requires_grad_(False)

    def copy_into(self, model: nn.Module) -> None:
        """Copy the weights into a model that is about to be trained."""
        self._load_into(model, assign=False)

    def _load_into(self, model: nn.Module, *, assign: bool) -> None:
        file = self.folder / WEIGHTS
        try:
            model.load_state_dict(load_safetensors(file), assign=assign)
        except RuntimeError as error:  # names or shapes
            raise ValueError(f"{file}: cannot be loaded ({str(error).splitlines()[0]}); export it again") from None

    def sha256(self) -> str:
        """Return the identity of config and weights together; code shards carry it for their tokenizer."""
        return _joint_sha256(file_sha256(self.folder / CONFIG), file_sha256(self.folder / WEIGHTS))


def _excess(config: dict[str, Any]) -> str:
    """Return what in a model's config is beyond any model, and would take memory or time without end, or ""."""
    for name, value in config.items():
        if isinstance(value, dict):
            if excess := _excess(value):
                return f"{name}.{excess}"
            continue
        numbers = value if isinstance(value, list) else [value]
        if len(numbers) > MOST_NUMBERS:
            return f"{name} has {len(numbers)} values, at most {MOST_NUMBERS} are accepted"
        most = MOST.get(name, MOST_OF_ALL)
        for number in numbers:
            if isinstance(number, (int, float)) and abs(number) > most:
                return f"{name} is {number}, at most {most} is accepted"
    return ""
