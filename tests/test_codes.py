"""Code records are exact and small; code shards keep keys and order and refuse a foreign tokenizer."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch import Tensor

from data_pipeline.codes import CodeFormat
from data_pipeline.datasets import CodeDataset
from data_pipeline.encoding import write_codes
from data_pipeline.images import ImageTransform, image_of
from data_pipeline.index import Index
from data_pipeline.labels import label_of
from data_pipeline.plan import Stream, hash_uniform
from data_pipeline.reader import ShardReader
from data_pipeline.shards import Sample, write_shards

PATCH_NUMS = (1, 2, 3)  # 14 tokens
VOCAB_SIZE = 256
SHA = "a" * 64
TRANSFORM = ImageTransform(image_size=4, resize_ratio=1.5)


def encode_pixels(images: Tensor) -> Tensor:
    """A tokenizer in name: the first 14 red values. (B, 3, 4, 4) -> (B, 14)"""
    assert images.dtype == torch.float32 and images.shape[1:] == (3, 4, 4) and len(images) <= 5
    return torch.round((images[:, 0].flatten(1)[:, :14] + 1) * 127.5).long()


def noise_png(seed: int, side: int = 6) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def pack_noise(folder: Path, num_images: int = 7) -> Index:
    samples = [Sample(f"{i:09d}", {"cls": str(i % 3).encode(), "png": noise_png(i)}) for i in range(num_images)]
    return write_shards(samples, folder, kind="images", meta={"classes": list("abc")}, samples_per_shard=3)


def encode(images: Path, out: Path, *, views: int = 1, encode: Callable[[Tensor], Tensor] = encode_pixels) -> Index:
    return write_codes(
        images,
        out,
        encode=encode,
        transform=TRANSFORM,
        views=views,
        seed=0,
        patch_nums=PATCH_NUMS,
        vocab_size=VOCAB_SIZE,
        tokenizer_sha256=SHA,
        batch_size=5,
        report=lambda line: None,
    )


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
        assert label == 65535 and unpacked.dtype == np.int64
        np.testing.assert_array_equal(unpacked, codes[view])


def test_batches_unpack_like_single_records() -> None:
    code_format = CodeFormat(num_tokens=5, views=3, bits=12)
    codes = np.random.default_rng(0).integers(0, 4096, (4, 3, 5))
    records = [code_format.pack(label, rows) for label, rows in enumerate(codes)]
    labels, unpacked = code_format.unpack_views(records, np.array([2, 0, 1, 2]))
    assert labels.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(unpacked, codes[np.arange(4), [2, 0, 1, 2]])


def test_the_bytes_are_as_documented() -> None:
    record = CodeFormat(num_tokens=3, views=1, bits=12).pack(0x0201, np.array([[0xABC, 0x123, 0xFED]]))
    assert record == bytes([0x01, 0x02, 0xBC, 0x3A, 0x12, 0xED, 0x0F])
    assert CodeFormat(num_tokens=1, views=1, bits=16).pack(1, np.array([[0xABCD]])) == bytes([1, 0, 0xCD, 0xAB])


def test_680_codes_of_the_papers_vocabulary_take_1022_bytes() -> None:
    code_format = CodeFormat.for_vocab(680, 4096, views=1)
    assert code_format.record_bytes == 1022 and code_format.suffix == "vq12"
    assert CodeFormat.for_vocab(680, 4097, views=1).suffix == "vq16"
    assert CodeFormat.for_vocab(680, 4096, views=16).record_bytes == 2 + 16 * 1020


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


def test_one_view_is_the_centre_crop_of_each_image_in_order(tmp_path: Path) -> None:
    images = pack_noise(tmp_path / "images")
    index = encode(tmp_path / "images", tmp_path / "codes")
    assert [shard.samples for shard in index.shards] == [shard.samples for shard in images.shards]
    assert index.meta["images_fingerprint"] == images.fingerprint and index.meta["classes"] == ["a", "b", "c"]
    reader, code_reader = ShardReader(tmp_path / "images", images), ShardReader(tmp_path / "codes", index)
    for sample_id in range(7):
        image, code = reader.read(sample_id), code_reader.read(sample_id)
        label, codes = CodeFormat(14, 1, 12).unpack_view(code.members["vq12"], 0)
        assert code.key == image.key and label == label_of(image)
        expected = encode_pixels(TRANSFORM.center_view(image_of(image))[None])[0]
        np.testing.assert_array_equal(codes, expected)


def test_several_views_are_the_random_crops_of_seed_sample_and_view(tmp_path: Path) -> None:
    images = pack_noise(tmp_path / "images")
    index = encode(tmp_path / "images", tmp_path / "codes", views=3)
    record = ShardReader(tmp_path / "codes", index).read(4).members["vq12"]
    image = image_of(ShardReader(tmp_path / "images", images).read(4))
    for view in range(3):
        uniforms = hash_uniform(0, Stream.CROP, np.array([4]), np.array([view]), 3)[0]
        expected = encode_pixels(TRANSFORM.random_view(image, uniforms)[None])[0]
        np.testing.assert_array_equal(CodeFormat(14, 3, 12).unpack_view(record, view)[1], expected)


def test_more_views_than_fit_a_batch_are_encoded_in_parts(tmp_path: Path) -> None:
    pack_noise(tmp_path / "images")  # encode_pixels asserts that no batch is larger than 5
    assert encode(tmp_path / "images", tmp_path / "codes", views=12).num_samples == 7


def test_encoding_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    pack_noise(tmp_path / "images")
    first, second = (encode(tmp_path / "images", tmp_path / out, views=2) for out in ("a", "b"))
    assert first.fingerprint == second.fingerprint


def test_webdataset_reads_code_shards(tmp_path: Path) -> None:
    pack_noise(tmp_path / "images")
    index = encode(tmp_path / "images", tmp_path / "codes")
    urls = [str(tmp_path / "codes" / shard.name) for shard in index.shards]
    stored = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [len(sample["vq12"]) for sample in stored] == [2 + 21] * 7


@pytest.mark.parametrize(
    "tokenizer, reason",
    [
        (lambda images: torch.zeros(len(images), 13), r"shape \(3, 13\), expected \(3, 14\)"),
        (lambda images: torch.full((len(images), 14), 256), "codes 256 .. 256, vocab_size 256"),
        (lambda images: torch.full((len(images), 14), -1), "codes -1 .. -1, vocab_size 256"),
    ],
    ids=["wrong length", "too large", "negative"],
)
def test_a_tokenizer_of_another_shape_is_refused(tmp_path: Path, tokenizer: Callable, reason: str) -> None:
    pack_noise(tmp_path / "images")
    with pytest.raises(ValueError, match=reason):
        encode(tmp_path / "images", tmp_path / "codes", encode=tokenizer)
    assert not (tmp_path / "codes/index.json").exists()


def test_a_damaged_image_stops_the_encoding_and_is_named(tmp_path: Path) -> None:
    samples = [Sample("000000000", {"cls": b"0", "png": noise_png(0, side=60)[:999]})]
    write_shards(samples, tmp_path / "images", kind="images", meta={"classes": ["a"]}, samples_per_shard=3)
    with pytest.raises(ValueError, match="shard-000000.tar: sample 000000000: "):
        encode(tmp_path / "images", tmp_path / "codes")


def test_encoded_folders_are_not_overwritten(tmp_path: Path) -> None:
    pack_noise(tmp_path / "images")
    encode(tmp_path / "images", tmp_path / "codes")
    with pytest.raises(ValueError, match="already packed"):
        encode(tmp_path / "images", tmp_path / "codes")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"patch_nums": (1, 2, 4)}, r"made with patch_nums \[1, 2, 3\], this run uses \[1, 2, 4\]"),
        ({"vocab_size": 512}, "made with vocab_size 256, this run uses 512"),
        ({"tokenizer_sha256": "b" * 64}, f"made with tokenizer_sha256 {SHA}, this run uses {'b' * 64}"),
    ],
)
def test_codes_of_another_tokenizer_are_refused(tmp_path: Path, change: dict, reason: str) -> None:
    pack_noise(tmp_path / "images")
    encode(tmp_path / "images", tmp_path / "codes")
    wanted = {"patch_nums": PATCH_NUMS, "vocab_size": VOCAB_SIZE, "tokenizer_sha256": SHA}
    assert len(CodeDataset(tmp_path / "codes", **wanted)) == 7
    assert len(CodeDataset(tmp_path / "codes", **{**wanted, "tokenizer_sha256": None})) == 7
    with pytest.raises(ValueError, match=f"{reason}; re-run launchers/encode_codes.py or change the config"):
        CodeDataset(tmp_path / "codes", **{**wanted, **change})
