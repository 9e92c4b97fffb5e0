"""Where documents come from.

A source is resolved to an ordered list of files, its content identity and its work units.

Nothing here reads text; `readers.py` does. Everything is a function of the files alone (never of the number
of workers), so the shards built from a source are the same on every machine.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hlat.data.progress import tokenizing
from hlat.errors import UserError, missing_extra
from hlat.paths import existing, expand
from hlat.storage.digests import file_digests
from hlat.storage.fingerprint import digest_of

FileKind = Literal["text", "jsonl", "jsonl.gz", "parquet", "arrow"]
MANIFEST = "manifest.json"
STDLIB = "python-stdlib"
_SHOW_ABOVE = 2**30  # bytes; smaller sources are hashed within a second
# A unit is what one worker tokenizes at a time, and becomes one shard: at most 64 units of small sources, 64
# MiB of text in large ones.
UNIT_BYTES_MIN, UNIT_BYTES_MAX, UNITS_WANTED = 2**20, 64 * 2**20, 64


@dataclass(frozen=True)
class InputFile:
    """One file of a source.

    Absolute path, name relative to the source's root (always with `/`), kind, size in bytes.
    """

    path: str
    name: str
    kind: FileKind
    size: int


@dataclass
class Source:
    """A resolved source. `skipped` counts what was found and not taken, by reason."""

    label: str
    files: list[InputFile]
    text_field: str = "text"
    skipped: dict[str, int] = field(default_factory=dict)
    known_identity: str = ""

    @property
    def size(self) -> int:
        """Bytes on disk of all files."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Piece:
    """A part of one file.

    All of it (`text`, `jsonl.gz`), bytes (`jsonl`), row groups (`parquet`) or rows (`arrow`), start <= i <
    stop.
    """

    file: int
    start: int
    stop: int
    size: int


def tokenized_folder(path: str | Path | None) -> Path | None:
    """The path if it is the output of `hlat data tokenize` (it holds a manifest.json), else None."""
    folder = expand(path) if path else None
    return folder if folder and (folder / MANIFEST).is_file() else None


def resolve_source(
    *,
    path: str | Path | None = None,
    dataset: str | None = None,
    text_field: str = "text",
    where: str = "source",
) -> Source:
    """The files of a source.

    Args:
        path: a file or a folder (read recursively, in sorted order).
        dataset: `python-stdlib`, or a Hugging Face dataset `name[:config][@split]` (split `train` unless
            given; extra `data`).
        text_field: the column or key that holds the text of jsonl, parquet and arrow records.
        where: the key to name in errors.

    Raises UserError when the source is missing or holds no file.
    """
    if (path is None) == (dataset is None):
        raise UserError("a source needs exactly one of 'path' and 'dataset'", where=where)
    if dataset == STDLIB:
        source = _stdlib()
    elif dataset is not None:
        _refuse_near_builtin(dataset, where)
        source = _huggingface(dataset, where)
    else:
        source = _from_path(existing(str(path), where), where)
    source.text_field = text_field
    if not source.files:
        reasons = ", ".join(f"{count} {reason}" for reason, count in source.skipped.items())
        raise UserError(
            f"no text in '{source.label}'" + (f" ({reasons})" if reasons else ""),
            where=where,
            fix="name a folder or file that holds text",
        )
    return source


def identity(source: Source, quiet: bool = False) -> str:
    """Hash (hex sha256) of what the source holds: kind, size and bytes of its files, in their order. Neither
    their names nor where they lie enter.

    Files are read once (see `hlat.storage.digests`). Raises UserError for one that cannot be read, or that
    changes while it is read.
    """
    if not source.known_identity:
        source.known_identity = _content(source, quiet)
    return source.known_identity


def refuse_changed(sources: Sequence[Source], doing: str) -> None:
    """Raise UserError where a source is no longer what `identity` said before it was read: what was made of
    it, which is called by that, may hold some of both.
    """
    for source in sources:
        if _content(source, quiet=True) != identity(source):
            fix = "start again when whatever writes it is done"
            raise UserError(f"changed while it was {doing}", where=source.label, fix=fix)


def _content(source: Source, quiet: bool) -> str:
    done = 0
    with tokenizing(f"reading {source.label}", quiet or source.size < _SHOW_ABOVE) as bar:

        def advance(size: int) -> None:
            nonlocal done
            done += size
            bar.update(done, source.size)

        digests = file_digests([file.path for file in source.files], advance)
    files = [[file.kind, file.size, digest] for file, digest in zip(source.files, digests, strict=True)]
    return digest_of({"text_field": source.text_field, "files": files})


def units(source: Source) -> list[list[Piece]]:
    """The source cut into work units of about equal size, in order; the same on every machine."""
    wanted = min(max(source.size // UNITS_WANTED, UNIT_BYTES_MIN), UNIT_BYTES_MAX)
    result: list[list[Piece]] = []
    current: list[Piece] = []
    filled = 0
    for index, file in enumerate(source.files):
        for piece in _pieces(index, file, wanted):
            if current and filled + piece.size > wanted:
                result.append(current)
                current, filled = [], 0
            current.append(piece)
            filled += piece.size
    return [*result, current] if current else result


def _pieces(index: int, file: InputFile, wanted: int) -> Iterator[Piece]:
    if file.kind == "jsonl":
        for start in range(0, file.size, wanted):
            stop = min(start + wanted, file.size)
            yield Piece(index, start, stop, stop - start)
    elif file.kind in ("parquet", "arrow"):
        from hlat.data.readers import columnar_parts

        yield from (Piece(index, start, stop, size) for start, stop, size in columnar_parts(file, wanted))
    else:
        yield Piece(index, 0, file.size, file.size)


def kind_of(name: str) -> FileKind:
    """The kind of a file by its name; whatever is not a known container is plain text."""
    lower = name.lower()
    for suffix, kind in (
        (".jsonl.gz", "jsonl.gz"),
        (".jsonl", "jsonl"),
        (".ndjson", "jsonl"),
        (".parquet", "parquet"),
        (".arrow", "arrow"),
    ):
        if lower.endswith(suffix):
            return kind  # type: ignore[return-value]
    return "text"


def _from_path(path: Path, where: str) -> Source:
    try:
        if path.is_file():
            size = path.stat().st_size
            files = [InputFile(str(path.absolute()), path.name, kind_of(path.name), size)] if size else []
            return Source(str(path), files, skipped={} if size else {"empty file": 1})
        if (path / "dataset_dict.json").is_file():
            raise UserError(
                f"'{path}' holds several splits", where=where, fix=f"name one, such as '{path / 'train'}'"
            )
        return _from_folder(path, str(path), python_only=False)
    except OSError as error:
        raise UserError(
            f"'{path}' cannot be read ({error.strerror})", where=where, fix="make it readable"
        ) from error


def _from_folder(root: Path, label: str, python_only: bool) -> Source:
    files: list[InputFile] = []
    skipped: dict[str, int] = {}

    def skip(reason: str) -> None:
        skipped[reason] = skipped.get(reason, 0) + 1

    def failed(error: OSError) -> None:
        raise error

    # The files with which Hugging Face `datasets` describes a saved folder of arrow files are not text of the
    # data set.
    saved_dataset = (root / "state.json").is_file() and (root / "dataset_info.json").is_file()
    for folder, subfolders, names in os.walk(root, onerror=failed):
        for name in list(subfolders):
            reason = _folder_reason(folder, name, python_only)
            if reason:
                subfolders.remove(name)
                skip(reason)
        for name in names:
            path = os.path.join(folder, name)
            if python_only and not name.endswith(".py"):
                continue
            if name.startswith("."):
                skip("hidden file")
            elif not os.path.isfile(path):
                skip("not a regular file")
            elif saved_dataset and folder == str(root) and name in ("state.json", "dataset_info.json"):
                skip("description of a saved data set")
            elif not (size := os.path.getsize(path)):
                skip("empty file")
            else:
                files.append(
                    InputFile(
                        os.path.abspath(path),
                        os.path.relpath(path, root).replace(os.sep, "/"),
                        kind_of(name),
                        size,
                    )
                )
    files.sort(key=lambda file: file.name)
    return Source(label, files, skipped=dict(sorted(skipped.items())))


def _folder_reason(parent: str, name: str, python_only: bool) -> str:
    if python_only and name in ("site-packages", "dist-packages"):
        return "folder of installed packages"
    if python_only and name in ("test", "tests", "idle_test"):
        return "test folder"
    if name == "__pycache__" or name.startswith("."):
        return "hidden or cache folder"
    return "link to a folder" if os.path.islink(os.path.join(parent, name)) else ""


def _stdlib() -> Source:
    """The *.py files of the running Python's standard library, one document each.

    Test folders are left out: most Linux distributions and container images do not install them, so with them
    the same recipe would train on different text from one machine to the next.
    """
    return _from_folder(Path(sysconfig.get_path("stdlib")), STDLIB, python_only=True)


def _refuse_near_builtin(dataset: str, where: str) -> None:
    """A misspelt built-in name is not asked for on the hub, where data sets are called owner/name, or have
    short names that are no more like ours than `stdlib`.
    """
    from hlat.data.stdlib import BUILTIN  # it reads a source itself

    if dataset in BUILTIN:
        fix = f"write data.examples: {{dataset: {dataset}}}"
        raise UserError(f"'{dataset}' is a set of examples, not a text", where=where, fix=fix)
    name = dataset.partition("@")[0].partition(":")[0].lower()
    near = difflib.get_close_matches(name, [STDLIB, *BUILTIN], 1, cutoff=0.5 if "stdlib" in name else 0.75)
    if near and "/" not in name:
        raise UserError(f"no data set '{dataset}'", where=where, fix=f"did you mean '{near[0]}'?")


@contextlib.contextmanager
def _without_retries_told() -> Iterator[None]:
    """The hub's library tells of each attempt to reach it; the error at the end says it all."""
    logger = logging.getLogger("huggingface_hub")
    former = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(former)


def _huggingface(dataset: str, where: str) -> Source:
    try:
        import datasets
    except ImportError as error:
        raise missing_extra("datasets", "data", f"the data set '{dataset}'") from error
    name, _, split = dataset.partition("@")
    name, _, config = name.partition(":")
    try:
        with _without_retries_told():
            loaded: Any = datasets.load_dataset(name, config or None, split=split or "train")
    except (
        Exception
    ) as error:  # the library raises a dozen unrelated types for a wrong name, split or no network
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fix = "check name, config and @split, and that this machine reaches the hub"
        raise UserError(f"data set '{dataset}' cannot be loaded ({reason})", where=where, fix=fix) from error
    files = []
    for entry in loaded.cache_files:
        path = entry["filename"]
        files.append(InputFile(path, os.path.basename(path), "arrow", os.path.getsize(path)))
    return Source(dataset, files)
