"""Text of which parts are quoted: they come from a record, the rest is the template's own.

A special token that a template spells is meant as one. The same characters in a record are text that somebody
wrote: taken as a token they would end a turn, or begin one of another speaker.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Span = tuple[int, int]
"""First character and the one after the last."""


@dataclass(frozen=True)
class Quoted:
    """A text and the places of its quoted parts: ascending, not empty, apart from each other."""

    text: str
    quotes: tuple[Span, ...] = ()

    @classmethod
    def of(cls, text: str) -> Quoted:
        """A text that is quoted as a whole."""
        return cls(text, ((0, len(text)),) if text else ())

    @classmethod
    def joined(cls, parts: Iterable[Quoted]) -> Quoted:
        """One text of several."""
        texts: list[str] = []
        quotes: list[Span] = []
        length = 0
        for part in parts:
            for first, end in part.quotes:
                if quotes and quotes[-1][1] == first + length:
                    first = quotes.pop()[0] - length
                quotes.append((first + length, end + length))
            texts.append(part.text)
            length += len(part.text)
        return cls("".join(texts), tuple(quotes))

    def __add__(self, other: Quoted) -> Quoted:
        return Quoted.joined((self, other))

    def part(self, first: int, end: int | None = None) -> Quoted:
        """The characters from `first` to before `end`."""
        end = len(self.text) if end is None else end
        inside = ((max(a, first) - first, min(b, end) - first) for a, b in self.quotes)
        return Quoted(self.text[first:end], tuple((a, b) for a, b in inside if a < b))

    def touches(self, first: int, end: int) -> bool:
        """Whether any of these characters is quoted."""
        return any(a < end and first < b for a, b in self.quotes)
