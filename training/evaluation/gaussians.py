"""The Frechet distance between two sets of features, each taken for a Gaussian: FID, sFID, rFID, FD.

The distance is |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) (Heusel et al. 2017, eq. 6). Means and covariances come in
two ways. `Moments` streams sums in float64, so a set of any size fits. `adm_gaussian` takes the mean in float32, as
OpenAI's evaluator does (guided-diffusion, evaluations/evaluator.py), whose numbers papers print.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


@dataclass(frozen=True)
class Gaussian:
    """The mean (D,) and the covariance (D, D), with divisor N - 1, of `count` features."""

    mean: Array
    covariance: Array
    count: int

    @property
    def is_singular(self) -> bool:
        """Whether there are too few features for the covariance to have full rank; the distance is then biased."""
        return self.count <= len(self.mean)


class Moments:
    """Sums over features, in float64, from which the Gaussian of a set is made without holding the set.

    Sums of the same parts, merged in the same order, are equal to the last bit. So ranks that each sum whole parts
    agree with one process that sums them all.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.sum = np.zeros(width)
        self.products = np.zeros((width, width))

    def add(self, features: Array) -> None:
        """Add features (N, D).

        Raises:
            ValueError: another width, or a value that is not finite.
        """
        check_features(features, width=len(self.sum))
        exact = features.astype(np.float64)
        self.count += len(exact)
        self.sum += exact.sum(0)
        self.products += exact.T @ exact

    def merge(self, other: Moments) -> None:
        """Add the sums of another part of the set."""
        self.count += other.count
        self.sum += other.sum
        self.products += other.products

    def gaussian(self) -> Gaussian:
        """Return the Gaussian of all features that were added.

        Raises:
            ValueError: there are fewer than two.
        """
        _require_two(self.count)
        mean = self.sum / self.count
        covariance = (self.products - self.count * np.outer(mean, mean)) / (self.count - 1)
        return Gaussian(mean, covariance, self.count)


def gaussian_of(features: Array) -> Gaussian:
    """Return the Gaussian of features (N, D), in float64."""
    moments = Moments(features.shape[1])
    moments.add(features)
    return moments.gaussian()


def adm_gaussian(features: Array) -> Gaussian:
    """Return the Gaussian of features (N, D) as OpenAI's evaluator takes it: the mean stays float32."""
    check_features(features)
    _require_two(len(features))
    features = features.astype(np.float32, copy=False)
    return Gaussian(features.mean(axis=0), np.cov(features, rowvar=False), len(features))


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """Return the Frechet distance between two Gaussians of the same width.

    The trace of (S1 S2)^1/2 is the sum of the singular values of S1^1/2 S2^1/2. This form has no complex parts and
    needs no epsilon where a covariance is singular, as OpenAI's sqrtm does; the values agree to rounding.

    Raises:
        ValueError: the widths differ.
    """
    if one.mean.shape != other.mean.shape:
        raise ValueError(
            f"features have widths {len(one.mean)} and {len(other.mean)}; compare sets of the same feature extractor"
        )
    offset = one.mean - other.mean
    shared = np.linalg.svd(_root(one.covariance) @ _root(other.covariance), compute_uv=False).sum()
    spread = np.trace(one.covariance) + np.trace(other.covariance) - 2 * shared
    return float(offset @ offset + max(spread, 0.0))  # rounding may leave a spread of -1e-12 between equal sets


def relative_frechet(distances: dict[str, float], validation: dict[str, float]) -> float:
    """Return FDr: the mean over feature spaces of FD(generated) / FD(validation), both against the training set.

    A value of 1 means that generated images are as far from the training set as held-out ones are.

    Raises:
        ValueError: the spaces differ, or a validation distance is not positive.
    """
    if not distances or distances.keys() != validation.keys():
        raise ValueError(
            f"distances are of {', '.join(distances) or 'no feature space'} and validation's of "
            f"{', '.join(validation) or 'none'}; measure both in the same feature spaces"
        )
    if wrong := [name for name, value in validation.items() if not value > 0]:
        raise ValueError(f"FD(validation) in {', '.join(wrong)} is not positive; take a validation set of other images")
    return float(np.mean([distances[name] / validation[name] for name in distances]))


def check_features(features: Array, width: int | None = None) -> None:
    """Check that features are a matrix (N, D) of finite numbers.

    Raises:
        ValueError: they are not, or D is not `width`.
    """
    if features.ndim != 2 or (width is not None and features.shape[1] != width):
        wanted = "(N, D)" if width is None else f"(N, {width})"
        raise ValueError(f"features have shape {features.shape}; {wanted} is needed")
    if not np.isfinite(features).all():
        row = int(np.flatnonzero(~np.isfinite(features).all(1))[0])
        raise ValueError(f"features of image {row} are not finite; look at that image and at the extractor's precision")


def _require_two(count: int) -> None:
    if count < 2:
        raise ValueError(f"a covariance needs two features or more, not {count}")


def _root(covariance: Array) -> Array:
    """Return the symmetric square root. Eigenvalues that are zero but for rounding are taken as zero."""
    values, vectors = np.linalg.eigh(covariance.astype(np.float64))
    floor = values.max(initial=0.0) * len(values) * np.finfo(np.float64).eps
    return (vectors * np.sqrt(np.where(values > floor, values, 0.0))) @ vectors.T
