"""Code shards keep keys and order and refuse a foreign tokenizer."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from image_folders import encoded, make_folder, noise
from tiny import PACK_OPTIONS
from torch import Tensor
from workers import content, ended_well, fork, kill

from data_pipeline.files.hashing import hash_uniform
from data_pipeline.images import decoding
from data_pipeline.images.decoding import ImageTransform, image_of, label_of
from data_pipeline.images.tensors import floats_of, pixels_of
from data_pipeline.loading.datasets import CodeDataset
from data_pipeline.loading.plan import Stream
from data_pipeline.making import claims
from data_pipeline.making.encoding import Encoding, Recipe
from data_pipeline.making.indexing import index_shards
from data_pipeline.making.packing import pack_images
from data_pipeline.remote.cache import CacheConfig, ShardCache
from data_pipeline.shards.codes import CodeFormat
from data_pipeline.shards.index import VERSIONS, Index
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.writer import Sample, write_shards

PATCH_NUMS = (1, 2, 3)  # 14 tokens
VOCAB_SIZE = 256
SHA = "a" * 64
TRANSFORM = ImageTransform(image_size=4, resize_ratio=1.5)


def encode_pixels(images: Tensor) -> Tensor:
    """A tokenizer in name: the first 14 red values. (B, 3, 4, 4) -> (B, 14)"""
    assert images.dtype == torch.float32 and images.shape[1:] == (3, 4, 4) and len(images) <= 5
    return torch.round((images[:, 0].flatten(1)[:, :14] + 1) * 127.5).long()


def never_called(images: Tensor) -> Tensor:
    raise AssertionError("there was nothing to encode")


def noise_png(seed: int, side: int = 6) -> bytes:
    return encoded(noise(side, side, seed))


def pack_noise(folder: Path, num_images: int = 7) -> Index:
    samples = [Sample(f"{i:09d}", {"cls": str(i % 3).encode(), "png": noise_png(i)}) for i in range(num_images)]
    return write_shards(samples, folder, kind="images", meta={"classes": list("abc")}, samples_per_shard=3)


def recipe(views: int = 1, **changes: Any) -> Recipe:
    settings = {"transform": TRANSFORM, "views": views, "seed": 0, "patch_nums": PATCH_NUMS, "vocab_size": VOCAB_SIZE}
    return Recipe(**{**settings, "tokenizer_sha256": SHA, "batch_size": 5, **changes})


def encode(images: Path, out: Path, *, encode: Callable[[Tensor], Tensor] = encode_pixels, **changes: Any) -> Index:
    return Encoding(images, out, recipe(**changes), encode=encode, report=lambda line: None).finish()


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
        expected = encode_pixels(floats_of(pixels_of(TRANSFORM.center_crop(image_of(image))))[None])[0]
        np.testing.assert_array_equal(codes, expected)


def test_several_views_are_the_random_crops_of_seed_sample_and_view(tmp_path: Path) -> None:
    images = pack_noise(tmp_path / "images")
    index = encode(tmp_path / "images", tmp_path / "codes", views=3)
    record = ShardReader(tmp_path / "codes", index).read(4).members["vq12"]
    image = image_of(ShardReader(tmp_path / "images", images).read(4))
    for view in range(3):
        uniforms = hash_uniform(0, Stream.CROP, np.array([4]), np.array([view]), 3)[0]
        expected = encode_pixels(floats_of(pixels_of(TRANSFORM.random_crop(image, uniforms)))[None])[0]
        np.testing.assert_array_equal(CodeFormat(14, 3, 12).unpack_view(record, view)[1], expected)


def test_more_views_than_a_shard_has_room_for_are_refused_before_any_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_noise(tmp_path / "images")  # at most 3 a shard
    monkeypatch.setattr("data_pipeline.shards.members.MAX_TABLE_BYTES", 3 * (33 + 8 * 4))
    with pytest.raises(ValueError, match="views is 5, of shards with up to 3 images each; at most 2 images a shard"):
        encode(tmp_path / "images", tmp_path / "codes", views=5)
    assert not (tmp_path / "codes").exists()
    assert encode(tmp_path / "images", tmp_path / "codes", views=4).num_samples == 7


def test_work_under_way_of_another_version_of_the_format_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(crops: Tensor) -> Tensor:
        raise KeyboardInterrupt

    pack_noise(tmp_path / "images")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(VERSIONS, "codes", 2)
        encode(tmp_path / "images", tmp_path / "codes", encode=interrupt)
    with pytest.raises(ValueError, match="index_version 2, now it is 3"):
        encode(tmp_path / "images", tmp_path / "codes")


def test_more_views_than_fit_a_batch_are_encoded_in_parts(tmp_path: Path) -> None:
    pack_noise(tmp_path / "images")  # encode_pixels asserts that no batch is larger than 5
    assert encode(tmp_path / "images", tmp_path / "codes", views=12).num_samples == 7


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
    with pytest.raises(ValueError, match="sample 000000000: .*; pack .*, or index them with --decode true"):
        encode(tmp_path / "images", tmp_path / "codes")


def test_what_packing_takes_encoding_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a stripe, which would fill the memory if it were scaled whole."""
    monkeypatch.setattr(decoding, "MAX_PIXELS", 10_000)
    source = make_folder(tmp_path / "source", num_images=2)
    for split, shape in (("cat", (1, 1200)), ("dog", (1200, 1))):
        for number in range(2):
            (source / f"{split}/stripe{number}.png").write_bytes(encoded(noise(*shape, number)))
    packed = pack_images(str(source), tmp_path / "packed", **{**PACK_OPTIONS, "val_fraction": 0.5}).train
    assert packed.meta["skipped"] == 0
    assert encode(tmp_path / "packed/train", tmp_path / "codes", views=3).num_samples == packed.num_samples


def test_encoded_folders_are_not_overwritten(tmp_path: Path) -> None:
    pack_noise(tmp_path / "images")
    first = encode(tmp_path / "images", tmp_path / "codes")
    assert encode(tmp_path / "images", tmp_path / "codes", encode=never_called) == first  # there is nothing to do
    with pytest.raises(ValueError, match="holds codes with seed 0, now it is 1; delete it first"):
        encode(tmp_path / "images", tmp_path / "codes", seed=1)


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


def test_going_on_with_other_images_is_refused_by_name(tmp_path: Path) -> None:
    for name, number in (("a", 7), ("b", 8)):
        pack_noise(tmp_path / name, number)
    Encoding(tmp_path / "a", tmp_path / "codes", recipe(), encode=encode_pixels)
    with pytest.raises(ValueError, match="images_fingerprint .*, now it is"):
        encode(tmp_path / "b", tmp_path / "codes", encode=never_called)


def slow_pixels(images: Tensor) -> Tensor:
    time.sleep(0.01)
    return encode_pixels(images)


def test_killed_workers_and_several_at_once_make_the_same_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.02)
    pack_noise(tmp_path / "images", num_images=20)
    encode(tmp_path / "images", tmp_path / "undisturbed", views=2)
    work = partial(encode, tmp_path / "images", tmp_path / "codes", views=2, encode=slow_pixels)
    for milliseconds in (30, 70, 50, 90):
        child = fork(work)
        time.sleep(milliseconds / 1000)
        kill(child)
    children = [fork(work) for _ in range(2)]
    assert [ended_well(child) for child in children] == 2 * [True]
    assert content(tmp_path / "codes") == content(tmp_path / "undisturbed")


def test_images_indexed_in_place_keep_their_labels_and_the_keys_that_fit(tmp_path: Path) -> None:
    """Labels lie in json members under a name of their own, and keys may have slashes."""
    (tmp_path / "theirs").mkdir()
    with webdataset.TarWriter(str(tmp_path / "theirs/0.tar"), encoder=False) as writer:
        for number, key in enumerate(("cats/one", "two")):
            writer.write({"__key__": key, "json": f'{{"class_id": {number + 1}}}'.encode(), "png": noise_png(number)})
    settings = {"num_classes": 3, "json_label": "class_id", "decode": True, "cache": ShardCache(CacheConfig())}
    index_shards([str(tmp_path / "theirs")], tmp_path / "images", **settings, report=lambda line: None)
    index = encode(tmp_path / "images", tmp_path / "codes")
    codes = [ShardReader(tmp_path / "codes", index).read(number) for number in range(2)]
    assert [sample.key for sample in codes] == ["_000000000", "two"]
    assert [CodeFormat(14, 1, 12).unpack_view(sample.members["vq12"], 0)[0] for sample in codes] == [1, 2]
