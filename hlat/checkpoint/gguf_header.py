"""Whether a GGUF file's header holds together, before the `gguf` package reads it.

That package believes every count and length in a file: a few bytes can send it on a way of 10^18 steps. Here
the header is walked once, and each count is compared with what is left of the file. Layout:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by type of value
_MOST_AXES = 4  # ggml's
_KEY, _TENSOR = 13, 24  # least bytes of a key with its value, and of a tensor's entry


def header_problem(path: Path) -> str:
    """What is wrong with a file's header; empty: nothing. Raises OSError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            _Walk(file, size).header()
        except ValueError as error:
            return str(error)
    return ""


class _Walk:
    """Raises ValueError at the first thing that cannot be."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size, self.at, self.order = file, size, 0, "<"

    def header(self) -> None:
        if self._take(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        raw = self._take(4)
        if struct.unpack("<I", raw)[0] & 0xFFFF == 0:
            self.order = ">"
        version = struct.unpack(f"{self.order}I", raw)[0]
        if version not in _VERSIONS:
            raise ValueError(f"its version is {version}, and 2 and 3 can be read")
        tensors, keys = self._number(8), self._number(8)
        self._room(keys, _KEY, "keys")
        for _ in range(keys):
            self._string()
            self._value(self._number(4))
        self._room(tensors, _TENSOR, "tensors")
        for _ in range(tensors):
            self._string()
            axes = self._number(4)
            if axes > _MOST_AXES:
                raise ValueError(f"a tensor has {axes:,} axes")
            self._skip(8 * axes + 12)

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY:
            inner, count = self._number(4), self._number(8)
            if inner == _STRING:
                self._room(count, 8, "texts")
                for _ in range(count):
                    self._string()
            elif inner in _SIZES:
                self._room(count, _SIZES[inner], "numbers")
                self._skip(count * _SIZES[inner])
            else:
                raise ValueError(f"a list holds values of the unknown type {inner}")
        elif kind in _SIZES:
            self._skip(_SIZES[kind])
        else:
            raise ValueError(f"a value is of the unknown type {kind}")

    def _room(self, count: int, each: int, what: str) -> None:
        if count * each > self.size - self.at:
            raise ValueError(f"it says that {count:,} {what} follow, and ends before")

    def _string(self) -> None:
        self._skip(self._number(8))

    def _number(self, width: int) -> int:
        code = {4: "I", 8: "Q"}[width]
        return int(struct.unpack(f"{self.order}{code}", self._take(width))[0])

    def _take(self, count: int) -> bytes:
        data = self.file.read(count)
        self.at += count
        if len(data) < count:
            raise ValueError("it ends in its header")
        return data

    def _skip(self, count: int) -> None:
        if count > self.size - self.at:
            raise ValueError("it ends in its header")
        self.at += count
        self.file.seek(self.at)
