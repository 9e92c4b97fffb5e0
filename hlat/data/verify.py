"""Whether a tokenized folder holds what was written: in full, or in short before a run trains on it.

In full: every file's size and hash, every id within the vocabulary, the documents' borders, the tokenizer's
copy. In short: files whose hash is known from an earlier look and that have not changed since are compared
with it, which costs nothing; up to `FULL_BELOW` bytes of the others are read whole; of what is larger some
blocks of every shard, each compared with its own hash where the manifest has those.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hlat.data.packed import MANIFEST, SPLITS, TokenFolder
from hlat.data.shard import BLOCK, REBUILD, Shard, block_digest
from hlat.data.tokenizer import load_tokenizer
from hlat.errors import UserError
from hlat.storage.digests import file_digest, remembered

FULL_BELOW = 256 << 20
SAMPLED = 64  # blocks of a folder that are looked at where it is not read whole, but two of each shard
_READ = 1 << 22  # ids at once


@dataclass(frozen=True)
class Bad:
    """A file that is not what it should be, and why; the name counts from the folder."""

    file: str
    reason: str


def verify(folder: Path) -> list[Bad]:
    """All that is wrong with a tokenized folder; empty for a whole one. Reads all of it.

    Raises UserError where there is no such folder.
    """
    if not folder.is_dir():
        fix = "name a folder written by `hlat data tokenize`"
        raise UserError("no such folder", where=str(folder), fix=fix)
    try:
        opened = TokenFolder(folder, whole=False)
    except UserError as error:
        return [Bad(MANIFEST, error.what)]
    found = [bad for split in SPLITS for shard in opened.shards[split] for bad in _shard(opened, shard)]
    return found + _tokenizer(opened)


def _shard(folder: TokenFolder, shard: Shard) -> Iterator[Bad]:
    sizes = list(_sizes(shard))
    yield from sizes
    if sizes:
        return
    for path, expected in ((shard.path, shard.sha256), (shard.documents_path, shard.docs_sha256)):
        try:
            with open(path, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            yield Bad(path.name, f"cannot be read ({error.strerror or error})")
            return
        if digest != expected:
            yield Bad(path.name, "its sha256 is not the manifest's")
    try:
        if wrong := borders(shard):
            yield Bad(shard.documents_path.name, wrong)
        elif wrong := next(_out_of_range(folder, shard, 0, shard.count), "") or _ends(folder, shard):
            yield Bad(shard.path.name, wrong)
    except UserError as error:  # changed while it was read
        yield Bad(Path(error.where or shard.path).name, error.what)


def _sizes(shard: Shard) -> Iterator[Bad]:
    for path, expected in shard.sizes():
        try:
            size = path.stat().st_size
        except OSError as error:
            yield Bad(
                path.name, "is missing" if isinstance(error, FileNotFoundError) else str(error.strerror)
            )
            continue
        if size != expected:
            yield Bad(path.name, f"has {size:,} bytes instead of {expected:,}")


def borders(shard: Shard) -> str:
    """What is wrong with a shard's table of documents; empty: nothing."""
    ends = shard.table[:, 0].astype(np.int64)
    if len(ends) and (ends[0] < 1 or (np.diff(ends) < 1).any()):
        return "the ends of its documents do not ascend"
    if (int(ends[-1]) if len(ends) else 0) != shard.count:
        return f"its last document does not end with the shard's {shard.count:,} ids"
    if int(shard.table[:, 1].sum()) != shard.bytes:
        return f"its documents do not have the manifest's {shard.bytes:,} bytes of text"
    return ""


def _out_of_range(folder: TokenFolder, shard: Shard, start: int, stop: int) -> Iterator[str]:
    for first in range(start, stop, _READ):
        ids = shard.tokens[first : min(first + _READ, stop)]
        if len(ids) and int(ids.max()) >= folder.vocab_size:
            yield shard.out_of_range(first + int(np.argmax(ids >= folder.vocab_size)), int(ids.max()))


def _ends(folder: TokenFolder, shard: Shard) -> str:
    """Whether documents end in EOS and hold none (with a BOS that is EOS they begin with one)."""
    ends = shard.table[:, 0].astype(np.int64) - 1
    marks = np.concatenate(
        [np.zeros(0, dtype=np.int64)]
        + [
            first + np.flatnonzero(shard.tokens[first : first + _READ] == folder.eos_id)
            for first in range(0, shard.count, _READ)
        ]
    )
    if folder.bos_id == folder.eos_id:
        ends = np.union1d(ends, np.append(0, ends[:-1] + 1))
    if np.array_equal(ends, marks):
        return ""
    odd = int(np.setxor1d(ends, marks)[0])
    return f"document {shard.document_at(odd)} does not end where its end-of-document token is"


def _tokenizer(folder: TokenFolder) -> list[Bad]:
    try:
        own = load_tokenizer(folder.folder)
    except UserError as error:
        return [Bad("tokenizer", error.what)]
    named = folder.manifest["tokenizer"]
    said = (named["identity"], named["vocab_size"], named["eos_id"])
    if said != (own.identity, own.vocab_size, own.eos_id):
        return [Bad("tokenizer", "is not the one that the manifest says the shards were written with")]
    return []


def check_before_training(folder: TokenFolder) -> None:
    """The short look at a folder. Raises UserError for the first thing that is wrong."""
    shards = [shard for split in SPLITS for shard in folder.shards[split]]
    files = [
        (path, expected)
        for shard in shards
        for path, expected in ((shard.path, shard.sha256), (shard.documents_path, shard.docs_sha256))
    ]
    known = {path: remembered(path) for path, _ in files}
    sizes = {path: size for shard in shards for path, size in shard.sizes()}
    if sum(sizes[path] for path, digest in known.items() if digest is None) <= FULL_BELOW:
        known = {path: file_digest(path) for path, _ in files}
    for path, expected in files:
        if known[path] not in (None, expected):
            raise _damaged(path, "its sha256 is not the manifest's")
    if sum(shard.count for shard in shards) * folder.dtype.itemsize > FULL_BELOW:
        _sample(folder, shards)
        return
    for shard in shards:
        if wrong := borders(shard) or next(_out_of_range(folder, shard, 0, shard.count), ""):
            raise _damaged(shard.path, wrong)


def _sample(folder: TokenFolder, shards: list[Shard]) -> None:
    for shard in shards:
        blocks = -(-shard.count * folder.dtype.itemsize // BLOCK)
        each = max(2, SAMPLED // len(shards))
        for block in sorted({round(n * (blocks - 1) / max(each - 1, 1)) for n in range(each)}):
            first = block * BLOCK // folder.dtype.itemsize
            ids = shard.tokens[first : first + BLOCK // folder.dtype.itemsize]
            known = shard.blocks[block] if block < len(shard.blocks) else None
            if known is not None and block_digest(ids.tobytes()) != known:
                raise _damaged(shard.path, f"its bytes from {block * BLOCK:,} on are not those written")
            if len(ids) and int(ids.max()) >= folder.vocab_size:
                at = first + int(np.argmax(ids >= folder.vocab_size))
                raise _damaged(shard.path, shard.out_of_range(at, int(ids.max())))


def _damaged(path: Path, reason: str) -> UserError:
    what = f"shard is damaged: {reason}"
    fix = f"`hlat data verify {os.path.dirname(path)}` looks at all of it; {REBUILD}"
    return UserError(what, where=str(path), fix=fix)


def as_json(bad: list[Bad]) -> dict[str, Any]:
    """What `hlat data verify --json` prints."""
    return {"ok": not bad, "bad": [{"file": entry.file, "reason": entry.reason} for entry in bad]}
