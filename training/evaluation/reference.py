"""A reference set: what generated images are compared with, as one .npz file.

The file holds the moments of all images under the names of OpenAI's evaluator (mu, sigma, mu_s, sigma_s), the features
of up to MAX_NEIGHBOURS of them for the measures that need single images, and a description. OpenAI's own files hold no
features of ours; with them, precision and recall are taken from their images (arr_0).
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.files.atomic import atomic_file
from training.evaluation.extractors import Extractor, Features
from training.evaluation.gaussians import Gaussian, Moments

MAX_NEIGHBOURS = 10_000  # as many as OpenAI's reference sets have images


@dataclass(frozen=True)
class Reference:
    """Moments of a set of images, the features of some of them, and what the set is."""

    gaussian: Gaussian
    spatial: Gaussian | None
    features: NDArray[np.float32]  # (n, D), of n images drawn from the set
    description: dict[str, Any] = field(default_factory=dict)

    def check(self, extractor: Extractor, side: int) -> None:
        """Check that generated images of `side` pixels, seen by `extractor`, may be compared with this set.

        Raises:
            ValueError: it was made with other weights, or of images of another size.
        """
        mine, theirs = self.description.get("extractor_sha256"), extractor.sha256
        if mine != theirs:
            raise ValueError(
                f"the reference was made with extractor {self.description.get('extractor')} {str(mine)[:12]}, not with "
                f"{extractor.name} {theirs[:12]}; make a reference with this extractor"
            )
        if self.description.get("side") != side:
            raise ValueError(
                f"the reference is of images of {self.description.get('side')} pixels, these have {side}; "
                "make a reference of the same size"
            )

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        tables: dict[str, Any] = {
            "mu": self.gaussian.mean,
            "sigma": self.gaussian.covariance,
            "features": self.features,
        }
        if self.spatial is not None:
            tables |= {"mu_s": self.spatial.mean, "sigma_s": self.spatial.covariance}
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            np.savez(file, description=json.dumps(self.description), count=self.gaussian.count, **tables)

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it is no such file.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such reference; make it with `evaluate.py reference out={path}`")
        try:
            with np.load(path, allow_pickle=False) as found:
                tables = {name: found[name] for name in found.files}
            count = int(tables["count"])
            gaussian = Gaussian(tables["mu"], tables["sigma"], count)
            spatial = Gaussian(tables["mu_s"], tables["sigma_s"], count) if "mu_s" in tables else None
            return cls(gaussian, spatial, tables["features"], json.loads(str(tables["description"])))
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: is no reference of `evaluate.py reference` ({error})") from error


class ReferenceSums:
    """Gathers a reference from the features of consecutive parts of a set, of any size."""

    def __init__(self, count: int, seed: int = 0) -> None:
        """count: the images of the set. seed: of the draw of those whose features are kept."""
        drawn = np.random.default_rng(seed).choice(count, min(count, MAX_NEIGHBOURS), replace=False)
        self.is_kept = np.zeros(count, bool)
        self.is_kept[drawn] = True
        self.seen = 0
        self.moments: dict[str, Moments] = {}
        self.kept: list[NDArray[np.float32]] = []

    def add(self, part: Features) -> None:
        """Add the features of the next images."""
        for name in ("features", "spatial"):
            if (table := getattr(part, name)) is not None:
                self.moments.setdefault(name, Moments(table.shape[1])).add(table)
        size = len(part.features)
        self.kept.append(part.features[self.is_kept[self.seen : self.seen + size]])
        self.seen += size

    def reference(self, description: dict[str, Any]) -> Reference:
        """Return the reference of all parts; ValueError if there are fewer than two images."""
        spatial = self.moments["spatial"].gaussian() if "spatial" in self.moments else None
        return Reference(self.moments["features"].gaussian(), spatial, np.concatenate(self.kept), description)
