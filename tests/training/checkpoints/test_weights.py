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
from malformed_weights import BOMBS, EXPLOITS, REFUSED, WEIGHTS
from peak_memory import BOUND, peak_memory
from safetensors.torch import save_file
from torch import nn

from training.checkpoints.weights import read_weights
from training.engine.unpickling import forbid_unpickling


def same(read: dict[str, torch.Tensor]) -> bool:
    return read.keys() == WEIGHTS.keys() and all(torch.equal(read[name], value) for name, value in WEIGHTS.items())


def test_weights_are_read_from_torchs_format(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "a.pth")
    assert same(read_weights(tmp_path / "a.pth"))


def test_weights_that_were_read_can_be_changed_and_the_file_stays(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "a.pth")
    read_weights(tmp_path / "a.pth")["weight"].zero_()
    assert same(read_weights(tmp_path / "a.pth"))


def test_reading_costs_no_memory_until_a_tensor_is_used(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(25 * 2**20)}, tmp_path / "a.pth")  # 100 MiB
    assert peak_memory(lambda: read_weights(tmp_path / "a.pth")) < 10 * 2**20


def test_weights_are_read_from_safetensors(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    assert same(read_weights(tmp_path / "a.safetensors"))


def test_the_model_asked_for_is_taken_from_the_public_trainers_checkpoint(tmp_path: Path) -> None:
    other = {"other": torch.zeros(1)}
    content = {"epoch": 3, "trainer": {"config": {"a": 1}, "var_wo_ddp": WEIGHTS, "vae_local": other}, "args": {}}
    torch.save(content, tmp_path / "ar-ckpt-best.pth")
    assert same(read_weights(tmp_path / "ar-ckpt-best.pth", "VAR"))
    assert read_weights(tmp_path / "ar-ckpt-best.pth", "VQVAE").keys() == {"other"}
    with pytest.raises(ValueError, match="trainer's checkpoint with config, var_wo_ddp, vae_local"):
        read_weights(tmp_path / "ar-ckpt-best.pth")


@pytest.mark.parametrize(
    "content, message",
    [
        ([WEIGHTS], "holds a list, expected a dict"),
        ({}, "holds a dict, expected a dict of names"),
        ({"model": WEIGHTS}, "entry 'model' is a dict, not a tensor"),
        (WEIGHTS | {"step": 3}, "entry 'step' is a int, not a tensor"),
        ({0: torch.zeros(1)}, "entry '0' is a Tensor"),
        ({"trainer": {"var_opt": {}}}, "it has no var_wo_ddp to take"),
        (nn.Linear(1, 1), "it holds a pickled torch.nn.modules.linear.Linear, which could run code"),
    ],
)
def test_what_is_no_flat_dict_of_tensors_is_refused_in_one_line(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"a.pth: .*{message}") as caught:
        read_weights(tmp_path / "a.pth", "VAR")
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
    start = time.monotonic()
    assert peak_memory(lambda: said.append(refusal(path))) < BOUND
    assert time.monotonic() - start < 5 and reason in said[0]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-40], lambda b: b"<html></html>", lambda b: b[50:]])
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, suffix: str, damage: Any) -> None:
    file = tmp_path / f"a{suffix}"
    save_file(WEIGHTS, file) if suffix == ".safetensors" else torch.save(WEIGHTS, file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=f"a{suffix}: ") as caught:
        read_weights(file)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/a.pth: no such file"):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize("make, problem", [(Path.mkdir, "is a folder"), (os.mkfifo, "is no regular file")])
def test_what_is_no_file_is_said(tmp_path: Path, make: Any, problem: str) -> None:
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
