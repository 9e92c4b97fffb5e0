"""A rank's output as it arrives, without secrets: also those that two pieces of it share."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from hlat.observe.redact import HANGING, HIDDEN, PEM_BEGIN, PEM_END, redact
from hlat.observe.secrets import known

LONGEST_LINE = 1 << 20  # bytes; a longer one is cut
_WORD = 4096  # bytes at a cut that may be half a secret
_KEY = 16384  # characters of a private key without an end
_BLANK = re.compile(rb"\s")


class Cleaner:
    """Takes the bytes of one stream, gives back what may be shown of them: whole lines, as far as the lines
    before the end are known to hold no half of a secret. Bytes that are not UTF-8 stay as they are.

    Args:
        environ: whose secret variables are looked for; default: this process's.
    """

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        self._environ = os.environ if environ is None else environ
        self._held = b""
        self._cut = 0  # bytes left out of the line that goes on
        self._in_key = 0  # characters that a private key may still have
        self._torn = False  # the next bytes begin in the middle of a line
        self._open = False  # what was shown last is no whole line

    @property
    def held(self) -> int:
        """Bytes that wait for what comes next."""
        return len(self._held)

    def feed(self, data: bytes, last: bool = False) -> bytes:
        """What may be shown now. `last`: nothing follows, so that all is shown."""
        if self._torn:  # what is left of the line may begin with half a secret
            end = _line_end(data, first=True)
            if not end and not last:
                return b""
            data, self._torn = data[end:], False
        data = self._held + data
        end = len(data) if last else _line_end(data)
        whole, self._held = self._shorten(data[:end]), data[end:]
        if len(self._held) > LONGEST_LINE:
            whole += self._begin_cut()
        if last and self._cut:
            whole, self._cut = whole + _told(self._cut), 0
        text = whole.decode(errors="surrogateescape")
        back = 0 if last else self._undecided(text)
        shown, kept = (text[:-back], text[-back:]) if back else (text, "")
        self._held = kept.encode(errors="surrogateescape") + self._held
        clean = self._without_key(shown).encode(errors="surrogateescape")
        self._open = not clean.endswith((b"\n", b"\r")) if clean else self._open
        return clean

    def skip(self) -> bytes:
        """Bytes are missing before the next ones. Returns what may be shown of those before them."""
        held, self._held = self._held, b""
        self._cut = 0
        shown = self.feed(held[: _line_end(held)], last=True)
        self._torn = True
        end = b"\n" if self._open else b""
        self._open = False
        return shown + end

    def _undecided(self, text: str) -> int:
        """Characters at the end, from the beginning of a line, that what follows may turn into a secret."""
        back = known(self._environ).begun(text)
        hanging = HANGING.search(text, max(0, len(text) - 256))
        back = max(back, len(text) - hanging.start() if hanging else 0)
        return len(text) - (text.rfind("\n", 0, len(text) - back) + 1) if back else 0

    def _without_key(self, text: str) -> str:
        """Redacted, and without the rest of a private key that has begun before."""
        before = ""
        if self._in_key and text:
            end = PEM_END.search(text[: self._in_key + 128])
            hidden = end.end() if end else min(len(text), self._in_key)
            self._in_key = 0 if end else self._in_key - hidden
            before, text = HIDDEN if end else "", text[hidden:]
        begins = [match.end() for match in PEM_BEGIN.finditer(text)]
        if begins and not PEM_END.search(text, begins[-1]):
            self._in_key = max(0, _KEY - (len(text) - begins[-1]))
            return f"{before}{redact(text, self._environ)}" + ("\n" if text.endswith("\n") else "")
        return f"{before}{redact(text, self._environ)}"

    def _begin_cut(self) -> bytes:
        """Of a line that has no end yet and is too long: its beginning, once."""
        line, self._held = self._held, b""
        if self._cut:
            self._cut += len(line)
            return b""
        kept = _head(line)
        self._cut = len(line) - len(kept)
        return kept

    def _shorten(self, data: bytes) -> bytes:
        """Lines that are too long, without their ends."""
        if not self._cut and len(data) <= LONGEST_LINE:
            return data
        parts = []
        for line in data.splitlines(keepends=True):
            text = line.rstrip(b"\r\n")
            end = line[len(text) :]
            if self._cut:
                parts += [_told(self._cut + len(text)), end]
                self._cut = 0
            elif len(text) > LONGEST_LINE:
                kept = _head(text)
                parts += [kept, _told(len(text) - len(kept)), end]
            else:
                parts.append(line)
        return b"".join(parts)


def _told(count: int) -> bytes:
    return f" [hlat: {count:,} bytes of this line left out]".encode()


def _head(line: bytes) -> bytes:
    """The beginning of a line, up to a blank: half a word may be half a secret."""
    room = line[: LONGEST_LINE - _WORD]
    blanks = [match.start() for match in _BLANK.finditer(line, len(room), LONGEST_LINE)]
    return line[: blanks[-1]] if blanks else room


def _line_end(data: bytes, first: bool = False) -> int:
    """Where the last (or first) line ends that has an end, 0 for none. Progress bars end theirs with a
    carriage return.
    """
    if first:
        ends = [at for at in (data.find(b"\n"), data.find(b"\r")) if at >= 0]
        return min(ends, default=-1) + 1
    return max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
