"""The worker that drives the public code must not import anything of ours: its packages have the names of ours."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from launchers import public_worker


def test_it_imports_the_standard_library_torch_and_the_public_code_alone() -> None:
    tree = ast.parse(Path(public_worker.__file__).read_text())
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in found if name.split(".")[0] not in sys.stdlib_module_names} == {
        "torch",
        "models",
        "utils.amp_sc",
    }
    at_the_top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not any(node.module == "models" for node in at_the_top if isinstance(node, ast.ImportFrom))
