"""Text on its way to a terminal, which would act on control characters: a file name, a generated text or an
error must not move the cursor, rename the window, write to the clipboard or turn a line around.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

# C0 but for tabs and line ends, DEL, C1; what turns text around or ends lines in Unicode; halves of pairs,
# among them bytes of file names that are not UTF-8.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\U000e0000-\U000e007f"
    "\ud800-\udfff]"
)


_MOVES = re.compile(r"(?:\n|\x1b\[A)+")  # from one bar of progress to the next


def escaped(text: str) -> str:
    r"""The text with control characters as `\x1b` or `\u202e`; line ends and tabs stay. A byte of a file name
    that is not UTF-8 is shown as `\xff`.
    """
    return _CONTROL.sub(_escape, text) if _CONTROL.search(text) else text


def one_line(text: str) -> str:
    r"""The same in one line: line ends as `\n`, tabs as `\t`."""
    return escaped(text).replace("\n", r"\n").replace("\t", r"\t")


class Guarded:
    """A text stream whose `write` escapes; all else is the stream's own.

    Args:
        stream: where it goes.
        bars: a library's bars of progress stay: what is written may begin with a carriage return, or be
            nothing but moves from line to line.
    """

    def __init__(self, stream: TextIO, bars: bool = False) -> None:
        self.unguarded, self._bars = stream, bars

    def write(self, text: str) -> int:
        """Write it escaped."""
        if self._bars and _MOVES.fullmatch(text):
            self.unguarded.write(text)
        elif self._bars and text.startswith("\r"):
            self.unguarded.write(f"\r{escaped(text[1:])}")
        else:
            self.unguarded.write(escaped(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unguarded, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.unguarded)


def unguarded(stream: Any) -> Any:
    """The stream below: for a library that draws with control characters and escapes what it is given, and
    for text that goes to another program as it is.
    """
    return stream.unguarded if isinstance(stream, Guarded) else stream


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Inside, what is printed to stdout and stderr is escaped."""
    out, err = sys.stdout, sys.stderr
    mine: tuple[Any, Any] = (Guarded(unguarded(out)), Guarded(unguarded(err), bars=True))
    sys.stdout, sys.stderr = mine
    try:
        yield
    finally:
        if sys.stdout is mine[0]:
            sys.stdout = out
        if sys.stderr is mine[1]:
            sys.stderr = err


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte, as Python keeps it in a name
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
