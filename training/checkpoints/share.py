"""Who writes what of a checkpoint, and where it is found again.

Tensors are dealt to the ranks so that all write about as much. The weights of the engine "model" go to rank 0, as a
model on disk in `weights/`; their average, if there is one, to the next rank, as another in `ema/`; all else to the
rank that has least so far, in one file each: `state/share-00000-of-00008.safetensors`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from training.checkpoints.commit import DamagedCheckpoint
from training.checkpoints.model_on_disk import WEIGHTS, model_files
from training.checkpoints.weights import check_header
from training.engine.distributed import World
from training.engine.whole_state import EMA, WEIGHT

MODELS = {f"model/{WEIGHT}/": "weights", f"model/{EMA}/": "ema"}  # prefix of names -> folder of the model on disk
RANDOM = "random"


class Share:
    """What this rank writes. Every rank offers the same tensors in the same order and keeps what it is dealt."""

    def __init__(self, world: World, model_config: dict[str, Any]) -> None:
        self.world = world
        self.model_config = model_config
        self._loads = [0] * world.world_size  # elements that each rank has been dealt
        self._models: dict[str, dict[str, Tensor]] = {}
        self._rest: dict[str, Tensor] = {}

    def offer(self, name: str, tensor: Tensor) -> None:
        """Deal a tensor; a copy on the CPU is kept if it falls to this rank."""
        folder = next((folder for prefix, folder in MODELS.items() if name.startswith(prefix)), None)
        rank = self._rank_of(folder)
        self._loads[rank] += tensor.numel()
        if rank != self.world.rank:
            return
        kept = tensor.detach().to("cpu", copy=True).contiguous()
        if folder is None:
            self._rest[name] = kept
        else:
            self._models.setdefault(folder, {})[name.split("/", 2)[2]] = kept

    def _rank_of(self, folder: str | None) -> int:
        if folder is None:
            return self._loads.index(min(self._loads))
        return list(MODELS.values()).index(folder) % self.world.world_size

    def add_random_state(self, state: dict[str, Tensor]) -> None:
        """Keep this rank's random state."""
        self._rest |= {f"{RANDOM}/{self.world.rank}/{name}": value for name, value in state.items()}

    def files(self) -> Iterator[tuple[str, bytes]]:
        """The files that this rank writes, one after the other: name and contents."""
        for folder, weights in self._models.items():
            for name, content in model_files(weights, self.model_config).items():
                yield f"{folder}/{name}", content
        yield f"state/share-{self.world.rank:05d}-of-{self.world.world_size:05d}.safetensors", save(self._rest)


class SavedTensors:
    """The tensors of a checkpoint by the names under which they were offered, read when asked for."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        self._files = {}
        self._places: dict[str, tuple[str, str]] = {}
        for file in (name for name in names if name.endswith(".safetensors")):
            self._open(file)

    def _open(self, file: str) -> None:
        try:
            check_header(self.folder / file)
            self._files[file] = safe_open(self.folder / file, framework="pt")
        except (OSError, SafetensorError, ValueError) as error:
            raise DamagedCheckpoint(f"{self.folder / file} cannot be read ({error})") from None
        prefix = next((prefix for prefix, folder in MODELS.items() if file == f"{folder}/{WEIGHTS}"), "")
        self._places |= {f"{prefix}{name}": (file, name) for name in self._files[file].keys()}

    def __enter__(self) -> SavedTensors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU. An average that the checkpoint lacks begins with the weight itself.

        Raises:
            DamagedCheckpoint: the checkpoint does not have it.
        """
        if name not in self and f"/{EMA}/" in name:
            name = name.replace(f"/{EMA}/", f"/{WEIGHT}/", 1)
        if name not in self:
            raise DamagedCheckpoint(f"{self.folder} has no {name}; it was written by another version of this program")
        file, inside = self._places[name]
        return self._files[file].get_tensor(inside)

    def random_state(self, rank: int) -> dict[str, Tensor]:
        """The random state of one rank."""
        prefix = f"{RANDOM}/{rank}/"
        return {name.removeprefix(prefix): self.read(name) for name in self._places if name.startswith(prefix)}
