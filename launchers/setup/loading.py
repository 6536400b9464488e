"""Models from where they lie: folders of ours, and public files, which no other file of the launchers reads.

The tokenizer of a transformer lies in its folder's `tokenizer/`, or is the one that the config of its run names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.files.nested import flatten
from launchers.setup.config_files import build_config, load_config
from launchers.setup.settings import RunConfig, TrainConfig
from models.reference import tokenizer_from_state_dict, tokenizer_to_state_dict, var_from_state_dict, var_to_state_dict
from models.scales import PATCH_NUMS_256, PATCH_NUMS_512, PATCH_NUMS_1024, Scales
from models.var import VAR, VARConfig
from models.vqvae import VQVAE, VQVAEConfig
from training.checkpoints.checkpoint import Checkpoints
from training.checkpoints.commit import DamagedCheckpoint, content_damage, read_manifest
from training.checkpoints.model_on_disk import CONFIG, WEIGHTS, ModelOnDisk, describe
from training.checkpoints.weights import load_safetensors, read_weights

import torch
from torch import Tensor

Model = TypeVar("Model", VAR, VQVAE)
# settings on which weights do not depend once they are there
SETTINGS_OF_TRAINING = ("init_gamma", "init_head", "quantizer.beta")
PUBLIC_SCHEDULES = (PATCH_NUMS_256, PATCH_NUMS_512, PATCH_NUMS_1024)
SCHEDULE_OF_LENGTH = {Scales(patch_nums).num_tokens: patch_nums for patch_nums in PUBLIC_SCHEDULES}


def find_whole(path: str, kind: str) -> ModelOnDisk:
    """Find the model of a kind, "VAR" or "VQVAE", at a path; that of a checkpoint is verified against its manifest.

    Raises:
        DamagedCheckpoint: it is not as it was written.
        FileNotFoundError, ValueError: see ModelOnDisk.find.
    """
    found = ModelOnDisk.find(path, kind)
    checkpoint = checkpoint_of(found)
    if checkpoint is not None:
        names = [f"{found.folder.name}/{name}" for name in (CONFIG, WEIGHTS)]
        damage = content_damage(checkpoint, read_manifest(checkpoint), names)
        if damage:
            raise DamagedCheckpoint(f"{damage}; name another folder of {checkpoint.parent}")
    return found


def load_tokenizer(path: str) -> tuple[VQVAE, str]:
    """Load a trained tokenizer, frozen, and its sha256, from a run folder, an exported model, or its transformer's."""
    found = find_whole(path, "VQVAE")
    return _fill(found, VQVAEConfig, VQVAE), found.sha256()


def load_var(path: str) -> VAR:
    """Load a trained transformer, frozen, from a run folder or an exported model."""
    return _fill(find_whole(path, "VAR"), VARConfig, VAR)


def _fill(found: ModelOnDisk, config_kind: type[Any], model_kind: Callable[[Any], Model]) -> Model:
    config: Any = build_config(config_kind, [found.config()], source=str(found.folder))
    with torch.device("meta"):
        model = model_kind(config)
    found.fill(model)
    return model


def place_tokenizer(tokenizer: VQVAE, device: torch.device, *, kinds: set[str]) -> VQVAE:
    """Move to the device what data of these kinds, "codes" or "images", need of a tokenizer, and return the tokenizer.

    Codes need the quantiser alone, one part in 600 of the released tokenizer; the rest then stays on the host.
    """
    part = tokenizer if "images" in kinds else tokenizer.quantizer
    part.to(device)
    return tokenizer


def public_var(path: str, patch_nums: tuple[int, ...] = (), entry: str = "") -> VAR:
    """Load the transformer of a public file, frozen. Without a schedule it gets that of its number of positions."""
    weights = read_weights(path, "VAR", entry)
    positions = weights.get("pos_1LC")
    if positions is None or positions.ndim != 3:
        ours = "; it has this project's names: give its folder" if "position_embedding" in weights else ""
        raise ValueError(f"{path}: has no pos_1LC of 3 dimensions; it is no public file of a VAR transformer{ours}")
    patch_nums = patch_nums or SCHEDULE_OF_LENGTH.get(positions.shape[1], ())
    if not patch_nums:
        known = ", ".join(str(num_tokens) for num_tokens in SCHEDULE_OF_LENGTH)
        raise ValueError(
            f"{path}: has {positions.shape[1]} positions, the public schedules have {known}; "
            "add --patch-nums with the sides of its token maps, such as --patch-nums 1 2 4"
        )
    return _of_public(path, lambda: var_from_state_dict(weights, patch_nums))


def public_tokenizer(path: str, patch_nums: tuple[int, ...], entry: str = "") -> VQVAE:
    """Load the tokenizer of a public file, frozen; the file does not tell for which schedule."""
    weights = read_weights(path, "VQVAE", entry)
    if "quantize.embedding.weight" not in weights:
        raise ValueError(f"{path}: has no quantize.embedding.weight; it is no file of a VAR tokenizer")
    try:
        return _of_public(path, lambda: tokenizer_from_state_dict(weights, patch_nums))
    except ValueError as error:
        hint = f"; read with the schedule {patch_nums}: if it has another, give it with --patch-nums"
        raise ValueError(f"{error}{hint if 'quant_resi' in str(error) else ''}") from None


def _of_public(path: str, build: Callable[[], Model]) -> Model:
    try:
        return build().eval().requires_grad_(False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def is_weights_file(path: str) -> bool:
    """Return whether a path is that of a file, there or not, rather than of a folder."""
    return Path(path).is_file() or Path(path).suffix in (".pth", ".pt", ".safetensors")


def tokenizer_of(run: str) -> str:
    """Return the path of a transformer's tokenizer, in its folder or named by the config of its run, or ""."""
    found = ModelOnDisk.find(run, "VAR")
    if ModelOnDisk(found.folder / "tokenizer").is_whole:
        return str(found.folder / "tokenizer")
    checkpoint = checkpoint_of(found)
    recorded = run_of(checkpoint) / "config.yaml" if checkpoint else None
    return load_config(TrainConfig, str(recorded)).tokenizer if recorded and recorded.is_file() else ""


def trained_tokenizer_sha256(run: str) -> str:
    """Return the sha256 of the tokenizer that a transformer was trained with, or "" where nothing tells."""
    found = ModelOnDisk.find(run, "VAR")
    if ModelOnDisk(found.folder / "tokenizer").is_whole:
        return ModelOnDisk(found.folder / "tokenizer").sha256()
    checkpoint = checkpoint_of(found)
    return read_manifest(checkpoint)["identity"].get("tokenizer_sha256", "") if checkpoint else ""


def checkpoint_of(model: ModelOnDisk) -> Path | None:
    """Return the checkpoint whose weights a model on disk is, or None."""
    folder = model.folder.absolute().parent
    return folder if (folder / "manifest.json").is_file() else None


def run_of(checkpoint: Path) -> Path:
    """Return the run folder of a checkpoint, RUN/checkpoints/step-00000001."""
    return checkpoint.parent.parent


def refuse_file(folder: Path) -> None:
    """Raise ValueError if a folder to be written to is a file."""
    if folder.is_file():
        raise ValueError(f"{folder}: is a file; choose another folder with --out")


def initialize(model: VAR | VQVAE, config: RunConfig, checkpoints: Checkpoints) -> None:
    """Put the weights of config.init_from into a model about to be trained; a run with a checkpoint goes on from that.

    Of a transformer with another number of classes all is taken but the rows of its classes: those of this model stay
    as they were drawn, and the null class is kept. A line says so.

    Raises ValueError for a model of other sizes.
    """
    if not config.init_from or checkpoints.latest():
        return
    found = find_whole(config.init_from, describe(model.config)["kind"])
    ours = flatten(describe(model.config))
    theirs = flatten(describe(build_config(type(model.config), [found.config()], source=str(found.folder))))
    for name, value in ours.items():
        if name not in (*SETTINGS_OF_TRAINING, "num_classes") and theirs[name] != value:
            raise ValueError(
                f"{found.folder}: its {name} is {theirs[name]}, this run has {value}; training can start from a model "
                "of the same sizes only: change model or init_from"
            )
    if isinstance(model, VAR) and theirs["num_classes"] != model.config.num_classes:
        copy_all_but_classes(found, theirs["num_classes"], model, checkpoints.report)
    else:
        found.copy_into(model)


def copy_all_but_classes(found: ModelOnDisk, num_classes: int, model: VAR, report: Callable[[str], None]) -> None:
    """Copy a transformer of `num_classes` into one of another number: all weights, and the row of the null class."""
    weights = load_safetensors(found.folder / WEIGHTS)
    rows = model.class_embedding.weight.detach().clone()
    rows[-1] = weights["class_embedding.weight"][-1]  # the null class is the last
    model.load_state_dict(weights | {"class_embedding.weight": rows})
    report(
        f"{found.folder} has {num_classes} classes, this run has {model.config.num_classes}: its class rows start "
        "anew, the null class and all other weights are taken over"
    )


def write_public(file: Path, model: VAR | VQVAE) -> None:
    """Write a model as a flat state dict with the public names, and its config beside it."""
    file.parent.mkdir(exist_ok=True)
    entries = var_to_state_dict(model) if isinstance(model, VAR) else tokenizer_to_state_dict(model)
    torch.save({name: alone(value) for name, value in entries.items()}, file)
    (file.parent / CONFIG).write_text(json.dumps(describe(model.config), indent=1) + "\n")


def alone(value: Tensor) -> Tensor:
    """Return a tensor in a storage of its own: torch.save would write all of a larger one."""
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
