"""Small JSON files that carry their own sha256, so that a damaged one is not taken for what its writer wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_pipeline.files import atomic_file, bytes_sha256
from data_pipeline.strict_json import parse_json

SEAL = "sha256"


def seal_of(content: Any) -> str:
    """sha256 of plain JSON, whatever the order of its keys."""
    return bytes_sha256(json.dumps(content, sort_keys=True).encode())


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write a mapping of plain JSON, all keys text, in one step."""
    with atomic_file(path) as file:
        file.write(json.dumps({**content, SEAL: seal_of(content)}).encode() + b"\n")


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote. Raises FileNotFoundError, and ValueError with a reason for anything else."""
    content = parse_json(path.read_bytes())
    if not isinstance(content, dict) or content.pop(SEAL, None) != seal_of(content):
        raise ValueError("its sha256 is not the one it states")
    return content
