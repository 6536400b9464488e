"""The plan of a sampling: which images it draws, in what order and batches, and the seed of each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Their product is 2^63, the number of noise seeds, so no two images of any two samplings share one.
MAX_SEEDS, MAX_CLASSES, MAX_PER_CLASS = 2**27, 2**16, 2**20
MAX_BATCH = 2**20


@dataclass(frozen=True)
class SamplePlan:
    """The images of every class, `per_class` each, class by class. Unit i is images [i * batch, (i + 1) * batch).

    Images are counted from 0 in this order; the number of an image counts within its class. A model without classes
    has the one class 0.
    """

    classes: tuple[int, ...]
    per_class: int
    batch: int
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {"per_class": (1, MAX_PER_CLASS), "batch": (1, MAX_BATCH), "seed": (0, MAX_SEEDS - 1)}
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: {least} to {most}")
        if any(not 0 <= label < MAX_CLASSES for label in self.classes):
            raise ValueError(f"classes go up to {max(self.classes)}; accepted: 0 to {MAX_CLASSES - 1}")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes is {self.classes}, which names one twice; raise per_class for more of a class")
        # a job of fewer images than a batch needs no wider one
        object.__setattr__(self, "batch", min(self.batch, self.num_images))

    @property
    def num_images(self) -> int:
        """The number of images of all classes."""
        return len(self.classes) * self.per_class

    @property
    def num_units(self) -> int:
        """The number of batches that hold them."""
        return -(-self.num_images // self.batch)

    def unit(self, number: int) -> np.ndarray:
        """Return the images of a unit, (n,) int64; the last unit may have fewer than `batch`."""
        return np.arange(number * self.batch, min((number + 1) * self.batch, self.num_images))

    def labels(self, images: np.ndarray) -> np.ndarray:
        """Return the class of every image, int64."""
        return np.asarray(self.classes, np.int64)[images // self.per_class]

    def numbers(self, images: np.ndarray) -> np.ndarray:
        """Return the number of every image within its class, int64."""
        return images % self.per_class

    def seeds(self, images: np.ndarray) -> np.ndarray:
        """Return the seed of every image, int64: each (seed, class, number) has one that no other has."""
        return (self.seed * MAX_CLASSES + self.labels(images)) * MAX_PER_CLASS + self.numbers(images)


def plan_samples(classes: tuple[int, ...], num_classes: int, *, per_class: int, batch: int, seed: int) -> SamplePlan:
    """Plan the images of a model of `num_classes` classes, 0 if it is unconditional; no `classes` stands for all.

    Raises:
        ValueError: a setting outside its range, or a class that the model does not know.
    """
    if num_classes == 0 and classes:
        raise ValueError(f"classes is {classes}; this model is unconditional, so leave classes out")
    for label in classes:
        if not 0 <= label < num_classes:
            raise ValueError(f"classes has {label}; this model knows 0 to {num_classes - 1}")
    return SamplePlan(classes or tuple(range(max(num_classes, 1))), per_class, batch, seed)
