"""A conversation as the text that a chat template makes of it: where the answers are in it, what is quoted.

Special tokens that a message spells are found again behind the template by marks put around them, as
`transformers` does it (`sanitize_control_tokens`). A message that spells none is rendered as it is.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[Messages, bool], str]
"""The text of messages, with or without the beginning of an answer after it. Raises whatever it raises."""

ANSWERS = ("assistant", "model")
"""Roles whose turns are learned."""
_REASONED = "</think>"
# Between characters that Unicode keeps out of texts; digits, which no filter changes.
_NONCE = str(10**24 + secrets.randbelow(10**24))
_MARKS = tuple(f"\ufdd0{_NONCE}{kind}\ufdd1" for kind in range(6))
QUOTED, GENERATED, ANSWER = _MARKS[0:2], _MARKS[2:4], _MARKS[4:6]
_MARK = re.compile(f"\ufdd0{_NONCE}([0-5])\ufdd1")


class Unclear(ValueError):
    """A conversation that cannot be learned from; says why."""


@dataclass(frozen=True)
class Laid:
    """A conversation's text. `quotes` and `spans` are the places (first character, one after the last) of
    what messages spell of special tokens, and of what is to be learned.
    """

    text: str
    quotes: list[tuple[int, int]]
    spans: list[tuple[int, int]]


class Layout:
    """Lays conversations out.

    Args:
        render: of the template, in which `{% generation %}` is marked with GENERATED.
        tagged: whether the template has that.
        control: texts of the special tokens.
    """

    def __init__(self, render: Render, tagged: bool, control: Sequence[str]) -> None:
        self._render, self._tagged = render, tagged
        longest_first = sorted(filter(None, control), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._heads = {text[:n] for text in longest_first for n in range(1, len(text))}
        self._tails = {text[n:] for text in longest_first for n in range(1, len(text))}
        self._longest = max(map(len, longest_first), default=0)

    def __call__(self, messages: Messages) -> Laid:
        """Raises Unclear; also what the template raises."""
        hidden = [self._hidden(message) for message in messages]
        text, found = read_marks(self._render(hidden, False))
        quotes = _places(found, 0, "the chat template takes a special token apart that a message spells")
        if self._tagged:
            broken = "the chat template's generation blocks do not follow each other"
            spans = [span for span in _places(found, 2, broken) if span[0] < span[1]]
        else:
            spans = [
                self._span(hidden, number, text, quotes)
                for number, message in enumerate(hidden)
                if message.get("role") in ANSWERS
            ]
        if not spans:
            raise Unclear("no assistant turn")
        if any(a[1] > b[0] for a, b in zip(spans, spans[1:], strict=False)):
            raise Unclear("the chat template does not show its turns in order")
        return Laid(text, quotes, spans)

    def _span(
        self, messages: Messages, number: int, text: str, quotes: Sequence[tuple[int, int]]
    ) -> tuple[int, int]:
        """Where turn `number` is answered: from the end of what is shown before it, where an answer is asked
        for, to its last special token. Found by what the template makes of fewer messages, or where that is
        no beginning of the whole, by marks around the answer.
        """
        begin = self._beginning(messages[:number], text, True)
        end = self._beginning(messages[: number + 1], text, False)
        if begin is None or end is None or begin >= end:
            start, end = self._marked(messages, number, text)
            begin = start if begin is None or begin > start else begin
            ending = re.compile(rf"\s*(?:{self._control.pattern})").match(text, end)
            if ending and not _overlaps(quotes, *ending.span()):
                return begin, ending.end()
            return begin, end
        end = begin + len(text[begin:end].rstrip())
        if begin == end:
            raise Unclear("empty answer")
        return begin, end

    def _beginning(self, messages: Messages, text: str, ask: bool) -> int | None:
        """Length of what the template makes of some messages, if the whole text begins with that."""
        try:
            begun, _ = read_marks(self._render(messages, ask))
        except Exception:  # a template may refuse what is no whole conversation
            return None
        return len(begun) if text.startswith(begun) else None

    def _marked(self, messages: Messages, number: int, text: str) -> tuple[int, int]:
        content = messages[number].get("content")
        if isinstance(content, str):
            for hidden, shown in _shown(content):
                changed = {**messages[number], "content": f"{hidden}{ANSWER[0]}{shown}{ANSWER[1]}"}
                raw = self._render([*messages[:number], changed, *messages[number + 1 :]], False)
                same, found = read_marks(raw)
                places = [place for kind, place in found if kind >= 4]
                if same == text and len(places) == 2 and places[0] < places[1]:
                    return places[0], places[1]
        raise Unclear("the chat template does not show where the answer is: mark it with {% generation %}")

    def _hidden(self, message: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value if key == "role" else self.hide(value) for key, value in message.items()}

    def hide(self, value: Any) -> Any:
        """The value with marks around the special tokens that its texts spell, also those of which a text has
        the beginning at its end or the end at its beginning.
        """
        if isinstance(value, Mapping):
            if any(self._control.search(str(key)) for key in value):
                raise Unclear("a key of a message spells a special token")
            return {key: self.hide(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(part) for part in value]
        if not isinstance(value, str):
            return value
        value = _MARK.sub("", value)
        first = next((n for n in range(self._longest, 0, -1) if value[:n] in self._tails), 0)
        last = next(
            (n for n in range(self._longest, 0, -1) if n <= len(value) and value[-n:] in self._heads), 0
        )
        spans = [
            (0, first),
            *(m.span() for m in self._control.finditer(value)),
            (len(value) - last, len(value)),
        ]
        return _around(value, [span for span in spans if span[0] < span[1]])


def _shown(content: str) -> Iterator[tuple[str, str]]:
    """What a template may leave out of an answer, and show of it: many trim it, some omit its reasoning."""
    before, end, answer = content.rpartition(_REASONED)
    for hidden, shown in (("", content), *([(before + end, answer)] if end else [])):
        yield hidden, shown
        yield hidden, shown.strip()


def _around(value: str, spans: Sequence[tuple[int, int]]) -> str:
    """The text with marks around these places; those that meet become one."""
    parts, done = [], 0
    for first, end in _merged(spans):
        parts += [value[done:first], QUOTED[0], value[first:end], QUOTED[1]]
        done = end
    return "".join([*parts, value[done:]])


def _merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for first, end in sorted(spans):
        if out and first <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((first, end))
    return out


def read_marks(raw: str) -> tuple[str, list[tuple[int, int]]]:
    """A text without its marks; the kind and place of each. Raises Unclear for one that was changed."""
    parts, found, done, length = [], [], 0, 0
    for match in _MARK.finditer(raw):
        parts.append(raw[done : match.start()])
        length += match.start() - done
        found.append((int(match[1]), length))
        done = match.end()
    text = "".join([*parts, raw[done:]])
    if _NONCE in text:
        raise Unclear("the chat template takes a special token apart that a message spells")
    return text, found


def _places(found: Sequence[tuple[int, int]], kind: int, broken: str) -> list[tuple[int, int]]:
    """Pairs of the places of marks `kind` and `kind + 1`. Raises Unclear(broken) for another order."""
    own = [(mark, place) for mark, place in found if mark in (kind, kind + 1)]
    if [mark for mark, _ in own] != [kind, kind + 1] * (len(own) // 2):
        raise Unclear(broken)
    places = [place for _, place in own]
    return list(zip(places[::2], places[1::2], strict=True))


def _overlaps(quotes: Sequence[tuple[int, int]], first: int, end: int) -> bool:
    return any(a < end and first < b for a, b in quotes)
