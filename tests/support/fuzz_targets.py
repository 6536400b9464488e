"""What coverage-guided fuzzing calls with bytes: one function for each format that may come from elsewhere.

Each reads the bytes as the program would. The errors that reading promises are fine; anything else that is raised is a
finding, and so is an answer that a second, independent way of reading contradicts.
"""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml

from data_pipeline.files.damage import DamagedData
from data_pipeline.images.decoding import label_of, read_header
from data_pipeline.shards.codes import CodeFormat
from data_pipeline.shards.index import Index
from data_pipeline.shards.members import Scan, cut_sample
from data_pipeline.shards.tar import TarFault, bytes_reader
from launchers.pack_images import PackConfig
from launchers.setup.config_files import build_config, parse_yaml
from training.checkpoints.commit import MANIFEST, read_manifest, sealed, structural_damage

MAX_PIXELS = 4_000_000  # the fuzzer is after mistakes, not after large pictures
FORMATS = [CodeFormat(tokens, views, bits) for tokens in (5, 14) for views in (1, 3) for bits in (12, 16)]


def shard(content: bytes) -> None:
    """A tar is refused, or every sample is what Python's tarfile finds in it and what the table leads back to."""
    scan = Scan(bytes_reader(content), len(content))
    try:
        samples = list(scan.samples())
    except TarFault as fault:
        assert "\n" not in str(fault)
        return
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
    found = {name.lower(): data for name, data in files.items()}
    for number, sample in enumerate(samples):
        rows = [row for row in scan.table().tolist() if row[0] == number]
        assert cut_sample(content[rows[0][2] : rows[-1][3] + rows[-1][4]], rows) == sample
        for suffix, data in sample.members.items():
            assert found[f"{sample.key}.{suffix}".lower()] == data
        with contextlib.suppress(ValueError):
            label_of(sample)


def image(content: bytes) -> None:
    """A picture is refused, or decoded into RGB of the size that its header says."""
    try:
        stored = read_header(content)
        if stored.width * stored.height > MAX_PIXELS:
            return
        picture = stored.decode()
    except ValueError as error:
        assert "\n" not in str(error) and str(error)
        return
    assert picture.mode == "RGB" and picture.size == stored.upright_size
    assert np.asarray(picture).shape == (picture.height, picture.width, 3)


def code_record(content: bytes) -> None:
    """A record is refused, or unpacked into what packs into the same bytes. The first byte tells its format."""
    if not content:
        return
    layout, record = FORMATS[content[0] % len(FORMATS)], content[1:]
    try:
        views = [layout.unpack_view(record, view) for view in range(layout.views)]
    except ValueError as error:
        assert "\n" not in str(error)
        return
    rows = [replace(layout, views=1).pack(label, codes[None]) for label, codes in views]
    assert b"".join(rows) == record


def index(content: bytes) -> None:
    """An index is refused, or comes back the same from its own bytes."""
    try:
        found = Index.parse(content, "index.json")
    except DamagedData as error:
        assert "\n" not in str(error)
        return
    again = Index.parse(found.to_bytes(), "index.json")
    assert again == found and again.fingerprint == found.fingerprint


def config(content: bytes) -> None:
    """YAML is refused, or holds plain values that PyYAML writes and this reader reads back."""
    try:
        values = parse_yaml(content, "config.yaml")
    except ValueError as error:
        assert "\n" not in str(error) and "config.yaml" in str(error)
        return
    assert parse_yaml(yaml.safe_dump(values), "again") == values
    with contextlib.suppress(ValueError):
        build_config(PackConfig, [values if isinstance(values, dict) else {}], source="again")


def manifest(content: bytes) -> None:
    """A manifest of a checkpoint is refused, or fits its seal and names only what lies in its folder."""

    def read(path: Path) -> None:
        try:
            assert "\n" not in structural_damage(path.parent)
            found = read_manifest(path.parent)
        except ValueError as error:
            assert "\n" not in str(error)
            return
        assert sealed(found) == content
        for name in found["files"]:
            assert (path.parent / name).resolve().is_relative_to(path.parent.resolve())

    with_file(MANIFEST, content, read)
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(values := json.loads(content), dict):  # the same with a seal that fits
            values.pop("seal", None)
            content = sealed(values)
            with_file(MANIFEST, content, read)


def with_file(name: str, content: bytes, read: Callable[[Path], object]) -> None:
    """Call `read` with a file of that name and content, in a folder in memory where there is one."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        read(path)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "shard": shard,
    "image": image,
    "code_record": code_record,
    "index": index,
    "config": config,
    "manifest": manifest,
}
