"""What was left out of a source, counted by reason, and whether it is more than a user would want."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hlat.errors import UserError

if TYPE_CHECKING:
    from hlat.data.readers import Document
    from hlat.data.sources import Source

ALLOWED = 0.5
"""The share of a source that may be dropped unless a user says otherwise."""
EMPTY = "empty"
"""The reason of a text without characters: it is dropped, but nothing is lost."""
_EXAMPLES = 3

Dropped = dict[str, dict[str, Any]]
"""By reason: `count`, `bytes` (of files and their rests), `examples` (names), `fields` (that hold text in a
record that was dropped for having none).
"""


def count(dropped: Dropped, document: Document) -> None:
    """Count a document that was left out."""
    add(dropped, {document.reason: _entry(1, document.size, [document.name], document.fields)})


def add(dropped: Dropped, more: Dropped) -> None:
    """Add counts to others. Names are made printable as JSON, whatever bytes they hold."""
    for reason, entry in more.items():
        into = dropped.setdefault(reason, _entry())
        into["count"] += entry["count"]
        into["bytes"] += entry["bytes"]
        into["fields"] = into["fields"] or entry["fields"]
        for name in entry["examples"][: _EXAMPLES - len(into["examples"])]:
            into["examples"].append(name.encode("utf-8", "backslashreplace").decode())


def _entry(count: int = 0, size: int = 0, examples: Iterable[str] = (), fields: str = "") -> dict[str, Any]:
    return {"count": count, "bytes": size, "examples": list(examples), "fields": fields}


@dataclass
class Tally:
    """What was read of a source: `documents`, their `bytes` of text, and what was `dropped`."""

    documents: int = 0
    bytes: int = 0
    dropped: Dropped = field(default_factory=dict)

    def add_unit(self, statistics: Mapping[str, Any]) -> None:
        """Add what `hlat.data.packed.write_unit` says of a unit."""
        self.documents += sum(shard["documents"] for shard in statistics["shards"].values())
        self.bytes += sum(shard["bytes"] for shard in statistics["shards"].values())
        add(self.dropped, statistics["dropped"])

    def check(self, source: Source) -> None:
        """Raise UserError when nothing of the source was read, or more was dropped than it allows: of the
        documents, or of the bytes.
        """
        where, ordered = source.label, sorted(self.dropped.items(), key=lambda item: -item[1]["count"])
        reasons = ", ".join(f"{entry['count']:,} {reason}" for reason, entry in ordered)
        fields = next((entry["fields"] for _, entry in ordered if entry["fields"]), "")
        advice = f"set text_field (--text-field) to what holds the text, of: {fields}" if fields else ""
        if not self.documents:
            what = f"no document could be read ({reasons or 'no records'})"
            raise UserError(what, where=where, fix=advice or "name a source with UTF-8 text")
        lost = sum(entry["count"] for reason, entry in ordered if reason != EMPTY)
        size = sum(entry["bytes"] for _, entry in ordered)
        records, text = lost + self.documents, size + self.bytes
        share = max(lost / records, size / text if size else 0.0)
        if share <= source.allow_dropped:
            return
        of_records = lost / records > source.allow_dropped
        much = f"{lost:,} of {records:,} records" if of_records else f"{size:,} of {text:,} bytes"
        allow = f"set allow_dropped (--allow-dropped) to {_at_least(share)} if the rest is enough"
        fix = f"{advice or 'repair or remove what is no text'}; or {allow}"
        raise UserError(f"most of it was dropped: {much} ({reasons})", where=where, fix=fix)


def refuse_most(label: str, kept: int, dropped: Mapping[str, int], allowed: float, where: str) -> None:
    """Raise UserError when more than the share `allowed` of the examples in the source that the key `where`
    names was dropped.
    """
    lost = sum(dropped.values())
    share = lost / (lost + kept) if lost else 0.0
    if share <= allowed:
        return
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in Counter(dropped).most_common())
    what = f"{lost:,} of {lost + kept:,} records of '{label}' were dropped ({reasons})"
    fix = f"correct the fields or the records; or set data.examples.allow_dropped to {_at_least(share)}"
    raise UserError(what, where=where, fix=f"{fix} if the rest is enough")


def _at_least(share: float) -> str:
    return f"{math.ceil(share * 100) / 100:g}"
