"""torch's files are parsed, never unpickled: tensors come out as torch itself reads them, nonsense as ValueError."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed_weights import WEIGHTS, archive, claiming, program, torch_file
from torch import nn

from training.checkpoints.torch_files import TorchFile
from training.checkpoints.weights import read_weights

INSTRUCTIONS = [
    *(b"}", b"]", b")", b"(", b"N", b"K\x01", b"q\x00", b"h\x00", b"X\x01\x00\x00\x00a", b"\x85", b"\x86", b"\x87"),
    *(b"t", b"s", b"u", b"a", b"e", b"R", b"b", b"Q", b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n"),
]


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    ],
)
def test_every_kind_and_layout_of_tensor_comes_as_torch_itself_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    base = (torch.arange(24) % 7).to(dtype).reshape(2, 3, 4)
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    state = module.state_dict() | {
        "plain": base,
        "turned": base.transpose(0, 2),
        "part": base[:, 1:, ::2],
        "again": base,
        "scalar": base[0, 0, 1],
        "empty": base[:0],
        "none": torch.zeros(0),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    torch.save(state, tmp_path / "a.pth")
    read, expected = read_weights(tmp_path / "a.pth"), torch.load(tmp_path / "a.pth", weights_only=True)
    assert read.keys() == expected.keys()
    for name, value in expected.items():
        assert read[name].dtype == value.dtype and torch.equal(read[name], value), name


def test_flipped_bytes_give_another_number_or_one_line(tmp_path: Path) -> None:
    path = torch_file(tmp_path, WEIGHTS)
    good = path.read_bytes()
    for place in range(0, len(good), 3):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        try:
            read_weights(path)
        except (ValueError, FileNotFoundError) as error:
            assert "\n" not in str(error)


def opened(folder: Path, body: bytes) -> TorchFile:
    path = folder / "a.pth"
    path.write_bytes(archive(program(body))())
    return TorchFile.open(path)


def test_plain_values_come_out_of_a_pickle(tmp_path: Path) -> None:
    content = {"a": [1, -2, 2**40, 0.5, None, True, False, (), (1,), (1, 2, 3, 4), "é"], 7: {}, "b": {"c": [[]]}}
    assert TorchFile.open(torch_file(tmp_path, content)).content == content


def test_the_same_object_twice_is_the_same_again(tmp_path: Path) -> None:
    inner = [1]
    found = TorchFile.open(torch_file(tmp_path, {"a": inner, "b": inner})).content
    assert found["a"] is found["b"]


@pytest.mark.parametrize(
    "numel, size, stride, offset",
    [
        *[(6, (6,), (2,), 0), (6, (3, 3), (3, 1), 0), (6, (2, 2, 2), (0, 1, 1), 0), (6, (1,) * 20, (1,) * 20, 0)],
        *[(6, (2,), (1, 1), 0), (6, (2**62, 4), (1, 1), 0), (6, (6,), (-1,), 5), (7, (6,), (1,), 0)],
        (6, (6,), (1,), 1),
    ],
)
def test_a_tensor_that_is_not_all_in_its_own_bytes_is_refused(
    tmp_path: Path, numel: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> None:
    file = opened(tmp_path, claiming(numel, size, stride, offset))
    with pytest.raises(ValueError, match="claims"):
        file.tensor(file.content["huge"])


def test_one_that_is_comes_out(tmp_path: Path) -> None:
    file = opened(tmp_path, claiming(6, (2, 2), (3, 1), 1))
    assert torch.equal(file.tensor(file.content["huge"]), torch.zeros(2, 2))


@settings(max_examples=300, deadline=None)
@given(body=st.lists(st.sampled_from(INSTRUCTIONS), max_size=12).map(b"".join) | st.binary(max_size=30))
def test_any_pickle_gives_plain_values_or_value_error(tmp_path_factory: pytest.TempPathFactory, body: bytes) -> None:
    try:
        opened(tmp_path_factory.getbasetemp(), body)
    except ValueError as error:
        assert "\n" not in str(error)
