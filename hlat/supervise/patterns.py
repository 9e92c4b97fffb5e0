"""Expressions of the failure table, searched in a line: whatever the line is, in a time that grows with its
length and no faster.

`a[^\\n]*b` as one expression looks for b again from every a. In two parts, b is looked for once, behind the
first a: if it is behind any, it is there.
"""

from __future__ import annotations

import re
from functools import cache

GAP = r"[^\n]*"


class Patterns:
    """Any of several regular expressions, in any case; `GAP` in one, outside of all groups, is any text."""

    def __init__(self, patterns: tuple[str, ...]) -> None:
        whole = [f"(?:{pattern})" for pattern in patterns if GAP not in pattern]
        self._whole = re.compile("|".join(whole), re.IGNORECASE) if whole else None
        parts = (pattern.split(GAP) for pattern in patterns if GAP in pattern)
        self._parts = [[re.compile(part, re.IGNORECASE) for part in of_one] for of_one in parts]

    def search(self, line: str) -> bool:
        """Whether one of them is in the line."""
        if self._whole is not None and self._whole.search(line):
            return True
        return any(_in_order(parts, line) for parts in self._parts)


@cache
def compiled(patterns: tuple[str, ...]) -> Patterns:
    """The same for the same patterns."""
    return Patterns(patterns)


def _in_order(parts: list[re.Pattern[str]], line: str) -> bool:
    at = 0
    for part in parts:
        match = part.search(line, at)
        if match is None:
            return False
        at = match.end()
    return True
