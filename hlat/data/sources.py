"""Where documents come from.

A source is resolved to an ordered list of files, its content identity and its work units.

Nothing here reads text; `readers.py` does. Everything is a function of the files alone (never of the number
of workers), so the shards built from a source are the same on every machine.
"""

from __future__ import annotations

import difflib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hlat.data.formats import READING, FileKind, kind_of
from hlat.data.hub import INFO, SPLITS_FILE, STATE, load_rows, saved_files, saved_splits
from hlat.data.losses import ALLOWED
from hlat.data.progress import tokenizing
from hlat.errors import UserError
from hlat.host import json_text
from hlat.paths import existing, expand
from hlat.storage.blocks import Reading, changed, note
from hlat.storage.digests import Digest, forget, looked_at
from hlat.storage.fingerprint import digest_of

MANIFEST, FORMAT = "manifest.json", "hlat-tokens"
STDLIB = "python-stdlib"
_SHOW_ABOVE = 2**30  # bytes; smaller sources are hashed within a second
# A unit is what one worker tokenizes at a time, and becomes one shard: at most 64 units of small sources, 64
# MiB of text in large ones.
UNIT_BYTES_MIN, UNIT_BYTES_MAX, UNITS_WANTED = 2**20, 64 * 2**20, 64


@dataclass(frozen=True)
class InputFile:
    """One file of a source.

    Absolute path, name relative to the source's root (always with `/`), kind, size in bytes. Of an arrow file
    in a sliced data set only the rows start <= i < stop are meant (stop -1: to its end), and `size` is their
    share.
    """

    path: str
    name: str
    kind: FileKind
    size: int
    start: int = 0
    stop: int = -1


@dataclass
class Source:
    """A resolved source. `skipped` counts what was found and not taken, by reason; `allow_dropped` is the
    largest share that may turn out to be no text.
    """

    label: str
    files: list[InputFile]
    text_field: str = "text"
    skipped: dict[str, int] = field(default_factory=dict)
    root: str = ""  # what stands before the names of its files, for a person
    first_rows: tuple[int, ...] = ()  # of a data set: which of its rows the first one of each file is
    known_identity: str = ""
    digests: dict[str, Digest] = field(default_factory=dict)  # of its files, by path, once that is known
    allow_dropped: float = ALLOWED

    @property
    def size(self) -> int:
        """Bytes on disk of all files."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Piece:
    """A part of one file.

    Bytes of lines, row groups (`parquet`) or rows (`arrow`), start <= i < stop; all of any other file.
    """

    file: int
    start: int
    stop: int
    size: int


def tokenized_folder(path: str | Path | None) -> Path | None:
    """The path if it is the output of `hlat data tokenize`, whole or damaged, else None.

    A manifest.json that does not say it is one of ours is a user's own file. One that cannot be read at all
    counts as ours where shards lie beside it.
    """
    folder = expand(path) if path else None
    if folder is None or not (folder / MANIFEST).is_file():
        return None
    try:
        content = json_text.loads((folder / MANIFEST).read_bytes())
        ours = isinstance(content, dict) and content.get("format") == FORMAT
    except ValueError:
        ours = any(folder.glob("*-[0-9][0-9][0-9][0-9][0-9].docs"))
    except OSError:
        ours = True  # where it is opened, this is told
    return folder if ours else None


def resolve_source(
    *,
    path: str | Path | None = None,
    dataset: str | None = None,
    text_field: str = "text",
    allow_dropped: float = ALLOWED,
    where: str = "source",
) -> Source:
    """The files of a source.

    Args:
        path: a file or a folder (read recursively, in sorted order).
        dataset: `python-stdlib`, or a Hugging Face dataset `name[:config][@split]` (split `train` unless
            given; extra `data`).
        text_field: the column or key that holds the text of JSON, parquet and arrow records.
        allow_dropped: see `Source`.
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
    source.text_field, source.allow_dropped = text_field, allow_dropped
    if not source.files:
        reasons = ", ".join(f"{count} {reason}" for reason, count in source.skipped.items())
        raise UserError(
            f"no text in '{source.label}'" + (f" ({reasons})" if reasons else ""),
            where=where,
            fix="name a folder or file that holds text",
        )
    note(source)
    return source


def identity(source: Source, quiet: bool = False) -> str:
    """Hash (hex sha256) of what the source holds: kind, size and bytes of its files, in their order, and
    which rows of them it takes where those are not all. Neither their names nor where they lie enter.

    Files are read once (see `hlat.storage.digests`). Raises UserError for one that cannot be read, or that
    changes while it is read.
    """
    if not source.known_identity:
        source.known_identity = _content(source, quiet)
    return source.known_identity


def refuse_changed(sources: Sequence[Source], doing: str, reading: Reading) -> None:
    """Raise UserError unless all that was read of the sources, which is `reading`, is what `identity` said
    before: what was made of it is called by that. A file that changed and changed back is noticed.
    """
    for source in sources:
        before = identity(source)
        for path, digest in source.digests.items():
            try:
                same = reading.tree(path, digest.size) == digest.tree
            except OSError as error:
                raise changed(path, doing) from error
            if not same:
                forget([path])
                raise changed(path, doing)
        if _content(source, quiet=True) != before:
            raise changed(source.label, doing)


def _content(source: Source, quiet: bool) -> str:
    done = 0
    with tokenizing(f"reading {source.label}", quiet or source.size < _SHOW_ABOVE) as bar:

        def advance(size: int) -> None:
            nonlocal done
            done += size
            bar.update(done, source.size)

        paths = [file.path for file in source.files]
        digests = looked_at(paths, advance)
    source.digests = dict(zip(paths, digests, strict=True))
    files = [
        [file.kind, file.size, digest.whole, *([file.start, file.stop] if file.stop >= 0 else [])]
        for file, digest in zip(source.files, digests, strict=True)
    ]
    return digest_of({"reading": READING, "text_field": source.text_field, "files": files})


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
    from hlat.data.readers import pieces_of

    yield from (Piece(index, start, stop, size) for start, stop, size in pieces_of(file, wanted))


def _from_path(path: Path, where: str) -> Source:
    try:
        if path.is_file():
            size = path.stat().st_size
            files = [InputFile(str(path.absolute()), path.name, kind_of(path.name), size)] if size else []
            skipped = {} if size else {"empty file": 1}
            return Source(str(path), files, skipped=skipped, root=os.path.dirname(path))
        return _from_folder(path, str(path), python_only=False, where=where)
    except OSError as error:
        raise UserError(
            f"'{path}' cannot be read ({error.strerror})", where=where, fix="make it readable"
        ) from error


def _from_folder(root: Path, label: str, python_only: bool, where: str = "") -> Source:
    found: list[tuple[tuple[str, int], InputFile]] = []  # with what they are sorted by
    skipped: dict[str, int] = {}

    def skip(reason: str, count: int = 1) -> None:
        if count:
            skipped[reason] = skipped.get(reason, 0) + count

    def take(folder: str, name: str, place: tuple[str, int] | None = None) -> None:
        path = os.path.join(folder, name)
        if size := os.path.getsize(path):
            relative = os.path.relpath(path, root).replace(os.sep, "/")
            file = InputFile(os.path.abspath(path), relative, kind_of(name), size)
            found.append((place or (relative, 0), file))
        else:
            skip("empty file")

    def failed(error: OSError) -> None:
        raise error

    for folder, subfolders, names in os.walk(root, onerror=failed):
        if not python_only and (saved := _saved(Path(folder), names, where)) is not None:
            inside = os.path.relpath(folder, root).replace(os.sep, "/") + "/"
            for number, name in enumerate(saved):
                take(folder, name, (inside, number))
            skip("description of a saved data set", 2)
            skip("not part of the saved data set", len({*names, *subfolders} - {STATE, INFO, *saved}))
            subfolders.clear()
            continue
        for name in list(subfolders):
            reason = _folder_reason(folder, name, python_only)
            if reason:
                subfolders.remove(name)
                skip(reason)
        for name in names:
            if python_only and not name.endswith(".py"):
                continue
            if name.startswith("."):
                skip("hidden file")
            elif not os.path.isfile(os.path.join(folder, name)):
                skip("not a regular file")
            else:
                take(folder, name)
    found.sort(key=lambda entry: entry[0])
    files = [file for _, file in found]
    return Source(label, files, skipped=dict(sorted(skipped.items())), root=str(root))


def _saved(folder: Path, names: Sequence[str], where: str) -> list[str] | None:
    """The arrow files of the data set that was saved to this folder; None if none was. Raises UserError for
    one of several splits.
    """
    if SPLITS_FILE in names and (splits := saved_splits(folder)) is not None:
        first = next(iter(splits), "train")
        raise UserError(
            f"'{folder}' holds several splits", where=where, fix=f"name one, such as '{folder / first}'"
        )
    return saved_files(folder, where) if STATE in names and INFO in names else None


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
    near = [STDLIB] if name in STDLIB else near
    if near and "/" not in name:
        raise UserError(f"no data set '{dataset}'", where=where, fix=f"did you mean '{near[0]}'?")


def _huggingface(dataset: str, where: str) -> Source:
    files, first, taken = [], [], 0
    for path, start, stop, total in load_rows(dataset, where):
        size, name = os.path.getsize(path), os.path.basename(path)
        if stop - start == total:
            files.append(InputFile(path, name, "arrow", size))
        elif stop > start:
            share = max(size * (stop - start) // total, 1)
            files.append(InputFile(path, name, "arrow", share, start, stop))
        else:
            continue
        first.append(taken)
        taken += stop - start
    return Source(dataset, files, first_rows=tuple(first))
