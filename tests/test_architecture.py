"""The structure of the code, as rules: imports point one way, each outside library has its doors, files stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("models", "data_pipeline", "training", "launchers")
ALLOWED = {
    "models": {"models"},
    "data_pipeline": {"data_pipeline"},
    "training": {"training", "models"},
    "launchers": set(PACKAGES),
}
DOORS = {
    "deepspeed": {"training/engine.py"},
    "mlflow": {"training/mlflow_client.py", "training/mlflow_tracker.py"},
    "lpips": {"training/losses.py"},
    "omegaconf": {"launchers/config_files.py"},
    "fsspec": {"data_pipeline/connections.py"},
    "aiohttp": {"data_pipeline/connections.py"},
    "s3fs": {"data_pipeline/connections.py"},
    "xxhash": {"data_pipeline/members.py"},
    "braceexpand": {"data_pipeline/indexing.py"},
    "webdataset": {"data_pipeline/shards.py", "launchers/benchmark_loaders.py"},  # to write, and to be compared with
    "matplotlib": {"launchers/figures.py", "launchers/scaling_figures.py"},
    "scipy": {"training/power_law.py"},
    "sklearn": {"launchers/demo.py", "data_pipeline/sources.py"},
}
MODELS_MAY_IMPORT = {
    "models", "torch", "collections", "contextlib", "dataclasses", "functools", "itertools", "math", "re", "__future__"
}
TESTED_ELSEWHERE = {"training/distributed.py": "tests/test_distributed_world.py"}  # test_distributed.py needs two ranks
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).glob("*.py"))


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports, at its head or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=label)
def test_imports_point_one_way(path: Path) -> None:
    wrong = imported(path) & set(PACKAGES) - ALLOWED[path.parent.name]
    assert not wrong, f"{label(path)} imports {wrong}; {path.parent.name} may import {ALLOWED[path.parent.name]}"


@pytest.mark.parametrize("path", FILES, ids=label)
def test_outside_libraries_have_one_door(path: Path) -> None:
    for library in imported(path) & set(DOORS):
        assert label(path) in DOORS[library], f"{label(path)} imports {library}; its door is {DOORS[library]}"


@pytest.mark.parametrize("path", sorted((ROOT / "models").glob("*.py")), ids=label)
def test_models_are_mathematics_only(path: Path) -> None:
    extra = imported(path) - MODELS_MAY_IMPORT
    assert not extra, f"{label(path)} imports {extra}; models know torch and nothing else"
    assert "cuda" not in path.read_text(), f"{label(path)} names a device; tensors follow their inputs"


@pytest.mark.parametrize("path", FILES, ids=label)
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 300, f"{label(path)} has grown past one job"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{label(path)}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=label)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    if path.name != "__init__.py":
        assert ast.get_docstring(ast.parse(path.read_text())), f"{label(path)} opens without a docstring"


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "__init__.py"], ids=label)
def test_every_source_file_has_its_test_file(path: Path) -> None:
    wanted = TESTED_ELSEWHERE.get(label(path), f"tests/test_{path.name}")
    assert (ROOT / wanted).is_file(), f"{label(path)} has no {wanted}"


def test_every_launcher_is_a_command() -> None:
    scripts = (ROOT / "setup.cfg").read_text()
    for path in (ROOT / "launchers").glob("*.py"):
        if "def main() -> None:" in path.read_text() and path.stem != "demo":  # the demo needs the repository around it
            assert f"nextscale-{path.stem.replace('_', '-')} = launchers.{path.stem}:main" in scripts


def test_every_launcher_starts_as_a_file_from_any_folder() -> None:
    """Most tests fork launchers from a process that finds our packages already."""
    for path in (ROOT / "launchers").glob("*.py"):
        if "def main() -> None:" in (text := path.read_text()):
            own_root_first = text.index("sys.path.insert(0, str(Path(__file__).resolve().parent.parent))")
            assert own_root_first < text.index("\nfrom launchers") and text.endswith("    main()\n"), label(path)


def test_our_packages_are_the_ones_in_this_repository() -> None:
    import models

    assert Path(models.__file__ or "").resolve().is_relative_to(ROOT)
