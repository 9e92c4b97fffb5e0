"""The pages of the documentation, cut into the parts that tests compare with the code."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_GENERATED = re.compile(r"<!-- (reference|table): begin .*?<!-- \1: end -->", re.DOTALL)
_CODE = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")


class Table(NamedTuple):
    """`before`: the page's text up to the table. Cells are stripped, with `\\|` written as `|`."""

    page: str
    before: str
    header: list[str]
    rows: list[list[str]]


def name(page: Path) -> str:
    """The page as a message calls it."""
    return page.relative_to(ROOT).as_posix()


@cache
def text(page: Path) -> str:
    """All of a page."""
    return page.read_text(encoding="utf-8")


def fences(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of some languages ("" for none), in their order."""
    return [match[3] for match in _FENCE.finditer(text(page)) if match[2] in languages]


@cache
def prose(page: Path) -> str:
    """A page without fenced blocks and without what is generated from the code."""
    return _GENERATED.sub("", _FENCE.sub("", text(page)))


def codes(page: Path) -> list[str]:
    """What stands between backticks in the prose of a page, line breaks as spaces."""
    return [" ".join(code.replace("\\|", "|").split()) for code in _CODE.findall(prose(page))]


def tables(page: Path) -> list[Table]:
    """Every table that is written by hand."""
    found = []
    lines = (body := _GENERATED.sub("", text(page))).splitlines(keepends=True)
    start = 0
    for number, line in enumerate(lines):
        if re.fullmatch(r"\|[-:| ]+\|\s*", line) and number:
            end = next((n for n in range(number, len(lines)) if not lines[n].startswith("|")), len(lines))
            start = sum(map(len, lines[: number - 1]))
            rows = [cells(row) for row in lines[number + 1 : end]]
            found.append(Table(name(page), body[:start], cells(lines[number - 1]), rows))
    return found


def cells(line: str) -> list[str]:
    """The cells of a table's row."""
    inner = re.split(r"(?<!\\)\|", line.strip().strip("|"))
    return [cell.replace("\\|", "|").strip() for cell in inner]


def table(page: str, *header: str) -> Table:
    """The first table of a page (docs/…) whose header begins with these cells."""
    found = [t for t in tables(ROOT / page) if tuple(t.header[: len(header)]) == header]
    assert found, f"{page} has no table that begins with {header}"
    return found[0]


def column(rows: list[list[str]], index: int = 0) -> list[str]:
    """The names in backticks of a column, without links."""
    return [code for row in rows for code in re.findall(r"`([^`]+)`", row[index])]


def number(written: str) -> float:
    """A number as pages write it: 1,450,624 or 2.5e-3."""
    return float(written.replace(",", ""))
