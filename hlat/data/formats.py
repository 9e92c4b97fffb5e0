"""How a file is read: by its name, and by its first bytes where these say something else.

The name tells what is inside (text, JSON, columns), the first bytes whether it is compressed: `x.jsonl.gz`
that a download has already unpacked is read as it is, and `x.jsonl` that is gzipped is unpacked. Archives,
and whatever else is no text, are called by their name.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO, NamedTuple

from hlat.errors import UserError, missing_extra
from hlat.storage.blocks import open_file

FileKind = str
"""`text`, `jsonl`, `json`, `parquet` or `arrow`; the first three also with `.gz`, `.bz2`, `.xz` or `.zst`."""

READING = 2  # to be raised when the same bytes are read another way: tokens in caches are called by it
RECORDS = ".jsonl, .json, .parquet or .arrow file"
BOM = b"\xef\xbb\xbf"
HEAD_BYTES = 512
_LAYOUTS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_SUFFIXES = {".gz": "gz", ".gzip": "gz", ".bz2": "bz2", ".xz": "xz", ".zst": "zst", ".zstd": "zst"}
_PACKED = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zst"}
_CONTAINERS = (
    (0, b"PK\x03\x04", "zip archive: unpack it first"),
    (0, b"PK\x05\x06", "zip archive: unpack it first"),
    (257, b"ustar", "tar archive: unpack it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "7z archive: unpack it first"),
    (0, b"Rar!\x1a\x07", "rar archive: unpack it first"),
    (0, b"\x04\x22\x4d\x18", "lz4: compress it with gzip or zstd instead"),
    (0, b"PAR1", "compressed parquet file: unpack it first"),
    (0, b"ARROW1", "compressed arrow file: unpack it first"),
    (0, b"%PDF-", "PDF: extract its text first"),
    (0, b"SQLite format 3\0", "SQLite database: export its text first"),
    (0, b"\x89HDF", "HDF5 file: export its text first"),
    (0, b"Obj\x01", "Avro file: convert it to parquet first"),
    (0, b"ORC", "ORC file: convert it to parquet first"),
    (0, b"\x93NUMPY", "NumPy array: export its text first"),
)


class Form(NamedTuple):
    """How a file is read: `layout` (text, jsonl, json, parquet, arrow) and `packing` (gz, bz2, xz, zst, or
    empty).
    """

    layout: str
    packing: str


def kind_of(name: str) -> FileKind:
    """The kind of a file by its name; whatever has no suffix known here is plain text."""
    stem, packing = name.lower(), ""
    for suffix, found in _SUFFIXES.items():
        if stem.endswith(suffix):
            stem, packing = stem.removesuffix(suffix), f".{found}"
            break
    layout = next((layout for suffix, layout in _LAYOUTS.items() if stem.endswith(suffix)), "text")
    if packing and layout in ("parquet", "arrow"):
        layout = "text"  # its first bytes will tell what it is
    return layout + packing


def form_of(path: str, kind: FileKind) -> Form:
    """How a file of this kind is read, after a look at its first bytes. Raises UserError if it cannot be
    opened.
    """
    with reading(path), open_file(path) as stream:
        head = stream.read(HEAD_BYTES)
        if head.startswith(b"PAR1") and stream.seek(-4, io.SEEK_END) and stream.read() == b"PAR1":
            return Form("parquet", "")
    layout = kind.partition(".")[0]
    if head.startswith(b"ARROW1\0\0"):
        return Form("arrow", "")
    if layout in ("parquet", "arrow"):
        return Form(layout, "")
    packing = packing_of(head)
    if layout == "jsonl" and not packing and not in_lines(head):
        layout = "json"
    return Form(layout, packing)


def packing_of(head: bytes) -> str:
    """The compression whose files begin like this, or an empty text."""
    found = next((name for magic, name in _PACKED.items() if head.startswith(magic)), "")
    if not found and head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50:
        return "zst"  # it begins with a frame that is to be skipped, as pzstd and seekable zstd write it
    return "" if found == "bz2" and head[4:10] not in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90") else found


def in_lines(head: bytes) -> bool:
    """Whether JSON that begins like this can be one record a line: it is no array, and its first line no
    lone brace.
    """
    start = head.removeprefix(BOM).lstrip()
    return not start.startswith(b"[") and start.partition(b"\n")[0].strip() != b"{"


def container(head: bytes) -> str:
    """What a file is that begins like this and holds no text, with what to do about it; else empty."""
    head = head[:HEAD_BYTES]
    try:
        head[: HEAD_BYTES - 4].decode("utf-8")  # a character may be cut off at the end
        if b"\0" not in head:
            return ""
    except UnicodeDecodeError:
        pass
    if packing_of(head):
        return "compressed twice: unpack it once"
    if b"\0" in head and head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16: convert it to UTF-8"
    return next((what for at, magic, what in _CONTAINERS if head.startswith(magic, at)), "")


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what goes wrong while a file is read into a UserError that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        fix = "repair or remove the file"
        if isinstance(error, EOFError) or "Truncated" in str(error):
            reason, fix = "it is compressed, and cut off", "fetch or make the file again, or remove it"
        elif "too much memory" in str(error):
            reason, fix = "its zstd window is above 128 MiB", "compress it again without --long"
        raise UserError(f"cannot be read ({reason})", where=path, fix=fix) from error


@contextmanager
def opened(path: str, packing: str) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed; all members or frames of it, one after the other.

    Raises UserError (see `reading`), also for one that is cut off, and for zstd without the package that
    reads it.
    """
    with reading(path), open_file(path) as packed, ExitStack() as stack:
        stream: Any = packed
        if packing == "gz":
            stream = stack.enter_context(gzip.GzipFile(fileobj=packed))
        elif packing == "bz2":
            stream = stack.enter_context(bz2.BZ2File(packed))
        elif packing == "xz":
            stream = stack.enter_context(lzma.LZMAFile(packed))
        elif packing == "zst":
            stream = stack.enter_context(_zstd(path, packed))
        yield stream


def _zstd(path: str, packed: BinaryIO) -> io.BufferedReader:
    try:
        import pyarrow
    except ImportError as error:
        raise missing_extra("pyarrow", "data", f"reading '{path}'") from error
    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, "r"), "zstd")
    return io.BufferedReader(stream, 1 << 20)
