"""Precision, recall, density and coverage: how two sets of features overlap as unions of balls.

Each feature has a ball that reaches to its k-th nearest neighbour in its own set. Precision is the share of generated
features inside a real ball, recall the share of real features inside a generated ball (Kynkaanniemi et al. 2019).
Density counts in how many real balls a generated feature lies, over k; coverage is the share of real balls that hold
one (Naeem et al. 2020). Distances are taken in blocks, so the memory is a few times BLOCK^2 numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.evaluation.gaussians import check_features

Array = NDArray[np.floating]
Distances = Callable[[Tensor, Tensor], Tensor]

BLOCK = 10_000  # OpenAI's evaluator decides for each block of this side whether float16 holds
NEIGHBOURS = 3  # of precision and recall
DENSITY_NEIGHBOURS = 5  # of density and coverage


@dataclass(frozen=True)
class Overlap:
    """How generated features overlap real ones; all but density lie in [0, 1]."""

    precision: float
    recall: float
    density: float
    coverage: float


def overlap(real: Array, generated: Array, device: torch.device | str = "cpu") -> Overlap:
    """Measure the overlap of real (N, D) and generated (M, D) features in float64.

    Raises:
        ValueError: the widths differ, or a set is no larger than the neighbours that are counted.
    """
    first, second = _as_tensors(real, generated, DENSITY_NEIGHBOURS, torch.float64, device)
    radii = _radii(first, (NEIGHBOURS, DENSITY_NEIGHBOURS), squared_distances)
    [generated_radii] = _radii(second, (NEIGHBOURS,), squared_distances)
    inside_real, inside_generated = _inside(first, radii[0], second, generated_radii, squared_distances)
    balls = torch.zeros(len(second), dtype=torch.int64, device=first.device)  # a generated feature lies in
    covered = torch.zeros(len(first), dtype=torch.bool, device=first.device)
    for rows, columns in _blocks(len(first), len(second)):
        inside = squared_distances(first[rows], second[columns]) < radii[1][rows, None]
        balls[columns] += inside.sum(0)
        covered[rows] |= inside.any(1)
    density = balls.double().mean().item() / DENSITY_NEIGHBOURS
    return Overlap(_share(inside_real), _share(inside_generated), density, _share(covered))


def adm_precision_recall(reference: Array, samples: Array, device: torch.device | str = "cpu") -> tuple[float, float]:
    """Return precision and recall as OpenAI's evaluator does, from features (N, D) and (M, D).

    Distances are squared and rounded to float16 at each step. A block of BLOCK x BLOCK that does not stay finite is
    taken in float32 instead. A feature on the edge of a ball is inside.

    Raises:
        ValueError: as `overlap` does.
    """
    first, second = _as_tensors(reference, samples, NEIGHBOURS, torch.float32, device)
    [radii] = _radii(first, (NEIGHBOURS,), adm_distances)
    [sample_radii] = _radii(second, (NEIGHBOURS,), adm_distances)
    inside_reference, inside_samples = _inside(first, radii, second, sample_radii, adm_distances)
    return _share(inside_reference), _share(inside_samples)


def squared_distances(one: Tensor, other: Tensor) -> Tensor:
    """Return the squared distances (N, M) between rows of (N, D) and (M, D). Equal rows are at 0 exactly."""
    norms = one.square().sum(1)[:, None] + other.square().sum(1)[None]
    distances = norms - 2 * one @ other.T
    return torch.where(distances > 64 * torch.finfo(one.dtype).eps * norms, distances, 0)


def adm_distances(one: Tensor, other: Tensor) -> Tensor:
    """Return the squared distances (N, M) of float32 features in float16, or in float32 if one is not finite."""
    half, other_half = one.half(), other.half()
    # float16 factors, summed in float32 and rounded once, as a GPU multiplies float16 matrices
    product = (half.float() @ other_half.float().T).half()
    distances = half.square().sum(1)[:, None] - 2 * product + other_half.square().sum(1)[None]
    if distances.isfinite().all():
        return distances.clamp(min=0).float()
    norms = one.square().sum(1)[:, None], other.square().sum(1)[None]
    return (norms[0] - 2 * one @ other.T + norms[1]).clamp(min=0)


def _as_tensors(
    real: Array, generated: Array, neighbours: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    check_features(real)
    check_features(generated, width=real.shape[1])
    if min(len(real), len(generated)) <= neighbours:
        raise ValueError(
            f"there are {len(real)} real and {len(generated)} generated features; more than {neighbours} of each "
            "are needed for the distance to the neighbours of one"
        )
    return torch.from_numpy(real).to(device, dtype), torch.from_numpy(generated).to(device, dtype)


def _radii(features: Tensor, neighbours: tuple[int, ...], distances: Distances) -> list[Tensor]:
    """Return, for each k of `neighbours`, the distances (N,) from each feature to its k-th nearest other one."""
    most = max(neighbours) + 1  # a feature is its own nearest
    rows = []
    for row in _slices(len(features)):
        nearest = features.new_empty(len(features[row]), 0)
        for column in _slices(len(features)):
            found = torch.cat([nearest, distances(features[row], features[column])], 1)
            nearest = found.topk(min(most, found.shape[1]), largest=False).values
        rows.append(nearest)
    table = torch.cat(rows)
    return [table[:, k] for k in neighbours]


def _inside(
    real: Tensor, real_radii: Tensor, generated: Tensor, generated_radii: Tensor, distances: Distances
) -> tuple[Tensor, Tensor]:
    """Tell which generated features (M,) lie in a real ball, and which real ones (N,) in a generated ball."""
    generated_inside = torch.zeros(len(generated), dtype=torch.bool, device=real.device)
    real_inside = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, columns in _blocks(len(real), len(generated)):
        found = distances(real[rows], generated[columns])
        generated_inside[columns] |= (found <= real_radii[rows, None]).any(0)
        real_inside[rows] |= (found <= generated_radii[None, columns]).any(1)
    return generated_inside, real_inside


def _slices(length: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, length, BLOCK))


def _blocks(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    return ((row, column) for row in _slices(rows) for column in _slices(columns))


def _share(inside: Tensor) -> float:
    return inside.double().mean().item()
