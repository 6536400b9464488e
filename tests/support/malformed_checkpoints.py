"""Checkpoints that are not as they were written, one change each: what is done to a sound one, and what is said."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.checkpoints.commit import content_damage, read_manifest, sealed, structural_damage

Damage = Callable[[Path], None]


def edit(change: Callable[[bytes], bytes], name: str = "manifest.json") -> Damage:
    """Change the bytes of a file."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


def instead(make: Callable[[Path], Any], name: str = "manifest.json") -> Damage:
    """Put something else in the place of a file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def reseal(**changes: Any) -> Damage:
    """Change a manifest and seal it again, as somebody would who means harm; None takes a fact out."""

    def change(content: bytes) -> bytes:
        manifest = {name: value for name, value in json.loads(content).items() if name != "seal"} | changes
        return sealed({name: value for name, value in manifest.items() if value is not None})

    return edit(change)


def relist(name: str, **changes: Any) -> Damage:
    """List another file too, and seal the manifest."""

    def change(content: bytes) -> bytes:
        manifest = {key: value for key, value in json.loads(content).items() if key != "seal"}
        manifest["files"][name] = {"bytes": 200, "sha256": "0" * 64} | changes
        return sealed(manifest)

    return edit(change)


def a_file_of(folder: Path) -> str:
    """A file that the manifest lists."""
    return str(next(iter(json.loads((folder / "manifest.json").read_text())["files"])))


def to_listed(make: Callable[[Path], Any]) -> Damage:
    """Put something else in the place of a listed file."""

    def damage(folder: Path) -> None:
        instead(make, a_file_of(folder))(folder)

    return damage


def link_away(path: Path) -> None:
    """A link to a file outside of the checkpoint."""
    path.symlink_to(path.absolute().parent.parent.parent / "outside.bin")


def sparse(path: Path) -> None:
    """A file of a gigabyte that takes no room."""
    path.touch()
    os.truncate(path, 2**30)


CHECKPOINTS: dict[str, tuple[Damage, str]] = {
    "no manifest": (instead(lambda path: None), "manifest.json is missing"),
    "manifest empty": (edit(lambda data: b""), "not valid JSON"),
    "manifest cut": (edit(lambda data: data[:-30]), "not valid JSON"),
    "manifest of noise": (edit(lambda data: b"\xff\xfe" * 99), "not valid JSON: no UTF-8 text"),
    "manifest a list": (edit(lambda data: b"[]"), "holds no manifest"),
    "manifest nested deeply": (edit(lambda data: b"[" * 10**5), "nested too deeply"),
    "manifest with a key twice": (edit(lambda d: d.replace(b"{", b'{"step": 1, ', 1)), "gives 'step' twice"),
    "manifest with a flipped bit": (edit(lambda d: d.replace(b'"step": 1', b'"step": 3')), "does not fit its seal"),
    "manifest without a seal": (edit(lambda data: b'{"format": 2, "seal": ""}'), "does not fit its seal"),
    "manifest a folder": (instead(Path.mkdir), "is a folder"),
    "manifest a pipe": (instead(os.mkfifo), "is a pipe"),
    "manifest an endless device": (instead(lambda path: path.symlink_to("/dev/zero")), "is a link"),
    "manifest a link": (instead(link_away), "is a link"),
    "manifest a link to itself": (instead(lambda path: path.symlink_to(path)), "is a link"),
    "manifest of a gigabyte": (instead(sparse), "has 1073741824 bytes, at most"),
    "step a text": (reseal(step="1"), "step is '1', expected int"),
    "step negative": (reseal(step=-1), "step is -1, expected 0 or more"),
    "step of another folder": (reseal(step=9), "is that of step 9"),
    "no format": (reseal(format=None), "format is 'None'"),
    "identity a list": (reseal(identity=[1]), "identity is '[1]', expected dict"),
    "config a text": (reseal(config="x" * 10**5), "config is 'xxx"),
    "an engine a number": (reseal(engines={"model": 3}), "engine 'model' is no mapping"),
    "files a list": (reseal(files=["a"]), "files is \"['a']\", expected dict"),
    "a file without a size": (relist("a.bin", bytes=None), "does not say size and sha256 of a.bin"),
    "a file of negative size": (relist("a.bin", bytes=-5), "does not say size and sha256 of a.bin"),
    "a file without a hash": (relist("a.bin", sha256="abc"), "does not say size and sha256 of a.bin"),
    "a file that is not there": (relist("z.bin"), "z.bin is missing"),
    "a listed file gone": (to_listed(lambda path: None), "is missing"),
    "a listed file a folder": (to_listed(Path.mkdir), "is missing"),
    "a listed file a pipe": (to_listed(os.mkfifo), "is no regular file"),
    "a listed file a link": (to_listed(link_away), "is no regular file"),
    "a listed file an endless device": (to_listed(lambda path: path.symlink_to("/dev/zero")), "is no regular file"),
    "a foreign file": (lambda folder: (folder / "more.bin").touch(), "more.bin does not belong there"),
    "a foreign folder behind a link": (lambda folder: (folder / "more").symlink_to("/etc"), "is no regular file"),
}


def damage_of(folder: Path) -> str:
    """What is wrong with a checkpoint, its contents too; empty: nothing."""
    if damage := structural_damage(folder):
        return damage
    manifest = read_manifest(folder)
    return content_damage(folder, manifest, list(manifest["files"]))


def share_of(folder: Path) -> Path:
    return next(folder.glob("state/*.safetensors"))


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0] ^ (1 << bit % 8)
        file.seek(bit // 8)
        file.write(bytes([byte]))


def cut(path: Path, *, keep: float) -> None:
    """Keep only this share of a file."""
    os.truncate(path, int(path.stat().st_size * keep))


# of the checkpoint of a run that has that of step 1 too
DAMAGES: dict[str, Callable[[Path], object]] = {
    "a file cut to nothing": lambda folder: cut(share_of(folder), keep=0),
    "a file cut in half": lambda folder: cut(folder / "weights" / "model.safetensors", keep=0.5),
    "a file that grew": lambda folder: os.truncate(share_of(folder), share_of(folder).stat().st_size + 1),
    "a flipped bit": lambda folder: flip(share_of(folder), 8 * share_of(folder).stat().st_size - 1),
    "a flipped bit in a config": lambda folder: flip(folder / "weights" / "config.json", 90),
    "a missing share": lambda folder: share_of(folder).unlink(),
    "a share too many": lambda folder: shutil.copy(share_of(folder), folder / "state" / "share-of-nobody.safetensors"),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "a manifest of garbage": lambda folder: (folder / "manifest.json").write_bytes(bytes(range(256))),
    "a manifest with a flipped bit": lambda folder: flip(folder / "manifest.json", 200),
    "the manifest of another step": lambda folder: shutil.copy(
        folder.with_name("step-00000001") / "manifest.json", folder / "manifest.json"
    ),
    "an empty manifest": lambda folder: cut(folder / "manifest.json", keep=0),
}
