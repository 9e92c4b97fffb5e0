"""Values of secret variables in a text: as they are, in the forms libraries print them in, and broken by the
ends of lines.
"""

from __future__ import annotations

import base64
import bisect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import accumulate
from urllib.parse import quote, quote_plus

HIDDEN = "***"
LEAST = 8  # characters: a shorter value would be found in innocent text
_LEAST_CODED = 12  # characters of a value whose base64 is looked for
_LEAST_SHORT = 4  # characters of a password that cannot be an innocent word
# PWD and OLDPWD are the working directory, GIT_ASKPASS is a program.
_PASSWORD = (
    r"PASSWORD|PASSWD|PASSPHRASE|PASSCODE|SECRET|(?:^|_)PASS(?:$|_)|(?<!BY|OM)(?<!ASK)PASS$|_PWD(?:$|_)"
    r"|_PAT$|(?:^|_)PIN$"
)
# Addresses that are secrets themselves, or hold one: of a database, a service, a channel.
_OTHERS = "CREDENTIAL|JWT|COOKIE|CONN(?:ECTION)?_?STR(?:ING)?$|WEBHOOKS?(?:_UR[LI])?$|(?:^|_)DSN$"
_SECRET_NAME = re.compile(rf"KEY|TOKEN|AUTH|{_OTHERS}|{_PASSWORD}", re.IGNORECASE)
# MAX_TOKENS, KEYS_PER_SHARD, TOKENIZER_VOCAB, AUTHOR_ID: their numbers are no secrets.
_STRICT_NAME = re.compile(rf"(?:KEY|TOKEN)(?!S|IZE)|AUTH(?!OR)|{_OTHERS}|{_PASSWORD}", re.IGNORECASE)
_PASSWORD_NAME = re.compile(_PASSWORD, re.IGNORECASE)
_NUMBER = re.compile(r"[-+\d.,e%]+", re.IGNORECASE)
_TELLING = re.compile(r"\d|.{20}", re.DOTALL)
# Where a text was wrapped: an end of line, indentation, what a launcher or torch puts before each line.
_WRAP = re.compile(r"(?:\r\n|\n|\r)[ \t]{0,80}(?:\[[\w ]{1,24}\]:?[ \t]{0,80})?")


def names_secret(name: str) -> bool:
    """Whether the name of a variable says that its value is a secret. Errs on the side of yes."""
    return bool(_SECRET_NAME.search(name))


def known(environ: Mapping[str, str]) -> Secrets:
    """The secrets of these variables."""
    found = ((name, value) for name, value in environ.items() if names_secret(name))
    return _known(tuple(sorted((n, v) for n, v in found if len(v) >= LEAST or _is_short_secret(n, v))))


class Secrets:
    """What to look for, longest first: one may be a part of another.

    Args:
        values: names and values of secret variables.
    """

    def __init__(self, values: Iterable[tuple[str, str]]) -> None:
        texts: set[str] = set()
        numbers: set[str] = set()
        shorts: set[str] = set()
        telling: set[str] = set()
        for name, value in values:
            strict = bool(_STRICT_NAME.search(name))
            if len(value) < LEAST:
                shorts.add(value)
                continue
            if _NUMBER.fullmatch(value):
                numbers |= {value} if strict else set()
            else:
                texts.update(_forms(value))
            if strict and _TELLING.search(value):
                telling.update(_parts(value))
        self.texts = sorted(texts, key=lambda text: (-len(text), text))
        self._numbers = {number: _whole(number) for number in sorted(numbers, key=len, reverse=True)}
        self._shorts = [_word(value) for value in sorted(shorts, key=len, reverse=True)]
        self._longest = max(map(len, (*texts, *numbers)), default=0)
        self._telling = sorted(telling)

    def hide(self, text: str) -> str:
        """The text with `***` in place of each of them."""
        for value in self.texts:
            text = text.replace(value, HIDDEN)
        for number in self._numbers.values():
            text = number.sub(HIDDEN, text)
        if self._longest and ("\n" in text or "\r" in text):
            text = self._hide_wrapped(text)
        for short in self._shorts:
            text = short.sub(HIDDEN, text)
        return text

    def find(self, text: str) -> int | None:
        """Where the first of those begins that cannot be an innocent word."""
        wholes = (_whole(value).search(text) if _NUMBER.fullmatch(value) else None for value in self._telling)
        starts = [match.start() for match in wholes if match]
        starts += [text.find(value) for value in self._telling if not _NUMBER.fullmatch(value)]
        starts += [match.start() for short in self._shorts if (match := short.search(text))]
        return min((start for start in starts if start >= 0), default=None)

    def begun(self, text: str) -> int:
        """Characters at the end of a text that may be the beginning of one of them, broken by line ends or
        not: what comes next decides. 0: none.
        """
        if not self._longest:
            return 0
        start = max(0, len(text) - 4 * self._longest - 256)
        plain, places = _squeeze(text[start:])
        longest = 0
        for value in (*self.texts, *self._numbers):
            for size in range(min(len(value) - 1, len(plain)), longest, -1):
                if plain.endswith(value[:size]):
                    longest = size
                    break
        if longest < LEAST // 2:
            return 0
        return len(text) - start - places(len(plain) - longest)

    def _hide_wrapped(self, text: str) -> str:
        """Those that a line end has broken; the line ends stay."""
        plain = _WRAP.sub("", text)
        for value in self.texts:
            if value in plain:
                text = _hide_pieces(text, re.compile(re.escape(value)))
                plain = _WRAP.sub("", text)
        for number in self._numbers.values():
            text = _hide_pieces(text, number) if number.search(plain) else text
        return text


@lru_cache(maxsize=8)
def _known(values: tuple[tuple[str, str], ...]) -> Secrets:
    return Secrets(values)


def _whole(number: str) -> re.Pattern[str]:
    """A number that is no part of a longer one."""
    return re.compile(rf"(?<!\d)(?<!\d[.,]){re.escape(number)}(?!\d)(?![.,]\d)")


def _is_short_secret(name: str, value: str) -> bool:
    """Whether a value of less than `LEAST` characters is a password that no innocent word can be: of letters
    and digits, or with other characters. Words and numbers so short stand in innocent text.
    """
    telling = any(c.isalpha() for c in value) and not value.isalpha()
    return len(value) >= _LEAST_SHORT and telling and bool(_PASSWORD_NAME.search(name))


def _word(value: str) -> re.Pattern[str]:
    """A value that is no part of a longer word."""
    return re.compile(rf"(?<!\w){re.escape(value)}(?!\w)")


def _parts(value: str) -> Iterator[str]:
    """A value, and the lines of one that has several: each may be printed with something before it."""
    yield value
    for line in value.splitlines():
        line = line.strip()
        if line != value and len(line) >= LEAST and any(c.isalnum() for c in line):
            yield line


def _forms(value: str) -> Iterator[str]:
    """A value as it is, as a text in JSON or Python, in a URL, and in base64."""
    for part in _parts(value):
        yield part
        yield from (json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1], repr(part)[1:-1])
        data = part.encode(errors="surrogateescape")
        for coded in (quote(data, safe=""), quote(data), quote_plus(data)):
            yield coded
            yield re.sub(r"%[0-9A-F]{2}", lambda match: match[0].lower(), coded)
    yield from _in_base64(value.encode(errors="surrogateescape"))


def _in_base64(data: bytes) -> Iterator[str]:
    """What base64 makes of it whatever stands around it: three ways, without the characters that also hold
    bits of what stands there.
    """
    if len(data) < _LEAST_CODED:
        return
    for before in range(3):
        whole = (before + len(data)) // 3 * 4
        first = (0, 2, 3)[before]
        for coded in (base64.b64encode(bytes(before) + data), base64.urlsafe_b64encode(bytes(before) + data)):
            yield coded[first:whole].decode()


def _squeeze(text: str) -> tuple[str, Places]:
    kept = [(0, 0)]
    for match in _WRAP.finditer(text):
        kept.append((match.start(), match.end()))
    spans = [(a[1], b[0]) for a, b in zip(kept, [*kept[1:], (len(text), 0)], strict=True)]
    return "".join(text[a:b] for a, b in spans), Places(spans)


class Places:
    """Where characters of a text without its wraps stand in the text with them."""

    def __init__(self, spans: list[tuple[int, int]]) -> None:
        self._spans = spans
        self._ends = list(accumulate(b - a for a, b in spans))

    def __call__(self, index: int) -> int:
        number = min(bisect.bisect_right(self._ends, index), len(self._spans) - 1)
        a, b = self._spans[number]
        return a + index - (self._ends[number] - (b - a))


def _hide_pieces(text: str, value: re.Pattern[str]) -> str:
    plain, places = _squeeze(text)
    parts, done = [], 0
    for match in value.finditer(plain):
        first, last = places(match.start()), places(match.end() - 1) + 1
        wraps = "".join(f"{wrap[0]}{HIDDEN}" for wrap in _WRAP.finditer(text, first, last))
        parts += [text[done:first], HIDDEN, wraps]
        done = last
    return "".join([*parts, text[done:]])
