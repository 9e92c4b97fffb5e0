"""One shard of a tokenized folder: its ids and its table of documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hlat.data.token_file import TokenFile
from hlat.errors import UserError

REBUILD = "delete the folder and run `hlat data tokenize` again"
BLOCK = 4 << 20  # bytes that have a hash of their own in the manifest
_DOCUMENT_BYTES = 24


def block_digest(content: bytes | memoryview) -> str:
    """The hash (hex, 64-bit blake2b) of one block."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


class BlockDigests:
    """Hashes of the blocks of a file that is being written."""

    def __init__(self) -> None:
        self._done: list[str] = []
        self._begun, self._filled = hashlib.blake2b(digest_size=8), 0

    def update(self, content: bytes) -> None:
        """Take the next bytes."""
        rest = memoryview(content)
        while rest:
            part, rest = rest[: BLOCK - self._filled], rest[BLOCK - self._filled :]
            self._begun.update(part)
            self._filled += len(part)
            if self._filled == BLOCK:
                self._done.append(self._begun.hexdigest())
                self._begun, self._filled = hashlib.blake2b(digest_size=8), 0

    def entry(self) -> dict[str, Any]:
        """What the manifest has of them."""
        last = [self._begun.hexdigest()] if self._filled else []
        return {"block_bytes": BLOCK, "blocks": [*self._done, *last]}


def check_described(manifest: dict[str, Any]) -> None:
    """Raises ValueError, KeyError or TypeError where what a manifest says for people is not of its form."""
    for source in manifest.get("sources", []):
        _numbers(source, "files", "bytes")
        _numbers(source.get("skipped", {}))
        str.__len__(source["label"])
    for reason, entry in manifest.get("dropped", {}).items():
        _numbers(entry, "count")
        ", ".join([reason, *entry["examples"]])
    for totals in manifest.get("totals", {}).values():
        _numbers(totals, "documents", "tokens", "bytes")


def _numbers(values: dict[str, Any], *names: str) -> None:
    for name in names or values:
        if not isinstance(values[name], int):
            raise TypeError(f"{name} is {values[name]!r}")


class Shard:
    """One shard on disk, read when it is asked for.

    Args:
        entry: of the manifest.
        vocab_size: ids are below this.
    """

    def __init__(self, folder: Path, entry: dict[str, Any], dtype: np.dtype, vocab_size: int) -> None:
        self.path = folder / f"{entry['file']}.bin"
        self.documents_path = folder / f"{entry['file']}.docs"
        self.count, self.documents, self.bytes = (
            int(entry["tokens"]),
            int(entry["documents"]),
            int(entry["bytes"]),
        )
        self.sha256: str = entry["sha256"]
        self.docs_sha256: str = entry["docs_sha256"]
        if min(self.count, self.documents, self.bytes) < 0:
            raise ValueError(f"a shard of {self.count} tokens")
        # Folders of earlier versions have none.
        blocks = entry.get("blocks") if entry.get("block_bytes") == BLOCK else None
        self.blocks: list[str] = blocks if isinstance(blocks, list) else []
        self._dtype, self._vocab_size = dtype, vocab_size
        self.tokens = TokenFile(self.path, dtype, self.count, self.sha256)
        """Ids by slice, in the shard's own dtype."""

    def ids(self, start: int, stop: int) -> np.ndarray:
        """Ids (stop - start,) int64. Raises UserError for a file that is no longer what it was, and for an id
        beyond the vocabulary."""
        found = self.tokens[start:stop]
        if len(found) and int(found.max()) >= self._vocab_size:
            at = int(np.argmax(found >= self._vocab_size))
            raise UserError(self.out_of_range(start + at, int(found[at])), where=str(self.path), fix=REBUILD)
        return found.astype(np.int64)

    @cached_property
    def table(self) -> np.ndarray:
        """(documents, 3) uint64.

        End of the document in the shard (EOS included), bytes of its text, content hash.
        """
        try:
            rows = np.fromfile(self.documents_path, dtype="<u8")
        except OSError as error:
            what = f"cannot be read ({error.strerror or error})"
            raise UserError(what, where=str(self.documents_path), fix="make it readable") from error
        if rows.size != 3 * self.documents:
            what = f"shard has {rows.nbytes:,} bytes instead of {self.documents * _DOCUMENT_BYTES:,}"
            raise UserError(what, where=str(self.documents_path), fix=REBUILD)
        return rows.reshape(-1, 3)

    def document_at(self, place: int) -> int:
        """Number, from 0, of the document that a token of the shard belongs to."""
        return int(np.searchsorted(self.table[:, 0], place, side="right"))

    def out_of_range(self, place: int, value: int) -> str:
        """What is said of an id beyond the vocabulary."""
        return (
            f"document {self.document_at(place)} of {self.path.stem} holds the id {value:,},"
            f" the vocabulary ends at {self._vocab_size - 1:,}"
        )

    def sizes(self) -> Iterator[tuple[Path, int]]:
        """Its files and the bytes they should have."""
        yield self.path, self.count * self._dtype.itemsize
        yield self.documents_path, self.documents * _DOCUMENT_BYTES

    def check_size(self) -> None:
        """Raises UserError when a file is missing or has another size than the manifest says."""
        for path, expected in self.sizes():
            found = path.stat() if path.is_file() else None
            if found is None or found.st_size != expected:
                what = (
                    "is missing" if found is None else f"has {found.st_size:,} bytes instead of {expected:,}"
                )
                raise UserError(f"shard {what}", where=str(path), fix=REBUILD)
            if path == self.path:
                self.tokens.expect(found)
