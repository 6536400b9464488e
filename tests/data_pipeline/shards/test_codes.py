"""Code records are exact and small."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.shards.codes import CodeFormat


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 14, 679, 680])
@pytest.mark.parametrize("views", [1, 2, 5])
def test_unpacking_undoes_packing(bits: int, num_tokens: int, views: int) -> None:
    code_format = CodeFormat(num_tokens, views, bits)
    codes = np.random.default_rng(0).integers(0, 2**bits, (views, num_tokens))
    codes[0, 0], codes[-1, -1] = 2**bits - 1, 2**bits - 1
    record = code_format.pack(65535, codes)
    assert len(record) == code_format.record_bytes
    for view in range(views):
        label, unpacked = code_format.unpack_view(record, view)
        assert label == 65535 and unpacked.dtype == (np.int16 if bits == 12 else np.int32)
        np.testing.assert_array_equal(unpacked, codes[view])


def test_batches_unpack_like_single_records() -> None:
    code_format = CodeFormat(num_tokens=5, views=3, bits=12)
    codes = np.random.default_rng(0).integers(0, 4096, (4, 3, 5))
    records = [code_format.pack(label, rows) for label, rows in enumerate(codes)]
    views = np.array([2, 0, 1, 2])
    size = code_format.kind.part_bytes
    assert size == code_format.view_bytes and code_format.kind.parts == 3
    rows = [record[view * size : (view + 1) * size] for record, view in zip(records, views.tolist())]
    labels, unpacked = code_format.unpack(np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(4, -1))
    assert labels.tolist() == [0, 1, 2, 3] and labels.dtype == np.int64
    np.testing.assert_array_equal(unpacked, codes[np.arange(4), views])


def test_the_bytes_are_as_documented() -> None:
    record = CodeFormat(num_tokens=3, views=1, bits=12).pack(0x0201, np.array([[0xABC, 0x123, 0xFED]]))
    assert record == bytes([0x01, 0x02, 0xBC, 0x3A, 0x12, 0xED, 0x0F])
    two_views = CodeFormat(num_tokens=1, views=2, bits=12).pack(7, np.array([[0xABC], [1]]))
    assert two_views == bytes([7, 0, 0xBC, 0x0A, 7, 0, 1, 0])
    assert CodeFormat(num_tokens=1, views=1, bits=16).pack(1, np.array([[0xABCD]])) == bytes([1, 0, 0xCD, 0xAB])


def test_680_codes_of_the_papers_vocabulary_take_1022_bytes() -> None:
    code_format = CodeFormat.for_vocab(680, 4096, views=1)
    assert code_format.record_bytes == 1022 and code_format.suffix == "vq12"
    assert CodeFormat.for_vocab(680, 4097, views=1).suffix == "vq16"
    assert CodeFormat.for_vocab(680, 4096, views=16).record_bytes == 16 * 1022


@pytest.mark.parametrize(
    "label, codes, reason",
    [
        (0, np.zeros((1, 3)), "shape"),
        (0, np.full((1, 4), 4096), "expected 0 .. 4095"),
        (0, np.full((1, 4), -1), "expected 0 .. 4095"),
        (-1, np.zeros((1, 4), dtype=int), "label is -1"),
        (65536, np.zeros((1, 4), dtype=int), "label is 65536"),
    ],
)
def test_values_that_do_not_fit_are_refused(label: int, codes: np.ndarray, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        CodeFormat(num_tokens=4, views=1, bits=12).pack(label, codes)


@pytest.mark.parametrize("record", [b"", bytes(7), bytes(9)])
def test_records_of_the_wrong_length_are_refused(record: bytes) -> None:
    with pytest.raises(ValueError, match="expected 8; encode the data again"):
        CodeFormat(num_tokens=4, views=1, bits=12).unpack_view(record, 0)


def test_padding_bits_that_are_set_are_refused() -> None:
    record = CodeFormat(num_tokens=3, views=1, bits=12).pack(0, np.zeros((1, 3), dtype=int))
    with pytest.raises(ValueError, match="padding bits"):
        CodeFormat(num_tokens=3, views=1, bits=12).unpack_view(record[:-1] + b"\x10", 0)


@pytest.mark.parametrize("num_tokens, views, bits", [(0, 1, 12), (1, 0, 12), (1, 1, 8)])
def test_impossible_formats_are_refused(num_tokens: int, views: int, bits: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        CodeFormat(num_tokens, views, bits)


def test_a_vocabulary_beyond_16_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size is 65537"):
        CodeFormat.for_vocab(4, 65537, views=1)
