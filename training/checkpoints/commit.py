"""Checkpoint folders that are whole or absent: how they are written, verified and forgotten.

A folder is written under a temporary name. Every file is forced to disk, a manifest lists the files with size and
sha256, and the folder is renamed to its final name: the rename is the commit. What is not listed, or not as listed, is
damage. Nothing here knows of ranks or of what the files mean. `atomic_folder` does the same for one process; here many
write, so that making the folder, filling it and committing it are steps of their own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, ClassVar

from data_pipeline.files.atomic import bytes_sha256, file_sha256, fsync
from data_pipeline.files.strict_json import MAX_BYTES, parse_json, read_regular_file

FORMAT = 2
MANIFEST = "manifest.json"
KEEP = "keep"  # the manifest does not list it, so that people may add it and take it away
SEAL = "seal"  # the key under which a manifest states its own hash
TEMPORARY, DOOMED, DAMAGED = ".tmp-", ".old-", ".damaged-"  # prefixes of folders that are no checkpoints
FACTS: dict[str, type] = {  # what every manifest says
    "format": int,
    "step": int,
    "samples_seen": int,
    "useful_seconds": float,
    "world_size": int,
    "model": dict,
    "identity": dict,
    "config": dict,
    "engines": dict,
    "files": dict,
}
NAME = re.compile(r"step-\d{8,}")
FILE_NAME = re.compile(r"(?:\w[\w.-]*/){0,2}\w[\w.-]*")  # in this folder or below it, never above
SHA256 = re.compile(r"[0-9a-f]{64}")
Entry = dict[str, Any]  # of a manifest: {"bytes": ..., "sha256": ...}


class DamagedCheckpoint(ValueError):
    """A checkpoint that was read and is not as it was written, or is gone."""

    exit_code: ClassVar[int] = 65


class UnreadableCheckpoint(OSError):
    """A checkpoint that could not be read: storage failed, which says nothing of what the checkpoint holds."""

    exit_code: ClassVar[int] = 74

    @classmethod
    def of(cls, path: Path, error: OSError) -> UnreadableCheckpoint:
        """Name the file and what to do."""
        why = error.strerror or error  # safetensors gives a text alone
        return cls(f"{path} cannot be read ({why}); no checkpoint was renamed: try again when the storage is well")


def folder_name(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"step-{step:08d}"


def candidates(root: Path) -> list[Path]:
    """Return all folders with the name of a checkpoint, the newest first. What people put beside them is none.

    Raises:
        UnreadableCheckpoint: `root` is there and cannot be listed, which `Path.glob` may take for an empty folder.
    """
    try:
        with os.scandir(root) as entries:
            names = [each.name for each in entries if NAME.fullmatch(each.name) and each.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UnreadableCheckpoint.of(root, error) from None
    return sorted((root / name for name in names), key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def committed_checkpoints(root: Path) -> list[Path]:
    """Return the checkpoints with a sealed manifest of their own step, oldest first; contents are not verified."""
    return [path for path in reversed(candidates(root)) if _is_sealed(path)]


def latest_checkpoint(root: Path) -> Path | None:
    """Return the newest checkpoint with a sealed manifest of its own step, or None."""
    return next(filter(_is_sealed, candidates(root)), None)


def make_room(root: Path, temporary: Path) -> None:
    """Remove what an interrupted save or removal has left behind, and make the folder to write to."""
    for leftover in [*root.glob(f"{TEMPORARY}*"), *root.glob(f"{DOOMED}*")]:
        shutil.rmtree(leftover)
    temporary.mkdir(parents=True)


def write_file(path: Path, content: bytes) -> Entry:
    """Write a file and force it to disk; return its entry in the manifest, the hash of what was meant to be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": bytes_sha256(content)}


def publish(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a folder whose files are all there, and rename the folder into place: the commit.

    Raises:
        OSError: something could not be written; `final` is as it was before.
        ValueError: a listed file is missing or of another size: this process does not see what another one wrote.
    """
    for name, entry in manifest["files"].items():
        file = temporary / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            raise ValueError(f"{file} was written but is not seen by rank 0; the run folder must be on shared storage")
    write_file(temporary / MANIFEST, sealed(manifest))
    for folder in {(temporary / name).parent for name in manifest["files"]} | {temporary}:
        fsync(folder)
    os.rename(temporary, final)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint out of the way, for somebody to look at; return its new place."""
    number = 0
    while (target := folder.with_name(f"{DAMAGED}{folder.name}-{number}")).exists():
        number += 1
    os.rename(folder, target)
    fsync(folder.parent)
    return target


def forget_old(root: Path, *, keep: int, keep_every: int) -> None:
    """Remove all but the newest `keep` checkpoints, kept ones, and those of every `keep_every`-th step (0: none).

    A folder whose manifest is not sealed, or is that of another step, is not counted and not removed.
    """
    passing = [path for path in candidates(root) if _is_sealed(path) and not _stays(path, keep_every)]
    for old in passing[keep:]:
        doomed = old.with_name(f"{DOOMED}{old.name}")
        os.rename(old, doomed)
        shutil.rmtree(doomed)


def _is_sealed(folder: Path) -> bool:
    try:
        return read_manifest(folder)["step"] == _step_of(folder)
    except ValueError:
        return False


def _stays(folder: Path, keep_every: int) -> bool:
    return (folder / KEEP).exists() or (keep_every > 0 and _step_of(folder) % keep_every == 0)


def sealed(manifest: dict[str, Any]) -> bytes:
    """Return a manifest as bytes with a hash over the rest; unlike `write_sealed` it lets no bit of the text change."""
    return _to_bytes(manifest | {SEAL: bytes_sha256(_to_bytes(manifest))})


def _to_bytes(manifest: dict[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1) + "\n").encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint, without its seal.

    Raises:
        DamagedCheckpoint: it is missing, or not what was written.
        UnreadableCheckpoint: storage failed while it was read.
        ValueError: another version of this program wrote it.
    """
    path = folder / MANIFEST
    try:
        content = read_regular_file(path, max_bytes=MAX_BYTES, follow_links=False)
        manifest = parse_json(content)
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedCheckpoint(f"{path} is missing") from None
    except ValueError as error:
        raise DamagedCheckpoint(f"{path} {error}") from None
    except OSError as error:
        raise UnreadableCheckpoint.of(path, error) from None
    if not isinstance(manifest, dict):
        raise DamagedCheckpoint(f"{path} holds no manifest")
    if SEAL not in manifest and manifest.get("format") == 1:
        raise ValueError(f"{folder}: checkpoint format 1, this version reads {FORMAT}; go on with the version it is of")
    manifest.pop(SEAL, None)
    if sealed(manifest) != content:
        raise DamagedCheckpoint(f"{path} does not fit its seal")
    if type(manifest.get("format")) is int and manifest["format"] != FORMAT:
        raise ValueError(f"{folder}: checkpoint format {manifest['format']}, this version reads {FORMAT}")
    if nonsense := _nonsense(manifest):
        raise DamagedCheckpoint(f"{path} is sealed, but {nonsense}")
    return manifest


def _nonsense(manifest: dict[str, Any]) -> str:
    """Return what in a manifest this program never writes, or "": anybody can seal anything."""
    for name, kind in FACTS.items():
        value: Any = manifest.get(name)
        if type(value) is not kind and not (kind is float and type(value) is int):
            return f"{name} is {str(value)[:40]!r}, expected {kind.__name__}"
        if isinstance(value, (int, float)) and value < 0:
            return f"{name} is {value}, expected 0 or more"
    for tag, scalars in manifest["engines"].items():
        if not isinstance(scalars, dict):
            return f"engine {tag[:40]!r} is no mapping"
    for name, entry in manifest["files"].items():
        if not FILE_NAME.fullmatch(name) or name in (MANIFEST, KEEP):
            return f"lists a file {name[:80]!r}"
        is_entry = isinstance(entry, dict) and type(entry.get("bytes")) is int and entry["bytes"] >= 0
        if not is_entry or not SHA256.fullmatch(str(entry.get("sha256"))):
            return f"does not say size and sha256 of {name}"
    return ""


def structural_damage(folder: Path) -> str:
    """Return what is wrong with a checkpoint apart from the contents of its listed files, or "".

    Raises:
        UnreadableCheckpoint: storage failed.
        ValueError: another version of this program wrote it.
    """
    try:
        manifest = read_manifest(folder)
    except DamagedCheckpoint as damage:
        return str(damage)
    if folder.name != folder_name(manifest["step"]):
        return f"{folder / MANIFEST} is that of step {manifest['step']}"
    listed = set(manifest["files"])
    inside = _files_in(folder)
    for path in inside:
        if path.is_symlink() or not path.is_file():
            return f"{path} is no regular file"
    found = {str(path.relative_to(folder)) for path in inside} - {MANIFEST, KEEP}
    for name in sorted(listed - found):
        return f"{folder / name} is missing"
    for name in sorted(found - listed):
        return f"{folder / name} does not belong there"
    return ""


def _files_in(folder: Path) -> list[Path]:
    """List all that is below a folder and is no folder itself; a link to a folder counts as a file."""

    def fail(error: OSError) -> None:  # os.walk and Path.rglob would take an unreadable folder for an empty one
        raise UnreadableCheckpoint.of(Path(error.filename), error)

    found: list[Path] = []
    for place, folders, files in os.walk(folder, onerror=fail):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        found += [Path(place) / name for name in [*files, *links]]
    return sorted(found)


def content_damage(folder: Path, manifest: dict[str, Any], names: list[str]) -> str:
    """Return what is wrong with the contents of some of the listed files, or "".

    Raises:
        UnreadableCheckpoint: storage failed.
    """
    for name in names:
        entry, file = manifest["files"].get(name), folder / name
        if entry is None:
            return f"{folder / MANIFEST} does not list {name}"
        try:
            if file.stat().st_size != entry["bytes"]:
                return f"{file} has {file.stat().st_size} bytes instead of {entry['bytes']}"
            if file_sha256(file) != entry["sha256"]:
                return f"{file} is damaged (sha256)"
        except (FileNotFoundError, NotADirectoryError):
            return f"{file} is missing"
        except OSError as error:
            raise UnreadableCheckpoint.of(file, error) from None
    return ""
