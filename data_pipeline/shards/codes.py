"""Codes on disk: the record of one image.

A record has a number of views of equal size. Each is the label (2 bytes) and the codes of another crop of the image;
the label is repeated so that a view is read in one piece, without the others. Everything is little endian. Codes of 12
bits are packed two to three bytes, low nibble first; an odd last code is followed by four zero bits, so that every view
starts on a byte. 680 codes of 12 bits give 2 + 1020 = 1022 bytes: with its tar header a sample of one view takes
exactly 1536. Unpacked codes have the narrowest type that holds them, int16 or int32, so that less is copied.

Legend: B batch, K views, L codes of one image (num_tokens).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.shards.records import RecordKind

LABEL_BYTES = 2


@dataclass(frozen=True)
class CodeFormat:
    """The layout of one image's codes in bytes. bits: 12 or 16 per code."""

    num_tokens: int
    views: int
    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (12, 16):
            raise ValueError(f"bits is {self.bits}, expected 12 or 16")
        for field in ("num_tokens", "views"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, expected at least 1")

    @classmethod
    def for_vocab(cls, num_tokens: int, vocab_size: int, views: int) -> CodeFormat:
        """Choose the smallest format that holds codes 0 .. vocab_size - 1."""
        if not 1 <= vocab_size <= 2**16:
            raise ValueError(f"vocab_size is {vocab_size}, expected 1 .. {2**16}, what 16 bits can hold")
        return cls(num_tokens, views, 12 if vocab_size <= 2**12 else 16)

    @property
    def suffix(self) -> str:
        """The suffix of the member that holds a record."""
        return f"vq{self.bits}"

    @property
    def view_bytes(self) -> int:
        """The bytes of one view: its label and its codes."""
        return LABEL_BYTES + (self.num_tokens * self.bits + 7) // 8

    @property
    def record_bytes(self) -> int:
        """The bytes of a record: all its views."""
        return self.views * self.view_bytes

    def pack(self, label: int, codes: np.ndarray) -> bytes:
        """Pack one record. codes: (K, L) integers. Raises ValueError for another shape or a value that does not fit."""
        if codes.shape != (self.views, self.num_tokens):
            raise ValueError(f"codes have shape {codes.shape}, expected (views, tokens) {self.views, self.num_tokens}")
        if codes.min() < 0 or codes.max() >= 2**self.bits:
            raise ValueError(f"codes are {codes.min()} .. {codes.max()}, expected 0 .. {2**self.bits - 1}")
        if not 0 <= label < 2**16:
            raise ValueError(f"label is {label}, expected 0 .. {2**16 - 1}")
        pack_codes = _pack_12 if self.bits == 12 else _pack_16
        rows = np.empty((self.views, self.view_bytes), dtype=np.uint8)
        rows[:, :LABEL_BYTES] = label & 0xFF, label >> 8
        rows[:, LABEL_BYTES:] = pack_codes(codes)[:, : self.view_bytes - LABEL_BYTES]
        return rows.tobytes()

    @property
    def kind(self) -> RecordKind:
        """The record as a reader sees it: it takes one view at a time."""
        return RecordKind(self.suffix, self.record_bytes, parts=self.views)

    def unpack_view(self, record: bytes, view: int) -> tuple[int, np.ndarray]:
        """Unpack label and codes (L,) of one view. Raises ValueError as `unpack` does, and for another length."""
        if len(record) != self.record_bytes:
            raise ValueError(f"record of {len(record)} bytes, expected {self.record_bytes}; encode the data again")
        row = np.frombuffer(record, dtype=np.uint8).reshape(self.views, -1)[view]
        labels, codes = self.unpack(row[None])
        return int(labels[0]), codes[0]

    def unpack(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Unpack labels (B,) int64 and codes (B, L), int16 if they have 12 bits and int32 if they have 16.

        rows: (B, view_bytes) uint8, contiguous, one view of each record.
        Raises ValueError for bits that no writer sets.
        """
        labels = rows[:, :LABEL_BYTES].copy().view("<u2")[:, 0].astype(np.int64)
        if self.bits == 12:
            return labels, _unpack_12(rows, self.num_tokens)
        return labels, rows[:, LABEL_BYTES:].copy().view("<u2").astype(np.int32)


def _pack_16(codes: np.ndarray) -> np.ndarray:
    return codes.astype("<u2").view(np.uint8)  # (K, L) -> (K, 2 L)


def _pack_12(codes: np.ndarray) -> np.ndarray:
    """Pack (K, L) to (K, 3 ceil(L / 2)) bytes: a pair (a, b) gives a[0:8], a[8:12] + 16 b[0:4], b[4:12]."""
    pairs = np.pad(codes.astype(np.uint16), ((0, 0), (0, codes.shape[1] % 2)))
    a, b = pairs[:, 0::2], pairs[:, 1::2]
    triples = np.stack([a & 0xFF, (a >> 8) | ((b & 0xF) << 4), b >> 4], axis=-1)
    return triples.astype(np.uint8).reshape(len(codes), -1)


def _unpack_12(rows: np.ndarray, num_tokens: int) -> np.ndarray:
    """Undo _pack_12, behind a label. rows: (B, 2 + ceil(3 L / 2)) -> (B, L) int16."""
    batch, width = rows.shape
    # A pair's three bytes are read as the upper part of a 32-bit number that begins a byte earlier, and both codes are
    # put in place at once: a few passes over narrow numbers are most of what unpacking may cost.
    words = np.ndarray((batch, num_tokens // 2), "<u4", rows, offset=LABEL_BYTES - 1, strides=(width, 3))
    first = words.astype(np.uint32)  # from here on aligned
    second = first >> np.uint32(4)
    second &= np.uint32(0x0FFF0000)
    first >>= np.uint32(8)
    first &= np.uint32(0xFFF)
    first |= second
    codes = first.astype("<u4", copy=False).view("<i2")
    if num_tokens % 2 == 0:
        return codes
    last = rows[:, -2:].copy().view("<u2")
    if (last >> 12).any():
        raise ValueError("code record with padding bits that are not zero; encode the data again")
    return np.concatenate([codes, last.astype(np.int16)], axis=1)
