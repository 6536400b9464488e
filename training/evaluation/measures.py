"""All measures of one generated set against one reference, in one of two modes.

mode "float64" is the right answer for the features at hand. mode "adm" repeats OpenAI's evaluator operation for
operation, so that a number can stand beside printed ones: the mean stays float32, IS takes stored splits of 5,000, and
the distances of precision and recall are squared float16.
"""

from __future__ import annotations

import torch

from training.evaluation.extractors import Features
from training.evaluation.gaussians import adm_gaussian, frechet_distance, gaussian_of
from training.evaluation.inception_score import adm_inception_score, inception_score, sorting_warning
from training.evaluation.manifolds import adm_precision_recall, overlap
from training.evaluation.mind import mind
from training.evaluation.reference import Reference

MODES = ("float64", "adm")


def measure(
    generated: Features, reference: Reference, *, mode: str = "float64", device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Measure generated features against a reference; return the measures by name.

    fd, sfd: Frechet distances of features and, where the extractor has them, of spatial features. is_stored,
    is_shuffled: Inception Scores in two orders, where it has probabilities. precision and recall; in mode "float64"
    also density, coverage and mind.

    Raises:
        ValueError: the features do not fit the reference, or there are too few, or the mode is not known.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode}; accepted: {', '.join(MODES)}")
    is_adm = mode == "adm"
    gaussian = adm_gaussian if is_adm else gaussian_of
    found = {"fd": frechet_distance(gaussian(generated.features), reference.gaussian)}
    if generated.spatial is not None and reference.spatial is not None:
        found["sfd"] = frechet_distance(gaussian(generated.spatial), reference.spatial)
    if (probabilities := generated.probabilities) is not None:
        found["is_shuffled"] = inception_score(probabilities, splits=min(10, len(probabilities)))
        stored = inception_score(probabilities, splits=min(10, len(probabilities)), seed=None)
        found["is_stored"] = adm_inception_score(probabilities) if is_adm else stored
    if is_adm:
        found["precision"], found["recall"] = adm_precision_recall(reference.features, generated.features, device)
    else:
        found |= vars(overlap(reference.features, generated.features, device))
        found["mind"] = mind(reference.features, generated.features)
    return found


def cautions(generated: Features, reference: Reference, measures: dict[str, float]) -> list[str]:
    """List what a reader of these measures has to know: biased covariances, and images sorted by class."""
    width, smaller = generated.features.shape[1], min(len(generated.features), reference.gaussian.count)
    found = []
    if smaller <= width:
        found.append(
            f"the Frechet distance is biased upwards: {smaller:,} images for {width:,} features; compare it only with "
            "distances of as many images, or draw more"
        )
    if "is_stored" in measures:
        found.append(sorting_warning(measures["is_stored"], measures["is_shuffled"]))
    return [line for line in found if line]
