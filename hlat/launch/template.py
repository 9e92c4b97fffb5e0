"""Templates: where they are, how they are filled, how a value becomes a shell word."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from hlat.errors import UserError
from hlat.recipe_io import shipped_folder

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_PLACE = re.compile(r"\{\{ (\w+) \}\}")


def read(name: str) -> str:
    """The text of a template. Raises UserError when HLAT is installed without its templates."""
    root = shipped_folder("launch/templates", "hlat_launch")
    if root is None:
        raise UserError("the templates of hlat launch are missing", fix="install HLAT again")
    return (root / name).read_text(encoding="utf-8")


def fill(name: str, values: Mapping[str, str]) -> str:
    """A template with its `{{ places }}` filled, once: what a value holds is not filled again.

    Values are shell text: quote what is not yours with `word` or `words`.
    """
    text = _PLACE.sub(lambda match: values[match.group(1)], read(name))
    return re.sub(r"\n{3,}", "\n\n", text)


def word(value: str | int | Path) -> str:
    """A value as one word for bash, whatever it holds; on one line, as sbatch refuses DOS line breaks."""
    text = str(value)
    if not _CONTROL.search(text):
        return shlex.quote(text)
    escaped = re.sub(r"[\\']", r"\\\g<0>", text)
    return "$'" + _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", escaped) + "'"


def words(values: Iterable[str | int | Path], indent: str = " ") -> str:
    """Several values, each a word, with `indent` between them."""
    return indent.join(word(value) for value in values)
