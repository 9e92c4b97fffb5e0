"""The fingerprint of a result: everything that shapes it, and nothing else.

One kind of it for all that is kept and used again: the key of a cached tokenizer or of cached tokens is the
digest of what they are made of; a run notes in its folder which recipe and which contents its rows stand for,
so that a sweep or a report does not take them for those of something else. Contents enter by their own
digests, never by the path they lie at. Versions of HLAT and torch are noted and shown; they are not compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hlat.host import json_text

FILE = "fingerprint.json"
_SECTIONS = ("run", "model", "data", "schedule", "eval")
Content = Mapping[str, str]
"""Recipe key -> digest of what it names, such as `data.sources.0` or `init.from`."""


def digest_of(parts: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over named parts, JSON values; in whatever order they are named."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class Fingerprint:
    """What rows of a run stand for.

    Attributes:
        recipe: the resolved recipe, `Recipe.to_dict`.
        content: what its paths and names stood for.
        versions: `hlat` and `torch`.
    """

    recipe: dict[str, Any]
    content: Content
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` reads them."""
        return {"recipe": self.recipe, "content": self.content, "versions": self.versions}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Fingerprint:
        """Raises KeyError, TypeError or ValueError for values that are none."""
        recipe, content = dict(values["recipe"]), dict(values["content"])
        versions = dict(values.get("versions", {}))
        if not all(
            isinstance(section, dict) for section in map(recipe.get, _SECTIONS) if section is not None
        ):
            raise ValueError("the recipe is none")
        if not all(isinstance(text, str) for text in (*content.values(), *versions.values())):
            raise ValueError("contents and versions are texts")
        return Fingerprint(recipe, content, versions)


@dataclass(frozen=True)
class Stretch:
    """The rows of a run after step `after`, up to where the next stretch begins, and what they stand for."""

    after: int
    fingerprint: Fingerprint


def read_stretches(run: Path) -> list[Stretch]:
    """What the rows of a run folder stand for, in order; empty where that was not noted, or is damaged."""
    try:
        entries = json_text.loads((run / FILE).read_bytes())["rows"]
        return [Stretch(int(entry["after"]), Fingerprint.from_dict(entry)) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return []


def noted(former: list[Stretch], after: int, fingerprint: Fingerprint) -> list[Stretch]:
    """The stretches of a run that now goes on after step `after`: the rows behind that are removed, and with
    them what they stood for.
    """
    kept = [stretch for stretch in former if stretch.after < after]
    if kept and kept[-1].fingerprint == fingerprint:
        return kept
    return [*kept, Stretch(after, fingerprint)]


def stretches_text(stretches: list[Stretch]) -> bytes:
    """The content of the file that `read_stretches` reads."""
    rows = [{"after": stretch.after, **stretch.fingerprint.to_dict()} for stretch in stretches]
    return json.dumps({"rows": rows}, indent=1).encode() + b"\n"


def with_steps(stretches: list[Stretch], last: int) -> list[Stretch]:
    """The stretches that hold a step up to `last`."""
    return [stretch for stretch in stretches if stretch.after < last]
