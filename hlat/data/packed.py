"""The packed form of a source: token shards, document tables and a manifest in one folder.

    train-00000.bin     ids of the documents, each followed by EOS (and after BOS, where the manifest has
                        one), as little-endian uint16 (vocabularies up to 65,536) or uint32
    train-00000.docs    one row per document, three little-endian uint64: end in the shard (EOS included),
                        bytes of text, content hash
    holdout-00000.bin   the same for the held-out documents
    tokenizer/          copy of the tokenizer's files
    manifest.json       counts, sha256 of every file, dtype, tokenizer identity, source, what was dropped and
                        why

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
from typing import Any, Literal

import numpy as np

from hlat.data.convention import difference
from hlat.data.readers import Document, read_pieces
from hlat.data.sources import MANIFEST, InputFile, Piece
from hlat.data.tokenizer import Tokenizer, load_tokenizer
from hlat.errors import UserError

FORMAT, VERSION = "hlat-tokens", 1
Split = Literal["train", "holdout"]
SPLITS: tuple[Split, ...] = ("train", "holdout")
_DOCUMENT_BYTES = 24
_BATCH_BYTES = 2**20  # text handed to the tokenizer at once
_EXAMPLES = 3  # names kept per reason of dropping
REBUILD = "delete the folder and run `hlat data tokenize` again"


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

    Returns its statistics (also written, last, as `unit-NNNNN.json`).

    `progress` is called with the bytes of text done since the last call. Raises UserError when the disk
    refuses.
    """
    writers = {
        split: _ShardWriter(folder / f"{split}-{number:05d}", token_dtype(tokenizer.vocab_size))
        for split in SPLITS
    }
    dropped: dict[str, dict[str, Any]] = {}
    try:
        for batch in _batches(read_pieces(files, pieces, text_field), dropped):
            raw = [text.encode("utf-8") for text in batch]
            for content, ids in zip(raw, tokenizer.encode_arrays(batch), strict=True):
                mark = document_hash(content)
                writers["holdout" if mark < holdout_below else "train"].add(
                    ids, tokenizer, len(content), mark
                )
            progress(sum(map(len, raw)))
        shards = {split: writer.close() for split, writer in writers.items()}
        statistics = {
            "shards": {split: shard for split, shard in shards.items() if shard},
            "dropped": dropped,
        }
        write_json(folder / f"unit-{number:05d}.json", statistics)
    except OSError as error:
        for writer in writers.values():
            writer.discard()
        raise disk_error(error, folder) from error
    return statistics


def _batches(documents: Iterable[Document], dropped: dict[str, dict[str, Any]]) -> Iterator[list[str]]:
    batch: list[str] = []
    filled = 0
    for document in documents:
        if document.text is None:
            entry = dropped.setdefault(document.reason, {"count": 0, "examples": []})
            entry["count"] += 1
            if len(entry["examples"]) < _EXAMPLES:
                entry["examples"].append(document.name.encode("utf-8", "backslashreplace").decode())
            continue
        batch.append(document.text)
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
        self._digest = hashlib.sha256()
        self._tokens = 0
        self._rows: list[tuple[int, int, int]] = []
        self._temporary = stem.with_name(f"{stem.name}.{os.getpid()}.tmp")

    def add(self, ids: np.ndarray, tokenizer: Tokenizer, size: int, mark: int) -> None:
        eos = tokenizer.eos_id
        if eos is None:
            raise UserError(
                "the tokenizer has no end-of-document token",
                where=tokenizer.spec,
                fix='set "eos_token" in tokenizer_config.json beside it',
            )
        if (ids == eos).any():
            raise ValueError(
                f"text encodes to the end-of-document id {eos}; document boundaries would be ambiguous"
            )
        if self._file is None:
            self._file = open(self._temporary, "wb")  # noqa: SIM115 (closed by close or discard)
        bos = tokenizer.convention.bos
        whole = np.append(ids if bos is None else np.append(bos, ids), eos).astype(self._dtype)
        packed = whole.tobytes()
        self._file.write(packed)
        self._digest.update(packed)
        self._tokens += len(whole)
        self._rows.append((self._tokens, size, mark))

    def close(self) -> dict[str, Any] | None:
        """The shard's entry in the manifest, None when no document came."""
        if self._file is None:
            return None
        _sync_and_close(self._file)
        os.replace(self._temporary, self._stem.with_suffix(".bin"))
        table = np.array(self._rows, dtype="<u8").tobytes()
        with open(self._temporary, "wb") as stream:
            stream.write(table)
            _sync_and_close(stream)
        os.replace(self._temporary, self._stem.with_suffix(".docs"))
        return {
            "file": self._stem.name,
            "documents": len(self._rows),
            "tokens": self._tokens,
            "bytes": sum(row[1] for row in self._rows),
            "sha256": self._digest.hexdigest(),
            "docs_sha256": hashlib.sha256(table).hexdigest(),
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


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is either whole or absent. Raises OSError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2, ensure_ascii=False)
        stream.write("\n")
        _sync_and_close(stream)
    os.replace(temporary, path)


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


class Shard:
    """One shard on disk, mapped into memory on first use."""

    def __init__(self, folder: Path, entry: dict[str, Any], dtype: np.dtype) -> None:
        self.path = folder / f"{entry['file']}.bin"
        self.documents_path = folder / f"{entry['file']}.docs"
        self.count, self.documents, self.bytes = (
            int(entry["tokens"]),
            int(entry["documents"]),
            int(entry["bytes"]),
        )
        self.sha256: str = entry["sha256"]
        self.docs_sha256: str = entry["docs_sha256"]
        self._dtype = dtype

    @cached_property
    def tokens(self) -> np.ndarray:
        """Ids (count,), read-only, in the shard's own dtype."""
        return np.memmap(self.path, dtype=self._dtype, mode="r", shape=(self.count,))

    @cached_property
    def table(self) -> np.ndarray:
        """(documents, 3) uint64.

        End of the document in the shard (EOS included), bytes of its text, content hash.
        """
        return np.memmap(self.documents_path, dtype="<u8", mode="r", shape=(self.documents, 3))

    def check_size(self) -> None:
        """Raises UserError when a file is missing or has another size than the manifest says."""
        for path, expected in (
            (self.path, self.count * self._dtype.itemsize),
            (self.documents_path, self.documents * _DOCUMENT_BYTES),
        ):
            size = path.stat().st_size if path.is_file() else None
            if size != expected:
                found = "is missing" if size is None else f"has {size:,} bytes instead of {expected:,}"
                raise UserError(f"shard {found}", where=str(path), fix=REBUILD)

    def check_content(self) -> None:
        """Raises UserError when the content is not what was written. Reads the whole shard."""
        for path, expected in ((self.path, self.sha256), (self.documents_path, self.docs_sha256)):
            with open(path, "rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != expected:
                    raise UserError(
                        "shard is damaged (sha256 differs from the manifest)", where=str(path), fix=REBUILD
                    )


class TokenFolder:
    """An opened tokenized folder. Opening reads the manifest and the sizes of the files, not their content.

    Raises UserError for a folder that is not whole.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        try:
            if path.exists() and not path.is_file():
                raise ValueError("it is no regular file")
            self.manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
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
            self.shards: dict[Split, list[Shard]] = {split: self._shards(split) for split in SPLITS}
        except OSError as error:
            raise UserError(
                f"no readable manifest ({error.strerror})",
                where=str(path),
                fix="name a folder written by `hlat data tokenize`",
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"not a manifest of tokens this version reads ({error})", where=str(path), fix=REBUILD
            ) from error
        for split in SPLITS:
            for shard in self.shards[split]:
                shard.check_size()

    def _shards(self, split: Split) -> list[Shard]:
        entries = self.manifest["shards"][split]
        if any(os.path.basename(entry["file"]) != entry["file"] for entry in entries):
            raise ValueError("a shard outside the folder")
        return [Shard(self.folder, entry, self.dtype) for entry in entries]

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises UserError unless this tokenizer wrote the shards, or one whose ids mean the same."""
        if tokenizer.identity == self.tokenizer_identity:
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
