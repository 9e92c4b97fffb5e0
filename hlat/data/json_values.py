"""Values of JSON files: one a line, or one after the other, or the elements of an array.

Whatever the bytes are, each value or line comes back, or the reason why it does not; memory is bounded by the
longest value.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from hlat.data.formats import BOM, container, in_lines

LONGEST = 2**31
"""Bytes of a line or value that are read into memory at most."""
_PEEK, _CHUNK = 1 << 16, 1 << 20
_NEAR = 16  # characters: what is wrong so close to the end of a part may be a word that is cut off
_SPACE = " \t\r\n"
_FATAL = ("not JSON", "nested too deep", "too long")  # where such a value ends is not known


class Value(NamedTuple):
    """A JSON value, or None and the `reason` it is left out. `place`: number from 1 of its line or value;
    `size`: the bytes that are left out where that may be more than one value, else 0.
    """

    place: int
    value: Any
    reason: str
    size: int


def values_of(stream: BinaryIO, layout: str) -> Iterator[Value]:
    """The values of a decompressed stream.

    Args:
        stream: at its beginning.
        layout: `jsonl` for one value a line, whatever a line holds; `json` for an array, values of several
            lines, or one a line.
    """
    head = stream.read(_PEEK)
    what = container(head)
    if what:
        yield Value(1, None, what, len(head) + _skip(stream))
        return
    rest = _Joined(head.removeprefix(BOM), stream)
    if in_lines(head) and (layout == "jsonl" or _first_line_is_whole(rest)):
        yield from _lines(rest)
    else:
        yield from _Values(rest)


def one_a_line(stream: BinaryIO) -> bool:
    """Whether `values_of` reads a decompressed stream of layout `json`, at its beginning, line by line."""
    head = stream.read(_PEEK)
    return in_lines(head) and _first_line_is_whole(_Joined(head.removeprefix(BOM), stream))


def lines_of(stream: Any, room: int | None = None) -> Iterator[tuple[int, bytes | None]]:
    """(bytes, line) of a stream's lines that start within its next `room` bytes; None for a line too long to
    be read.
    """
    used = 0
    while room is None or used < room:
        line = stream.readline(LONGEST)
        size = len(line)
        if not line:
            return
        if size == LONGEST and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(_CHUNK)
                size += len(line)
            line = None
        used += size
        yield size, line


def parsed(line: bytes) -> tuple[Any, str]:
    """(value, "") of one line of JSON, or (None, reason)."""
    try:
        text = line.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError:
        return None, "not UTF-8"
    try:
        return _decoded(text)[0], ""
    except json.JSONDecodeError:
        return None, "not JSON"
    except RecursionError:
        return None, "nested too deep"


def lookup(record: Any, field: str) -> Any:
    """The value of a field; `a.b` is the field b of the object a unless there is a field of that whole name.

    None where there is none.
    """
    while isinstance(record, dict):
        if field in record:
            return record[field]
        head, dot, field = field.partition(".")
        record = record.get(head) if dot else None
    return None


def text_fields(record: Any, prefix: str = "", depth: int = 4) -> list[str]:
    """The fields of a record that hold text, as `lookup` takes them."""
    found: list[str] = []
    for name, value in record.items() if isinstance(record, dict) else ():
        if isinstance(value, str):
            found.append(f"{prefix}{name}")
        elif isinstance(value, dict) and depth:
            found += text_fields(value, f"{prefix}{name}.", depth - 1)
    return found


def _lines(stream: Any) -> Iterator[Value]:
    for number, (size, line) in enumerate(lines_of(stream), 1):
        if line is None:
            yield Value(number, None, "too long", size)
        elif line.strip():
            yield Value(number, *parsed(line), 0)


def _skip(stream: BinaryIO) -> int:
    size = 0
    while chunk := stream.read(_CHUNK):
        size += len(chunk)
    return size


def _first_line_is_whole(stream: _Joined) -> bool:
    """Whether the first line that is not blank is a JSON value, so that the others may be too. The stream is
    put back.
    """
    seen = b""
    while line := stream.readline(LONGEST):
        seen += line
        if line.strip():
            break
    stream.put_back(seen)
    return not parsed(line)[1] if line else True


def _whole_number(digits: str) -> int | float:
    """A number of any length: Python makes no int of more than 4300 digits."""
    try:
        return int(digits)
    except ValueError:
        return float(digits)


_strict, _lenient = json.JSONDecoder(), json.JSONDecoder(parse_int=_whole_number)


def _decoded(text: str, start: int = -1) -> tuple[Any, int]:
    """(value, end) of the JSON that begins at `start`, or that is the whole text. Raises JSONDecodeError,
    RecursionError.
    """
    for decoder in (_strict, _lenient):
        try:
            return (decoder.decode(text), len(text)) if start < 0 else decoder.raw_decode(text, start)
        except json.JSONDecodeError:
            raise
        except ValueError:
            continue
    raise AssertionError("a lenient decoder refuses no number")


class _Joined:
    """Bytes that were looked at already, and the stream they are from."""

    def __init__(self, head: bytes, stream: BinaryIO) -> None:
        self._head, self._stream = head, stream

    def put_back(self, content: bytes) -> None:
        self._head = content + self._head

    def readline(self, limit: int) -> bytes:
        end = self._head.find(b"\n", 0, limit) + 1 or min(limit, len(self._head))
        line, self._head = self._head[:end], self._head[end:]
        if line.endswith(b"\n") or end == limit:
            return line
        return line + self._stream.readline(limit - end)

    def read(self, size: int) -> bytes:
        if self._head:
            content, self._head = self._head[:size], self._head[size:]
            return content
        return self._stream.read(size)


class _Values:
    """JSON values one after the other; of an array its elements.

    After a value that is no JSON, the next one is taken to begin at the next line that begins with a brace,
    which lines within a value, being indented, do not; in an array there is no such place, and the rest is
    left out.
    """

    def __init__(self, stream: _Joined) -> None:
        self._stream, self._text, self._at, self._ended = stream, "", 0, False
        self._carry, self._place = b"", 0

    def __iter__(self) -> Iterator[Value]:
        while self._find():
            if self._text[self._at] == "[":
                self._at += 1
                yield from self._elements()
                continue
            value, reason = self._value()
            yield self._next(value, reason, self._skipped(reason in _FATAL, "\n{"))

    def _elements(self) -> Iterator[Value]:
        while self._find():
            if self._text[self._at] == "]":
                self._at += 1
                return
            value, reason = self._value()
            yield self._next(value, reason, self._skipped(reason in _FATAL))
            if reason in _FATAL:
                return
            if not self._find():
                break
            if self._text[self._at] == ",":
                self._at += 1
            elif self._text[self._at] != "]":
                yield self._next(None, "not JSON", self._skipped(True))
                return
        yield self._next(None, "not JSON: an array that is cut off", 0)

    def _next(self, value: Any, reason: str, size: int) -> Value:
        self._place += 1
        return Value(self._place, value, reason, size)

    def _find(self) -> bool:
        """Go on to the next character that is not blank; False at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return True
            if not self._more(_CHUNK):
                return False

    def _more(self, size: int) -> bool:
        """Drop what is done and read on; False at the end. Bytes that are not UTF-8 become surrogates."""
        if self._ended:
            return False
        content = self._carry + self._stream.read(size)
        self._ended = len(content) == len(self._carry)
        # A character may be cut off at the end of the part: its bytes wait for the next one.
        cut = 0 if self._ended else _unfinished(content)
        self._carry = content[len(content) - cut :]
        text = content[: len(content) - cut].decode("utf-8", "surrogateescape")
        self._text, self._at = self._text[self._at :] + text, 0
        return not self._ended or bool(text)

    def _value(self) -> tuple[Any, str]:
        """(value, "") of the value that begins here, or (None, reason). More is read as long as it may only
        be cut off, twice as much each time.
        """
        while True:
            reason = ""
            try:
                value, end = _decoded(self._text, self._at)
                if end < len(self._text) - 1 or self._ended:
                    return self._taken(value, end)
            except json.JSONDecodeError as error:
                near = error.pos >= len(self._text) - _NEAR or error.msg.startswith("Unterminated string")
                reason = "" if near and not self._ended else "not JSON"
            except RecursionError:
                reason = "nested too deep"
            pending = len(self._text) - self._at
            if not reason and pending > LONGEST:
                reason = "too long"
            if reason:
                return None, reason
            self._more(max(_CHUNK, pending))

    def _taken(self, value: Any, end: int) -> tuple[Any, str]:
        source = self._text[self._at : end]
        self._at = end
        try:
            source.encode("utf-8")
        except UnicodeEncodeError:
            return None, "not UTF-8"
        return value, ""

    def _skipped(self, broken: bool, mark: str = "") -> int:
        """Go on after a broken value: to the next `mark`, and past its first character, or to the end.
        Returns the bytes that were skipped.
        """
        size = 0
        while broken:
            found = self._text.find(mark, self._at) if mark else -1
            if found >= 0 or self._ended or not mark:
                last = found + 1 if found >= 0 else len(self._text)
            else:
                last = max(self._at, len(self._text) - len(mark) + 1)  # the mark may be cut in two
            size += _size(self._text[self._at : last])
            self._at = last
            broken = found < 0 and not self._ended
            if broken:
                self._more(_CHUNK)
        return size


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))


def _unfinished(content: bytes) -> int:
    """How many bytes at the end are the beginning of a UTF-8 character that goes on."""
    for back in range(1, min(4, len(content) + 1)):
        byte = content[-back]
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return back if back < length else 0
        if byte < 0x80:
            return 0
    return 0
