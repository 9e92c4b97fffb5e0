"""What the folders of checkpoints in a store are: whole, damaged, or being uploaded or deleted."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

from hlat.checkpoint import folder as folders
from hlat.checkpoint.folder import Broken
from hlat.checkpoint.retention import Entry
from hlat.host import json_text

UNFINISHED = "unfinished.json"  # in a folder while it is uploaded or deleted; names the run that does it
_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{12})")


@dataclass(frozen=True)
class Copy:
    """A complete checkpoint in the store: the name of its folder, what the retention rules know of it, and
    its marker.
    """

    name: str
    entry: Entry
    marker: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Bytes of its files."""
        return sum(int(item["bytes"]) for item in self.marker["files"].values())


@dataclass(frozen=True)
class Copies:
    """The folders of a run in a store.

    Attributes:
        whole: complete checkpoints, oldest first, as far as a listing and the markers tell.
        damaged: name -> why it is none, for those that once were, or may have been, checkpoints.
        unfinished: names of those that are being uploaded or deleted, or were when a process was killed.
        marked: names of all that hold `unfinished.json`, whole ones among them.
    """

    whole: list[Copy]
    damaged: dict[str, str]
    unfinished: list[str]
    marked: frozenset[str]

    @classmethod
    def of(
        cls,
        listed: Mapping[str, int],
        marker: Callable[[str], dict[str, Any]],
        unusable: Container[str] = (),
    ) -> Copies:
        """Sort the files of a store.

        Args:
            listed: path -> bytes.
            marker: name -> its marker; raises Broken.
            unusable: names known to be damaged although nothing here shows it.
        """
        names = sorted({path.partition("/")[0] for path in listed})
        names = [name for name in names if _NAME.fullmatch(name)]
        marked = frozenset(name for name in names if f"{name}/{UNFINISHED}" in listed)
        whole, damaged, unfinished = [], {}, []
        for name in names:
            if name in marked and f"{name}/{folders.MARKER}" not in listed:
                unfinished.append(name)
                continue
            try:
                if f"{name}/{folders.MARKER}" not in listed:
                    raise Broken(folders.NOT_COMPLETE)
                whole.append(_checked(name, listed, marker(name), name not in unusable))
            except Broken as error:
                damaged[name] = str(error)
        whole.sort(key=lambda copy: (copy.entry.sequence, copy.entry.step))
        return cls(whole, damaged, unfinished, marked)


def _checked(name: str, listed: Mapping[str, int], marker: dict[str, Any], usable: bool) -> Copy:
    """A copy whose files have the sizes that its marker says. Raises Broken."""
    try:
        for item, entry in marker["files"].items():
            size = listed.get(f"{name}/{item}")
            if size is None:
                raise Broken(f"{item} is missing")
            if size != entry["bytes"]:
                raise Broken(f"{item} has {size} bytes instead of {entry['bytes']}")
        return copy_of(name, marker, usable)
    except (AttributeError, KeyError, TypeError) as error:
        raise Broken(f"{folders.MARKER} cannot be understood: {error!r}") from error


def copy_of(name: str, marker: dict[str, Any], usable: bool = True) -> Copy:
    """The copy of a name and a marker; `usable` unless it is known to be damaged."""
    entry = Entry(marker["step"], marker["tokens"], marker["sequence"], marker["permanent"], usable)
    return Copy(name, entry, marker)


def checksum(text: bytes) -> str:
    """The beginning of the checksum in a marker's text, which is part of the folder's name."""
    return str(json_text.loads(text)["checksum"])[:12]
