"""Sets of images to evaluate, as they lie on disk: a sampling, an npz file, a folder of pictures, image shards."""

from __future__ import annotations

import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.files.atomic import file_sha256
from data_pipeline.images.decoding import ImageTransform
from data_pipeline.loading.datasets import ImageDataset
from data_pipeline.shards.index import is_complete
from launchers.sampling.files import NPZ, PARTS, RECORD
from launchers.sampling.pictures import to_uint8

import numpy as np
from PIL import Image

UNIT = 256  # images that are read and seen together
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


class ImageSet(ABC):
    """Images of one size, in an order of their own: `count` of `side` x `side` pixels, uint8 RGB.

    labels: the classes (N,), where they are known. identity: what tells this set from others, for the result.
    """

    count: int
    side: int
    labels: np.ndarray | None = None
    identity: dict[str, object]

    @abstractmethod
    def read(self, images: range) -> np.ndarray:
        """Read consecutive images, (n, H, W, 3) uint8. Later calls ask for later images."""

    def units(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, np.ndarray]]:
        """Yield every world_size-th unit of images from the rank-th on, with its number."""
        for unit in range(rank, -(-self.count // UNIT), world_size):
            yield unit, self.read(range(unit * UNIT, min((unit + 1) * UNIT, self.count)))


class NpzImages(ImageSet):
    """The images `arr_0` of an npz file, as OpenAI's evaluator reads them; never all of them are in memory."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises ValueError if it does not hold uint8 RGB images."""
        try:
            self._archive = zipfile.ZipFile(path)
            self._member = self._archive.open("arr_0.npy")
            version = np.lib.format.read_magic(self._member)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, is_fortran, dtype = read_header(self._member)
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
            raise ValueError(f"{path}: is no npz file with images in arr_0 ({error})") from error
        if len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2] or dtype != np.uint8 or is_fortran:
            raise ValueError(f"{path}: arr_0 is {dtype} of shape {shape}; uint8 of (N, side, side, 3) is needed")
        self.path, self.shape = path, shape
        self.count, self.side = shape[0], shape[1]
        with np.load(path, allow_pickle=False) as arrays:
            self.labels = next((arrays[name] for name in ("labels", "arr_1") if name in arrays.files), None)
        self.identity = {"file": path.name, "sha256": file_sha256(path)}
        self._next = 0

    def read(self, images: range) -> np.ndarray:
        """Read images further on in the file; those between are passed over."""
        size = self.side * self.side * 3
        self._member.seek((images.start - self._next) * size, 1)
        self._next = images.stop
        data = self._member.read(len(images) * size)
        if len(data) < len(images) * size:
            raise ValueError(f"{self.path}: ends before image {images.stop}; draw or copy it again")
        return np.frombuffer(data, np.uint8).reshape(len(images), self.side, self.side, 3)


class PictureFolder(ImageSet):
    """The picture files below a folder, in the order of their names. The folder of a picture names its class."""

    def __init__(self, folder: Path) -> None:
        """List the pictures. Raises FileNotFoundError if there are none."""
        found = [path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and path.parent != folder]
        flat = [path for path in folder.iterdir() if path.suffix.lower() in PICTURES]
        self.paths = sorted(found or flat)
        if not self.paths:
            raise FileNotFoundError(f"{folder}: holds no pictures ({', '.join(PICTURES)})")
        self.count = len(self.paths)
        with Image.open(self.paths[0]) as first:
            self.side = first.width
        if found:
            names = sorted({path.parent.name for path in found})
            self.labels = np.array([names.index(path.parent.name) for path in self.paths])
        self.identity = {"folder": folder.name, "pictures": self.count}

    def read(self, images: range) -> np.ndarray:
        """Decode pictures. Raises ValueError for one that is not RGB, or of another size than the first."""
        return np.stack([self._decode(path) for path in self.paths[images.start : images.stop]])

    def _decode(self, path: Path) -> np.ndarray:
        with Image.open(path) as picture:
            if picture.mode != "RGB" or picture.size != (self.side, self.side):
                raise ValueError(
                    f"{path}: is {picture.mode} of {picture.width} x {picture.height} pixels; RGB of "
                    f"{self.side} x {self.side}, as the first picture, is needed"
                )
            return np.asarray(picture)


class ShardImages(ImageSet):
    """The centre views of image shards."""

    def __init__(self, folder: Path, side: int, resize_ratio: float) -> None:
        """Open the shards. side: of the views in pixels, cut from pictures of resize_ratio x side."""
        transform = ImageTransform(side, resize_ratio=resize_ratio)
        self._data = ImageDataset(folder, transform, seed=0, random_views=False)
        self.count, self.side = len(self._data), side
        self.identity = {"shards": self._data.index.fingerprint, "resize_ratio": resize_ratio}

    def read(self, images: range) -> np.ndarray:
        """Read and decode images. Raises DamagedData for one that is not as it was packed."""
        ids = np.asarray(images)
        return to_uint8(self._data.read(ids, np.zeros(len(ids), np.int64))[0])


def open_image_set(path: str, side: int = 0, resize_ratio: float = 1.0) -> ImageSet:
    """Open a set of images: an npz file, image shards, the folder of a sampling, or a folder of pictures.

    side: of the views of image shards; other sets have a size of their own.
    resize_ratio: the short side of a picture in shards, in sides, from whose middle the view is cut.

    Raises:
        FileNotFoundError: it is not there, or a sampling is not finished.
        ValueError: it holds no images.
    """
    place = Path(path)
    if place.is_file():
        found: ImageSet = NpzImages(place)
    elif is_complete(place):
        if not side:
            raise ValueError(f"{place}: holds shards of pictures of any size; choose the views' size with side=PIXELS")
        found = ShardImages(place, side, resize_ratio)
    elif (place / NPZ).is_file():
        found = NpzImages(place / NPZ)
    elif (place / PARTS).is_dir():
        raise FileNotFoundError(f"{place}: is a sampling that is not finished; type its sample.py command again")
    elif (place / RECORD).is_file():
        found = PictureFolder(place / "png")
    elif place.is_dir():
        found = PictureFolder(place)
    else:
        raise FileNotFoundError(f"{place}: no such file or folder of images")
    return found
