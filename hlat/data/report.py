"""What a run reads: counts of every source, as JSON values and in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hlat.data.origins import shown
from hlat.data.progress import text_size

if TYPE_CHECKING:
    from hlat.data.loader import Data

_TOTALS = ("documents", "tokens", "bytes", "shards", "holdout_documents", "holdout_tokens", "rows")


def report(data: Data, rows: int) -> dict[str, Any]:
    """Documents, tokens, shards, epochs of a run of so many rows and everything dropped, per source, and the
    totals. JSON-able.
    """
    counts = data.train.quota.counts(rows)
    sources = [_source(data, number, counts[number]) for number in range(len(data.folders))]
    return {
        "tokenizer": {
            "spec": data.tokenizer.spec,
            "vocab_size": data.vocab_size,
            "identity": data.tokenizer.identity,
        },
        "fingerprint": data.fingerprint,
        "sources": sources,
        "totals": {key: sum(source[key] for source in sources) for key in _TOTALS},
    }


def _source(data: Data, number: int, rows: int) -> dict[str, Any]:
    folder, source = data.folders[number], data.train.sources[number]
    described = folder.manifest.get("sources", [])
    return {
        "source": ", ".join(entry["label"] for entry in described),
        "folder": str(folder.folder),
        "share": data.train.quota.shares[number] / data.train.quota.period,
        "documents": folder.count("train", "documents"),
        "tokens": source.tokens,
        "bytes": folder.count("train", "bytes"),
        "shards": len(folder.shards["train"]) + len(folder.shards["holdout"]),
        "holdout_documents": folder.count("holdout", "documents"),
        "holdout_tokens": folder.count("holdout"),
        "rows": rows,
        "epochs": rows / source.windows,
        "tokens_dropped_per_epoch": source.dropped_per_epoch,
        "documents_dropped": {
            reason: entry["count"] for reason, entry in folder.manifest.get("dropped", {}).items()
        },
        "files_skipped": _merged([entry.get("skipped", {}) for entry in described]),
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    """A report as lines for a person."""
    lines = []
    for source in report["sources"]:
        lines.append(
            f"{shown(source['source'])}: {_documents(source['documents'])}, {source['tokens']:,} tokens"
            f" ({text_size(source['bytes'])} of text),"
            f" held out {_documents(source['holdout_documents'])}, {source['holdout_tokens']:,} tokens;"
            f" this run reads {source['rows']:,} rows = {source['epochs']:.2f} epochs"
            f" ({source['share']:.1%} of the mixture)"
        )
        lines += [
            f"  dropped: {_documents(count)}: {reason}"
            for reason, count in source["documents_dropped"].items()
        ]
        lines += [f"  skipped: {count:,} x {reason}" for reason, count in source["files_skipped"].items()]
        if source["tokens_dropped_per_epoch"]:
            lines.append(
                f"  dropped: {source['tokens_dropped_per_epoch']:,} tokens per epoch, less than a row;"
                " others in every epoch"
            )
    return lines


def _documents(count: int) -> str:
    return f"{count:,} document{'s' * (count != 1)}"


def _merged(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for entry in counts:
        for reason, count in entry.items():
            total[reason] = total.get(reason, 0) + count
    return total
