"""Files of weights from elsewhere are read without trust: plain tensors come out, or one line says why not."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed_weights import BOMBS, EXPLOITS, REFUSED, WEIGHTS, archive, edited, program, torch_file
from peak_memory import BOUND, peak_memory
from safetensors.torch import save_file
from torch import nn

from training.checkpoints.weights import read_weights
from training.engine.unpickling import forbid_unpickling

INSTRUCTIONS = [
    *(b"}", b"]", b")", b"(", b"N", b"K\x01", b"q\x00", b"h\x00", b"X\x01\x00\x00\x00a", b"\x85", b"\x86", b"\x87"),
    *(b"t", b"s", b"u", b"a", b"e", b"R", b"b", b"Q", b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n"),
]


def same(read: dict[str, torch.Tensor]) -> bool:
    return read.keys() == WEIGHTS.keys() and all(torch.equal(read[name], value) for name, value in WEIGHTS.items())


DTYPES = ("float64", "float32", "float16", "bfloat16", "bool", "int64", "int32", "int16", "int8", "uint8")


@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in DTYPES])
def test_every_kind_and_layout_of_tensor_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    base = (torch.arange(24) % 7).to(dtype).reshape(2, 3, 4)
    state = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).state_dict() | {
        "plain": base,
        "turned": base.transpose(0, 2),
        "part": base[:, 1:, ::2],
        "again": base,
        "scalar": base[0, 0, 1],
        "empty": base[:0],
        "none": torch.zeros(0),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    read = read_weights(torch_file(tmp_path, state))
    assert read.keys() == state.keys()
    for name, value in state.items():
        assert read[name].dtype == value.dtype and torch.equal(read[name], value), name
        assert not read[name].requires_grad


def write_safetensors(folder: Path) -> Path:
    save_file(WEIGHTS, folder / "a.safetensors")
    return folder / "a.safetensors"


@pytest.mark.parametrize(
    "make", [lambda folder: torch_file(folder, WEIGHTS), edited(lambda data: data + b"more"), write_safetensors]
)
def test_weights_that_were_read_can_be_changed_and_the_file_stays(tmp_path: Path, make: Any) -> None:
    """What is appended to a torch file is ignored."""
    path = make(tmp_path)
    read_weights(path)["weight"].zero_()
    assert same(read_weights(path))


def test_reading_costs_no_memory_until_a_tensor_is_used(tmp_path: Path) -> None:
    path = torch_file(tmp_path, {"weight": torch.zeros(25 * 2**20)})  # 100 MiB
    assert peak_memory(lambda: read_weights(path)) < 10 * 2**20


def test_the_model_asked_for_is_taken_from_the_public_trainers_checkpoint(tmp_path: Path) -> None:
    other = {"other": torch.zeros(1)}
    trainer = {"config": {"a": 1}, "var_wo_ddp": WEIGHTS, "vae_local": other}
    path = torch_file(tmp_path, {"epoch": 3, "trainer": trainer, "args": {"tag": None, "lr": 1e-4, "pn": (1, 2)}})
    assert same(read_weights(path, "VAR"))
    assert read_weights(path, "VQVAE").keys() == {"other"}
    with pytest.raises(ValueError, match="trainer's checkpoint with config, var_wo_ddp, vae_local"):
        read_weights(path)


def prefixed(*prefixes: str) -> dict[str, torch.Tensor]:
    return {"".join(prefixes) + name: value for name, value in WEIGHTS.items()}


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": WEIGHTS, "epoch": 3},
        {"model": WEIGHTS},
        prefixed("module."),
        prefixed("_orig_mod."),
        {"model": prefixed("module.", "_orig_mod."), "optimizer": {"state": {0: {}}}},
        {"state_dict": prefixed("_orig_mod.", "module.")},
    ],
)
def test_weights_are_taken_as_people_have_them(tmp_path: Path, content: Any) -> None:
    assert same(read_weights(torch_file(tmp_path, content)))


def test_one_of_several_models_is_taken_by_its_name(tmp_path: Path) -> None:
    path = torch_file(tmp_path, {"model": {"other": torch.zeros(1)}, "ema": prefixed("module.")})
    assert same(read_weights(path, entry="ema"))
    with pytest.raises(ValueError, match="has no entry 'average'; it holds model, ema"):
        read_weights(path, entry="average")


@pytest.mark.parametrize(
    "content, message",
    [
        ([WEIGHTS], "holds a list, expected a dict"),
        ({}, "holds a dict, expected a dict of names"),
        (
            {"model": WEIGHTS, "ema": WEIGHTS},
            "holds several models: model, ema; choose one with import_weights.py --entry",
        ),
        ({"model": {"deep": WEIGHTS}}, "entry 'model' is a dict, not a tensor"),
        (WEIGHTS | {"step": 3}, "entry 'step' is a int, not a tensor"),
        ({0: torch.zeros(1)}, "has a key that is a int"),
        ({"trainer": {"var_opt": {}}}, "it has no var_wo_ddp to take"),
        (nn.Linear(1, 1), "it holds a pickled torch.nn.modules.linear.Linear, which is no part"),
        ({"sparse": torch.eye(2).to_sparse()}, "a pickled torch._utils._rebuild_sparse_tensor"),
    ],
)
def test_what_is_no_flat_dict_of_tensors_is_refused_in_one_line(tmp_path: Path, content: Any, message: str) -> None:
    path = torch_file(tmp_path, content)
    with pytest.raises(ValueError, match=f"a.pth: .*{message}") as caught:
        read_weights(path, "VAR")
    assert "\n" not in str(caught.value)


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read_weights(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 700
    return message


@pytest.mark.parametrize("name", REFUSED)
def test_a_malformed_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    make, reason = REFUSED[name]
    assert reason in refusal(make(tmp_path))


@pytest.mark.parametrize("name", EXPLOITS)
def test_no_payload_is_executed(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, reason = EXPLOITS[name]
    path = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    assert reason in refusal(path)
    assert sorted(tmp_path.iterdir()) == before  # no canary


@pytest.mark.parametrize("name", BOMBS)
def test_no_bomb_fills_the_memory(tmp_path: Path, name: str) -> None:
    make, reason = BOMBS[name]
    path, said = make(tmp_path), []
    start = time.process_time()
    assert peak_memory(lambda: said.append(refusal(path))) < BOUND
    assert time.process_time() - start < 10 and reason in said[0]


def test_flipped_bytes_give_another_number_or_one_line(tmp_path: Path) -> None:
    path = torch_file(tmp_path, WEIGHTS)
    good = path.read_bytes()
    for place in range(0, len(good), 3):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        try:
            read_weights(path)
        except ValueError as error:
            assert "\n" not in str(error)


@settings(max_examples=300, deadline=None)
@given(body=st.lists(st.sampled_from(INSTRUCTIONS), max_size=12).map(b"".join) | st.binary(max_size=30))
def test_any_pickle_gives_tensors_or_value_error(tmp_path_factory: pytest.TempPathFactory, body: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "a.pth"
    path.write_bytes(archive(program(body))())
    try:
        read_weights(path)
    except ValueError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "make, problem",
    [(lambda path: None, "no such file"), (Path.mkdir, "is a folder"), (os.mkfifo, "is no regular file")],
)
def test_what_is_no_file_is_named(tmp_path: Path, make: Any, problem: str) -> None:
    make(tmp_path / "a.pth")
    with pytest.raises(FileNotFoundError, match=f"a.pth: {problem}"):
        read_weights(tmp_path / "a.pth")


def test_no_library_unpickles_once_it_is_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    monkeypatch.chdir(tmp_path)
    path = EXPLOITS["os.system"][0](tmp_path)
    forbid_unpickling()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=False)
    child = multiprocessing.get_context("fork").Process(target=torch.load, args=(path,), kwargs={"weights_only": False})
    child.start()
    child.join()
    assert child.exitcode == 1 and list(tmp_path.iterdir()) == [path]
