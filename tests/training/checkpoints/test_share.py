"""Every tensor of a checkpoint is written by exactly one rank, about as much by each, and found again by its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import VAR_CONFIG
from torch import Tensor

from training.checkpoints.commit import DamagedCheckpoint
from training.checkpoints.model_on_disk import ModelOnDisk, describe
from training.checkpoints.share import SavedTensors, Share
from training.engine.distributed import World


def tensors(*, averaged: bool = False) -> dict[str, Tensor]:
    kinds = ("weight", "exp_avg", "exp_avg_sq", *(["ema"] if averaged else []))
    names = [f"model/{kind}/layer{n}.weight" for kind in kinds for n in range(6)]
    names += [f"discriminator/weight/layer{n}" for n in range(3)]
    return {name: torch.full((8, n + 1), float(n)) for n, name in enumerate(names)}


def write(folder: Path, world_size: int, offered: dict[str, Tensor]) -> list[str]:
    """Let every rank of a world write its share; all names, and no name twice."""
    names: list[str] = []
    for rank in range(world_size):
        share = Share(World(rank, world_size), describe(VAR_CONFIG))
        for name, tensor in offered.items():
            share.offer(name, tensor)
        share.add_random_state({"torch": torch.tensor([rank], dtype=torch.uint8)})
        for name, content in share.files():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
            names.append(name)
    assert len(names) == len(set(names))
    return names


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_all_that_was_offered_is_read_back(tmp_path: Path, world_size: int, averaged: bool) -> None:
    offered = tensors(averaged=averaged)
    with SavedTensors(tmp_path, write(tmp_path, world_size, offered)) as saved:
        for name, tensor in offered.items():
            assert torch.equal(saved.read(name), tensor), name
        for rank in range(world_size):
            assert saved.random_state(rank)["torch"].tolist() == [rank]
    assert ModelOnDisk(tmp_path / "weights").is_whole and ModelOnDisk(tmp_path / "ema").is_whole == averaged


def test_the_ranks_write_about_as_much(tmp_path: Path) -> None:
    offered = tensors()
    write(tmp_path, 3, offered)
    sizes = [file.stat().st_size for file in sorted((tmp_path / "state").iterdir())]
    sizes[0] += (tmp_path / "weights" / "model.safetensors").stat().st_size
    assert max(sizes) < 1.5 * min(sizes)


def test_a_tensor_is_copied_since_the_next_may_reuse_its_memory() -> None:
    share, tensor = Share(World(), describe(VAR_CONFIG)), torch.ones(3)
    share.offer("model/exp_avg/a", tensor)
    tensor.zero_()
    content = dict(share.files())["state/share-00000-of-00001.safetensors"]
    assert torch.ones(3).numpy().tobytes() in content


def test_an_average_that_was_not_kept_begins_with_the_weight(tmp_path: Path) -> None:
    offered = tensors()
    with SavedTensors(tmp_path, write(tmp_path, 1, offered)) as saved:
        wanted = offered["model/weight/layer2.weight"]
        assert torch.equal(saved.read("model/ema/layer2.weight"), wanted)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with SavedTensors(tmp_path, write(tmp_path, 1, tensors())) as saved:
        with pytest.raises(DamagedCheckpoint, match="has no model/exp_avg/other"):
            saved.read("model/exp_avg/other")


def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path) -> None:
    names = write(tmp_path, 1, tensors())
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(DamagedCheckpoint, match="weights/model.safetensors cannot be read"):
        SavedTensors(tmp_path, names)
