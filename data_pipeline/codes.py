"""Codes on disk: the record of one image.

A record is the label (2 bytes) and `views` sets of codes, each made from another crop of the image. Everything is
little endian. Codes of 12 bits are packed two to three bytes, low nibble first; an odd last code is followed by four
zero bits, so that every view starts on a byte. 680 codes of 12 bits give 2 + 1020 = 1022 bytes: with its tar header a
sample takes exactly 1536.
Legend: B batch, K views, L codes of one image (num_tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LABEL_BYTES = 2


@dataclass(frozen=True)
class CodeFormat:
    """How the codes of one image are laid out in bytes. bits: 12 or 16 per code."""

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
        """The smallest format that holds codes 0 .. vocab_size - 1."""
        if not 1 <= vocab_size <= 2**16:
            raise ValueError(f"vocab_size is {vocab_size}, expected 1 .. {2**16}, what 16 bits can hold")
        return cls(num_tokens, views, 12 if vocab_size <= 2**12 else 16)

    @property
    def suffix(self) -> str:
        return f"vq{self.bits}"

    @property
    def view_bytes(self) -> int:
        return (self.num_tokens * self.bits + 7) // 8

    @property
    def record_bytes(self) -> int:
        return LABEL_BYTES + self.views * self.view_bytes

    def pack(self, label: int, codes: np.ndarray) -> bytes:
        """One record. codes: (K, L) integers. Raises ValueError for another shape or a value that does not fit."""
        if codes.shape != (self.views, self.num_tokens):
            raise ValueError(f"codes have shape {codes.shape}, expected (views, tokens) {self.views, self.num_tokens}")
        if codes.min() < 0 or codes.max() >= 2**self.bits:
            raise ValueError(f"codes are {codes.min()} .. {codes.max()}, expected 0 .. {2**self.bits - 1}")
        if not 0 <= label < 2**16:
            raise ValueError(f"label is {label}, expected 0 .. {2**16 - 1}")
        pack_codes = _pack_12 if self.bits == 12 else _pack_16
        return int(label).to_bytes(LABEL_BYTES, "little") + pack_codes(codes)[:, : self.view_bytes].tobytes()

    def unpack_view(self, record: bytes, view: int) -> tuple[int, np.ndarray]:
        """Label and codes (L,) int64 of one view. Raises ValueError for a record of the wrong length."""
        labels, codes = self.unpack_views([record], np.array([view]))
        return int(labels[0]), codes[0]

    def unpack_views(self, records: Sequence[bytes], views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels (B,) and codes (B, L), int64, of one view of each of B records. views: (B,) integers.

        Raises ValueError for a record of the wrong length, or bits that no writer sets.
        """
        assert views.min() >= 0 and views.max() < self.views, f"views {views} of {self.views}"
        for record in records:
            if len(record) != self.record_bytes:
                raise ValueError(f"record of {len(record)} bytes, expected {self.record_bytes}; encode the data again")
        table = np.frombuffer(b"".join(records), dtype=np.uint8).reshape(len(records), self.record_bytes)
        columns = LABEL_BYTES + views[:, None] * self.view_bytes + np.arange(self.view_bytes)
        unpack_codes = _unpack_12 if self.bits == 12 else _unpack_16
        codes = unpack_codes(np.take_along_axis(table, columns, axis=1))
        if codes[:, self.num_tokens :].any():
            raise ValueError("code record with padding bits that are not zero; encode the data again")
        return _unpack_16(table[:, :LABEL_BYTES])[:, 0], codes[:, : self.num_tokens]


def _pack_16(codes: np.ndarray) -> np.ndarray:
    return codes.astype("<u2").view(np.uint8)  # (K, L) -> (K, 2 L)


def _unpack_16(packed: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(packed).view("<u2").astype(np.int64)  # (B, 2 L) -> (B, L)


def _pack_12(codes: np.ndarray) -> np.ndarray:
    """(K, L) -> (K, 3 ceil(L / 2)) bytes: from a pair (a, b) the bytes a[0:8], a[8:12] + 16 b[0:4], b[4:12]."""
    pairs = np.pad(codes.astype(np.uint16), ((0, 0), (0, codes.shape[1] % 2)))
    a, b = pairs[:, 0::2], pairs[:, 1::2]
    triples = np.stack([a & 0xFF, (a >> 8) | ((b & 0xF) << 4), b >> 4], axis=-1)
    return triples.astype(np.uint8).reshape(len(codes), -1)


def _unpack_12(packed: np.ndarray) -> np.ndarray:
    """The inverse of _pack_12, also without the last byte of an odd last pair. -> (B, 2 ceil(L / 2))"""
    padded = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 3))).astype(np.int64)
    x, y, z = padded[:, 0::3], padded[:, 1::3], padded[:, 2::3]
    return np.stack([x | ((y & 0xF) << 8), (y >> 4) | (z << 4)], axis=-1).reshape(len(packed), -1)
