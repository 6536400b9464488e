"""The public code is found in a checkout, gets our weights and as many threads, and does what it is told.

A stand-in with the public names answers here; the real one is measured by `benchmark.py train --against PATH`.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch
from public_stand_in import write_checkout

from launchers.bench import public_worker
from launchers.bench.config import BenchmarkConfig
from launchers.bench.models import make_tokenizer, make_var, public_code
from launchers.bench.public_code import PublicCode

CONFIG = BenchmarkConfig(what="train", depth=1, patch_nums=(1, 2), tokenizer_width=32, batch=2)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in's tensors lie on the CPU")


def public(checkout: Path, precision: str = "fp32") -> PublicCode:
    return PublicCode(str(checkout), make_var(CONFIG), make_tokenizer(CONFIG), precision=precision)


def test_it_does_what_it_is_told_with_as_many_threads_as_ours(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # no default
    try:
        with public(write_checkout(tmp_path, threads=threads + 1)) as running:
            assert running.timed("encode", batch=2)() == 2 and running.timed("decode", batch=3)() == 3
            for encodes in (True, False, True):
                assert running.timed("train_step", batch=2, encodes=encodes)() == 2
            sample = running.timed("sample", batch=2, cfg=1.5, top_k=900, top_p=0.96)
            assert sample() == 2 and sample.memory == {}
    finally:
        torch.set_num_threads(threads)


def test_it_trains_in_the_precision_asked_for(tmp_path: Path) -> None:
    checkout = write_checkout(tmp_path, threads=torch.get_num_threads(), precision="bf16")
    with public(checkout, "bf16") as running:
        assert running.timed("train_step", batch=2, encodes=True)() == 2


def test_the_last_line_that_it_printed_is_the_error_and_nothing_stays(tmp_path: Path) -> None:
    (write_checkout(tmp_path, threads=1) / "models/__init__.py").write_text("import a_package_that_nobody_has")
    running = public(tmp_path)
    with pytest.raises(ValueError, match="a_package_that_nobody_has.*requirements.txt"), running:
        pass
    assert running._process.returncode is not None and not Path(running._folder.name).exists()


def test_a_folder_without_the_public_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="models/var.py; give the folder of a clone"):
        public(tmp_path)


def test_it_is_there_only_where_it_is_asked_for() -> None:
    with public_code(CONFIG, make_var(CONFIG), make_tokenizer(CONFIG)) as found:
        assert found is None


def test_the_worker_imports_nothing_of_ours() -> None:
    tree = ast.parse(Path(public_worker.__file__).read_text())
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    others = {name for name in found if name.split(".")[0] not in sys.stdlib_module_names | {"torch"}}
    assert others == {"models", "utils.amp_sc"}  # the public code's own
    at_the_top = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not others & at_the_top  # the checkout is not on the path yet
