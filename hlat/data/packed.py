"""The packed form of a source: token shards, document tables and a manifest in one folder.

    train-00000.bin     ids of the documents, each followed by EOS (and after BOS, where the manifest has
                        one), as little-endian uint16 (vocabularies up to 65,536) or uint32
    train-00000.docs    one row per document, three little-endian uint64: end in the shard (EOS included),
                        bytes of text, content hash
    train-00000.from    which line of which file each document is (see `hlat.data.origins`)
    holdout-00000.bin   the same for the held-out documents
    tokenizer/          copy of the tokenizer's files
    origins.json        the files that those lines are of
    manifest.json       counts, sha256 of every file and hashes of its blocks, dtype, tokenizer identity,
                        source, what was dropped and why

Nothing depends on the sequence length, or on how many processes wrote it. A document is held out when its
content hash is below `holdout_below`, whatever else the source holds; equal documents are therefore always on
the same side.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from hlat.data import losses, origins
from hlat.data import shard as shards
from hlat.data.convention import difference
from hlat.data.partial import temporary
from hlat.data.readers import Document
from hlat.data.shard import REBUILD, Shard, check_described, is_hash
from hlat.data.sources import FORMAT, MANIFEST, InputFile, Piece, Source
from hlat.data.tokenizer import Tokenizer, load_tokenizer
from hlat.errors import UserError
from hlat.host import json_text
from hlat.storage.blocks import Reading, watching

VERSION = 1
Split = Literal["train", "holdout"]
SPLITS: tuple[Split, ...] = ("train", "holdout")
_BATCH_BYTES = 2**20  # text handed to the tokenizer at once
HOLDS_MARKS = "text that the tokenizer encodes to its end-of-document or BOS token"


class _Text(NamedTuple):
    name: str
    text: str


def document_hash(text: bytes) -> int:
    """The 64-bit content hash (blake2b) that decides on which side of the held-out split a document is."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def holdout_threshold(fraction: float) -> int:
    """Documents whose hash is below this are held out: `fraction` of all, on average.

    Raises UserError outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise UserError(
            f"holdout is {fraction}",
            where="data.holdout",
            fix="write a fraction of the documents, at least 0 and below 1",
        )
    return int(fraction * 2**64)


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 if every id fits, else uint32, little-endian."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def write_unit(
    folder: Path,
    number: int,
    files: Sequence[InputFile],
    pieces: Sequence[Piece],
    text_field: str,
    tokenizer: Tokenizer,
    holdout_below: int,
    progress: Callable[[int], None] = lambda size: None,
) -> dict[str, Any]:
    """Tokenize one work unit into `folder`.

    Returns its statistics (also written, last, as `unit-NNNNN.json`), with the digests of what was read.

    `progress` is called with the bytes of text done since the last call. Raises UserError when the disk
    refuses.
    """
    writers = {
        split: _ShardWriter(folder / f"{split}-{number:05d}", token_dtype(tokenizer.vocab_size))
        for split in SPLITS
    }
    dropped: dict[str, dict[str, Any]] = {}
    places = origins.Places(files, pieces, text_field)
    try:
        with watching(Reading()) as reading:
            for batch in _batches(places.documents(), dropped):
                raw = [document.text.encode("utf-8") for document in batch]
                arrays = tokenizer.encode_arrays([document.text for document in batch])
                found = zip(batch, raw, arrays, places.take(len(batch)), strict=True)
                for document, content, ids, place in found:
                    if tokenizer.marks_in(ids):
                        losses.count(dropped, Document(document.name, None, HOLDS_MARKS, len(content)))
                        continue
                    mark = document_hash(content)
                    side: Split = "holdout" if mark < holdout_below else "train"
                    writers[side].add(ids, tokenizer, len(content), mark, place)
                progress(sum(map(len, raw)))
        shards = {split: writer.close() for split, writer in writers.items()}
        statistics = {
            "shards": {split: shard for split, shard in shards.items() if shard},
            "dropped": dropped,
            "lines": places.lines,
            "read": reading.take(),
        }
        write_json(folder / f"unit-{number:05d}.json", statistics)
    except OSError as error:
        for writer in writers.values():
            writer.discard()
        raise disk_error(error, folder) from error
    return statistics


def _batches(documents: Iterable[Document], dropped: dict[str, dict[str, Any]]) -> Iterator[list[_Text]]:
    batch: list[_Text] = []
    filled = 0
    for document in documents:
        if document.text is None:
            losses.count(dropped, document)
            continue
        batch.append(_Text(document.name, document.text))
        filled += len(document.text)
        if filled >= _BATCH_BYTES:
            yield batch
            batch, filled = [], 0
    if batch:
        yield batch


class _ShardWriter:
    """Appends documents to one shard under temporary names.

    `close` makes it durable and gives it its name.
    """

    def __init__(self, stem: Path, dtype: np.dtype) -> None:
        self._stem, self._dtype = stem, dtype
        self._file: Any = None
        self._digest, self._blocks = hashlib.sha256(), shards.BlockDigests()
        self._tokens = 0
        self._rows: list[tuple[int, int, int]] = []
        self._origins = origins.Writer()
        self._temporary = temporary(stem)

    def add(
        self, ids: np.ndarray, tokenizer: Tokenizer, size: int, mark: int, place: tuple[int, int]
    ) -> None:
        eos = tokenizer.eos_id
        if eos is None:
            raise UserError(
                "the tokenizer has no end-of-document token",
                where=tokenizer.spec,
                fix='set "eos_token" in tokenizer_config.json beside it',
            )
        if self._file is None:
            self._file = open(self._temporary, "xb")  # noqa: SIM115 (closed by close or discard)
        bos = tokenizer.convention.bos
        whole = np.append(ids if bos is None else np.append(bos, ids), eos).astype(self._dtype)
        packed = whole.tobytes()
        self._file.write(packed)
        self._digest.update(packed)
        self._blocks.update(packed)
        self._tokens += len(whole)
        self._rows.append((self._tokens, size, mark))
        self._origins.add(place)

    def close(self) -> dict[str, Any] | None:
        """The shard's entry in the manifest, None when no document came."""
        if self._file is None:
            return None
        _sync_and_close(self._file)
        os.replace(self._temporary, self._stem.with_suffix(".bin"))
        table, runs = np.array(self._rows, dtype="<u8").tobytes(), self._origins.table()
        for content, suffix in ((runs, origins.SUFFIX), (table, ".docs")):
            with open(self._temporary, "xb") as stream:
                stream.write(content)
                _sync_and_close(stream)
            os.replace(self._temporary, self._stem.with_suffix(suffix))
        return {
            "file": self._stem.name,
            "documents": len(self._rows),
            "tokens": self._tokens,
            "bytes": sum(row[1] for row in self._rows),
            "sha256": self._digest.hexdigest(),
            "docs_sha256": hashlib.sha256(table).hexdigest(),
            "from_sha256": hashlib.sha256(runs).hexdigest(),
            **self._blocks.entry(),
        }

    def discard(self) -> None:
        # Closing flushes, which fails again on a full disk; the file is going away all the same.
        try:
            if self._file is not None:
                self._file.close()
        except OSError:
            pass
        finally:
            self._temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write JSON so that the file is either whole or absent. Raises OSError."""
    unfinished = temporary(path)
    try:
        text = json.dumps(content, indent=indent, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a file name that is not UTF-8: escaped it comes back as it was
        text = json.dumps(content, indent=indent).encode()
    with open(unfinished, "xb") as stream:
        stream.write(text + b"\n")
        _sync_and_close(stream)
    os.replace(unfinished, path)


def disk_error(error: OSError, folder: Path) -> UserError:
    """The error for a folder that cannot be written: disk full, read-only, no permission."""
    return UserError(
        f"cannot write tokens ({error.strerror or error})",
        where=str(folder),
        fix="free space there, or choose another disk with --out or XDG_CACHE_HOME",
    )


def _sync_and_close(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()


class TokenFolder:
    """An opened tokenized folder. Opening reads the manifest and the sizes of the files, not their content
    (`hlat.data.verify` does).

    Args:
        whole: look at the sizes too.

    Attributes:
        named: the sources it was made of, where the caller knows them: other files may hold the same text.

    Raises UserError for a folder that is not whole.
    """

    def __init__(self, folder: str | Path, whole: bool = True) -> None:
        self.folder = Path(folder)
        self.named: list[Source] = []
        path = self.folder / MANIFEST
        try:
            if path.exists() and not path.is_file():
                raise ValueError("it is no regular file")
            self.manifest: dict[str, Any] = json_text.loads(path.read_text(encoding="utf-8"))
            if self.manifest["format"] != FORMAT or self.manifest["version"] != VERSION:
                raise ValueError(f"format {self.manifest['format']} {self.manifest['version']}")
            self.dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
            if self.dtype not in (np.dtype("<u2"), np.dtype("<u4")):
                raise ValueError(f"dtype {self.dtype}")
            self.vocab_size = int(self.manifest["tokenizer"]["vocab_size"])
            self.tokenizer_identity: str = self.manifest["tokenizer"]["identity"]
            self.eos_id = int(self.manifest["tokenizer"]["eos_id"])
            bos = self.manifest["tokenizer"].get("bos_id")  # folders of earlier versions have none
            self.bos_id: int | None = None if bos is None else int(bos)
            self.holdout = float(self.manifest["holdout"])
            self._check_numbers()
            check_described(self.manifest)
            self.shards: dict[Split, list[Shard]] = {split: self._shards(split) for split in SPLITS}
        except OSError as error:
            raise UserError(
                f"no readable manifest ({error.strerror})",
                where=str(path),
                fix="name a folder written by `hlat data tokenize`",
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(
                f"not a manifest of tokens this version reads ({error})", where=str(path), fix=REBUILD
            ) from error
        for split in SPLITS if whole else ():
            for shard in self.shards[split]:
                shard.check_size()

    def _check_numbers(self) -> None:
        marks = [self.eos_id] if self.bos_id is None else [self.eos_id, self.bos_id]
        if not is_hash(self.tokenizer_identity):
            raise ValueError("the tokenizer's identity is no hash")
        if not all(0 <= mark < self.vocab_size <= 2**32 for mark in marks):
            raise ValueError(f"marks {marks} in a vocabulary of {self.vocab_size}")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout {self.holdout}")

    def _shards(self, split: Split) -> list[Shard]:
        entries = self.manifest["shards"][split]
        if not isinstance(entries, list):
            raise ValueError(f"{split} is no list of shards")
        if any(os.path.basename(entry["file"]) != entry["file"] for entry in entries):
            raise ValueError("a shard outside the folder")
        return [Shard(self.folder, entry, self.dtype, self.vocab_size) for entry in entries]

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises UserError unless this tokenizer wrote the shards, or one whose ids mean the same."""
        if tokenizer.identity == self.tokenizer_identity:
            if (tokenizer.vocab_size, tokenizer.eos_id) != (self.vocab_size, self.eos_id):
                what = "it does not say of the tokenizer what its identity says"
                raise UserError(what, where=str(self.folder / MANIFEST), fix=REBUILD)
            return
        if not self._same_ids(tokenizer):
            fix = f"set data.tokenizer to '{self.folder}', or tokenize again"
            if tokenizer.of_weights:
                fix = (
                    f"tokenize again with the weights' own: hlat data tokenize … --tokenizer {tokenizer.spec}"
                )
            raise UserError(
                f"the shards were written with another tokenizer (vocabulary {self.vocab_size:,})"
                f" than '{tokenizer.spec}' "
                f"(vocabulary {tokenizer.vocab_size:,})",
                where=str(self.folder / MANIFEST),
                fix=fix,
            )

    def _same_ids(self, tokenizer: Tokenizer) -> bool:
        try:
            own = load_tokenizer(self.folder)
        except UserError:  # an old folder may lack its tokenizer
            return False
        return own.identity == self.tokenizer_identity and not difference(tokenizer, own)

    @cached_property
    def origins(self) -> origins.Origins:
        """Which file and line its documents came from. Raises UserError when that is damaged."""
        return origins.Origins(self.folder, self.named)

    def count(self, split: Split, what: Literal["count", "documents", "bytes"] = "count") -> int:
        """Tokens (EOS included), documents or bytes of text of a split."""
        return sum(getattr(shard, what) for shard in self.shards[split])

    def content_hash(self) -> str:
        """Hash (hex sha256) over the shards' hashes and the tokenizer's identity."""
        marks = [
            f"{split} {shard.sha256} {shard.docs_sha256}" for split in SPLITS for shard in self.shards[split]
        ]
        return hashlib.sha256(
            "\n".join([self.tokenizer_identity, str(self.dtype), *marks]).encode()
        ).hexdigest()
