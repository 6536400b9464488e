"""Damaged packed folders, one change each: name -> (what is done to a sound folder, what the error says)."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tars import member, pax_tar, tar_of

SHARD = "shard-000000.tar"
MEMBERS = "shard-000000.members"
Damage = Callable[[Path], None]


def edit(name: str, change: Callable[[bytes], bytes]) -> Damage:
    """Replace the content of one file."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


def flip(place: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def instead(name: str, make: Callable[[Path], Any]) -> Damage:
    """Put something else in the place of a file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def set_index(**changes: Any) -> Damage:
    return edit("index.json", lambda content: json.dumps({**json.loads(content), **changes}).encode())


def set_shard(**changes: Any) -> Damage:
    """Change what the index says of its first shard."""

    def change(content: bytes) -> bytes:
        index = json.loads(content)
        index["shards"][0] |= changes
        return json.dumps(index).encode()

    return edit("index.json", change)


def set_meta(**changes: Any) -> Damage:
    def change(content: bytes) -> bytes:
        index = json.loads(content)
        index["meta"] |= changes
        return json.dumps(index).encode()

    return edit("index.json", change)


def without(key: str) -> Damage:
    def change(content: bytes) -> bytes:
        index = json.loads(content)
        (index if key in index else index["meta"]).pop(key)
        return json.dumps(index).encode()

    return edit("index.json", change)


# found by verify_shards.py: exit code 65, each fault a line that names the file
SHARDS: dict[str, tuple[Damage, str]] = {
    "a bit of a header flipped": (edit(SHARD, flip(5)), "member vq12 of sample 0 at byte 0 does not match"),
    "a bit of codes flipped": (edit(SHARD, flip(1536 + 600)), "member vq12 of sample"),
    "a bit of the end flipped": (edit(SHARD, flip(-1 % 512)), "member vq12 of sample 0"),
    "a block of zeros": (edit(SHARD, lambda data: data[:1024] + bytes(512) + data[1536:]), "member vq12 of sample"),
    "two blocks swapped": (edit(SHARD, lambda d: d[512:1024] + d[:512] + d[1024:]), "member vq12 of sample 0"),
    "cut between two members": (edit(SHARD, lambda data: data[:1024]), "1024 bytes, the index says"),
    "cut in a header": (edit(SHARD, lambda data: data[:1200]), "1200 bytes, the index says"),
    "cut in codes": (edit(SHARD, lambda data: data[:800]), "800 bytes, the index says"),
    "empty": (edit(SHARD, lambda data: b""), "0 bytes, the index says"),
    "longer": (edit(SHARD, lambda data: data + bytes(512)), "the index says"),
    "compressed": (edit(SHARD, gzip.compress), "the index says"),
    "noise of the same length": (edit(SHARD, lambda data: os.urandom(len(data))), "does not match its checksum"),
    "text of the same length": (edit(SHARD, lambda data: b"x" * len(data)), "does not match its checksum"),
    "missing": (instead(SHARD, lambda path: None), "no such file"),
    "a folder": (instead(SHARD, Path.mkdir), "no regular file"),
    "a pipe": (instead(SHARD, os.mkfifo), "no regular file"),
    "a link to nowhere": (instead(SHARD, lambda path: path.symlink_to("gone")), "no such file"),
    "a link to itself": (instead(SHARD, lambda path: path.symlink_to(path)), "symbolic link"),
    "an endless device": (instead(SHARD, lambda path: path.symlink_to("/dev/zero")), "no regular file"),
    "no table": (instead(MEMBERS, lambda path: None), "no such file"),
    "a cut table": (edit(MEMBERS, lambda data: data[:-33]), "sha256 is not the one in the index"),
    "a flipped table": (edit(MEMBERS, flip(3)), "sha256 is not the one in the index"),
    "a long table": (edit(MEMBERS, lambda data: data * 900), "at most"),
    "a table that is a pipe": (instead(MEMBERS, os.mkfifo), "no regular file"),
}

# found by train.py before the first step: exit code, what the line says
INDEXES: dict[str, tuple[Damage, int, str]] = {
    "no index": (instead("index.json", lambda path: None), 64, "never packed to the end"),
    "index empty": (edit("index.json", lambda data: b""), 65, "malformed index"),
    "index not JSON": (edit("index.json", lambda data: data[:-20]), 65, "malformed index"),
    "index of noise": (edit("index.json", lambda data: b"\xff\xfe\x00" * 99), 65, "malformed index"),
    "index a list": (edit("index.json", lambda data: b"[1]"), 65, "it holds a list"),
    "index nested deeply": (edit("index.json", lambda data: b"[" * 10**5), 65, "nested too deeply"),
    "index with a key twice": (edit("index.json", lambda d: d[:-2] + b', "kind": "codes"}'), 65, "gives 'kind' twice"),
    "index with NaN": (edit("index.json", lambda d: b'{"version": NaN}'), 65, "NaN, which is no number"),
    "index with endless digits": (edit("index.json", lambda d: b'{"version": ' + b"9" * 9999 + b"}"), 65, "digits"),
    "index a folder": (instead("index.json", Path.mkdir), 64, "no regular file"),
    "index a pipe": (instead("index.json", os.mkfifo), 64, "no regular file"),
    "index an endless device": (instead("index.json", lambda path: path.symlink_to("/dev/zero")), 64, "regular file"),
    "index of another version": (set_index(version=1), 65, "version is 1"),
    "index of an unknown kind": (set_index(kind="movies"), 65, "kind is 'movies'"),
    "index without shards": (without("shards"), 65, "'shards' is missing"),
    "index with no shard": (set_index(shards=[]), 64, "hold no samples"),
    "shards a number": (set_index(shards=3), 65, "malformed index"),
    "samples negative": (set_shard(samples=-1), 65, "samples is -1"),
    "samples too many": (set_shard(samples=10**12), 65, "cannot be in"),
    "samples one too many": (set_shard(samples=5), 65, "does not list the samples"),
    "samples a string": (set_shard(samples="4"), 65, "samples is 4"),
    "bytes wrong": (set_shard(bytes=10**6), 65, "the index says 1000000"),
    "hash too short": (set_shard(sha256="ab"), 65, "expected 64 hex digits"),
    "shard outside of the folder": (set_shard(name="../shard-000000.tar"), 65, "shard name is"),
    "location outside of the folder": (set_shard(location="../../x.tar"), 65, "location is"),
    "location a device": (set_shard(location="/dev/zero"), 64, "no regular file"),
    "location a command": (set_shard(location="pipe:cat /etc/passwd"), 65, "pipe"),
    "location of another scheme": (set_shard(location="ftp://host/x.tar"), 65, "ftp"),
    "location with a password": (set_shard(location="https://me:secret@host/x.tar"), 65, "password"),
    "an unknown field": (set_shard(weight=3), 65, "weight"),
    "classes a number": (set_meta(classes=10), 65, "classes is not a list"),
    "meta without the vocabulary": (without("vocab_size"), 65, "lacks vocab_size"),
    "meta a list": (set_index(meta=[]), 65, "meta is a list"),
    "views beyond measure": (set_meta(views=10**9), 65, "views is 1000000000"),
    "patch_nums beyond measure": (set_meta(patch_nums=[10**6]), 65, "patch_nums is"),
    "tokens that do not add up": (set_meta(num_tokens=7), 65, "patch_nums"),
    "codes of another schedule": (set_meta(patch_nums=[1, 3], num_tokens=10), 64, "patch_nums"),
    "codes of another tokenizer": (set_meta(tokenizer_sha256="0" * 64), 64, "tokenizer_sha256"),
    "images instead of codes": (set_index(kind="images", version=2), 65, "no table of 12 samples"),
}


def tar_file(content: bytes) -> Damage:
    def make(folder: Path) -> None:
        (folder / "theirs.tar").write_bytes(content)

    return make


JPEG_AND_CLASS = [(member("a.jpg"), b"\xff\xd8\xff"), (member("a.cls"), b"1")]
# found by index_shards.py, which is given theirs.tar: exit code, what the line says
TARS: dict[str, tuple[Damage, int, str]] = {
    "tar missing": (lambda folder: None, 64, "no such file"),
    "tar empty": (tar_file(b""), 65, "without the two blocks"),
    "tar of text": (tar_file(b"hello " * 999), 65, "no tar header at byte 0"),
    "tar compressed": (tar_file(gzip.compress(tar_of(*JPEG_AND_CLASS))), 65, "theirs.tar"),
    "tar without an end": (tar_file(tar_of(*JPEG_AND_CLASS)[:2048]), 65, "without the two blocks"),
    "tar with a hole": (tar_file(bytes(512) + tar_of(*JPEG_AND_CLASS)), 65, "zeros at byte 0 and data behind"),
    "tar without samples": (tar_file(tar_of()), 64, "no sample with one image and one class"),
    "tar of other files": (tar_file(tar_of((member("a.npy"), b"x"))), 64, "no sample with one image"),
    "tar without classes": (tar_file(tar_of((member("a.jpg"), b"x"))), 64, "expected cls or json"),
    "tar with a class in words": (
        tar_file(tar_of((member("a.jpg"), b"x"), (member("a.cls"), b"cat"))), 64, "expected a class number"
    ),
    "tar with a symbolic link": (tar_file(tar_of((member("a.jpg", tarfile.SYMTYPE), b""))), 65, "symbolic link"),
    "tar with a hard link": (tar_file(tar_of((member("a.jpg", tarfile.LNKTYPE), b""))), 65, "hard link"),
    "tar with a device": (tar_file(tar_of((member("a.jpg", tarfile.CHRTYPE), b""))), 65, "a device"),
    "tar with a sparse file": (tar_file(tar_of((member("a.jpg", tarfile.GNUTYPE_SPARSE), b""))), 65, "sparse"),
    "tar with a name outside": (tar_file(tar_of((member("../../a.jpg"), b"x"))), 65, "without '..'"),
    "tar with an absolute name": (tar_file(tar_of((member("/etc/a.jpg"), b"x"))), 65, "accepted are relative names"),
    "tar with a line break in a name": (tar_file(tar_of((member("a\nb.jpg"), b"x"))), 65, "printable"),
    "tar with a member twice": (tar_file(tar_of((member("a.jpg"), b"x"), (member("a.jpg"), b"y"))), 65, "two members"),
    "tar with samples interleaved": (
        tar_file(tar_of(*((member(name), b"1") for name in ("a.cls", "b.cls", "a.jpg")))), 65, "must be neighbours"
    ),
    "tar that claims a terabyte": (
        tar_file(member("a.jpg", size=2**40).tobuf(tarfile.GNU_FORMAT) + bytes(9999)), 65, "claims 1099511627776"
    ),
    "tar with a bad pax header": (tar_file(pax_tar(b"99 path=b\n")), 65, "malformed"),
    "tar that is a pipe": (lambda folder: os.mkfifo(folder / "theirs.tar"), 64, "no regular file"),
}  # fmt: skip


def copy_codes(source: Path, folder: Path) -> Path:
    """A folder of its own to be damaged."""
    return Path(shutil.copytree(source, folder / "data"))
