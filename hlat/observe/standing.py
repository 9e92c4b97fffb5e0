"""What the figures of runs stand for, and whether those of several runs may be compared."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from hlat.observe.runs import Run, flatten
from hlat.storage.fingerprint import Fingerprint

UNKNOWN = "not known"
_TITLES = {
    "held_out": "held-out text",
    "data.tokenizer": "tokenizer",
    "init.from": "weights it began from",
    "init.texts": "BOS and special tokens of those weights",
    "eval.tasks": "text of the tasks",
}
_EVALUATION = ("eval.rows", "eval.tasks", "eval.limit")


def standing_table(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Content -> the first digits of its SHA-256 for every run, and the versions that made the last rows."""
    keys = dict.fromkeys(key for run in runs for key in _last(run).content)
    table = {_title(key): [_short(run, key) for run in runs] for key in keys}
    for name in ("hlat", "torch"):
        table[f"made by {name}"] = [_last(run).versions.get(name, UNKNOWN) for run in runs]
    return table if any(run.stretches for run in runs) else {}


def standing_notes(runs: Sequence[Run]) -> list[str]:
    """Lines about figures that do not stand for the same: of one run before and after a start with other
    values, and of several runs.
    """
    notes = [line for run in runs for line in _changes(run)]
    if len(runs) > 1:
        notes += _held_out_note(runs)
        silent = [run.name for run in runs if not run.stretches]
        if silent:
            why = "a version of HLAT made them that did not note it"
            notes.append(f"what the figures of {', '.join(silent)} stand for is not known: {why}")
        known = [run for run in runs if run.stretches]
        keys = dict.fromkeys(key for run in known for key in _last(run).content if key != "held_out")
        other = [_title(key) for key in keys if len({_last(run).content.get(key) for run in known}) > 1]
        if other:
            notes.append(f"the runs do not have the same {', '.join(other)}")
    return notes


def _last(run: Run) -> Fingerprint:
    return run.stretches[-1].fingerprint if run.stretches else Fingerprint({}, {})


def _title(key: str) -> str:
    return _TITLES.get(key, "content of " + re.sub(r"\.(\d+)", r"[\1]", key))


def _short(run: Run, key: str) -> str:
    digest = _last(run).content.get(key)
    if digest is None:
        return "–" if run.stretches else UNKNOWN
    return (digest if digest.startswith("train:") else digest[:12]) or UNKNOWN


def _held_out_note(runs: Sequence[Run]) -> list[str]:
    """A line where held-out figures of the runs are over different text."""
    shown = [run for run in runs if "step" in run.held_out and len(run.held_out["step"])]
    texts = [(_last(run).content.get("held_out", UNKNOWN), _amount(run)) for run in shown]
    if all(len(set(known) - {UNKNOWN}) < 2 for known in zip(*texts, strict=True)):
        return []
    names = {text for text, _ in texts}
    parts = [
        f"{run.name}: {amount}{f' of {_named(text)}' if len(names) > 1 else ''}"
        for run, (text, amount) in zip(shown, texts, strict=True)
    ]
    other = len(names - {UNKNOWN}) > 1
    why = "over different texts" if other else "not over equally much of the same text"
    return [f"the held-out figures are {why} and cannot be compared ({'; '.join(parts)})"]


def _named(text: str) -> str:
    """A held-out text by the first digits of its SHA-256, as in the table."""
    return "unknown text" if text == UNKNOWN else f"text {text[:12]}"


def _amount(run: Run) -> str:
    """How much the last evaluation read: `12,345 bytes` or `64 examples`."""
    for field, unit in (("held_out_examples", "examples"), ("held_out_bytes", "bytes")):
        values = run.held_out.get(field)
        if values is not None and len(values) and np.isfinite(values[-1]):
            return f"{int(values[-1]):,} {unit}"
    return UNKNOWN


def _changes(run: Run) -> list[str]:
    """A line for each start that goes on with something else than the one before."""
    found = []
    if run.stretches and (first := run.stretches[0].after):
        found.append(f"{run.name}: what the rows up to step {first:,} stand for is not known")
    for before, after in zip(run.stretches, run.stretches[1:], strict=False):
        old, new = _compared(before.fingerprint), _compared(after.fingerprint)
        other = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
        if other:
            found.append(f"{run.name}: from step {after.after + 1:,} on with another {', '.join(other)}")
    return found


def _compared(fingerprint: Fingerprint) -> dict[str, Any]:
    recipe = flatten(fingerprint.recipe)
    values = {key: recipe.get(key) for key in (*_EVALUATION, "data.skip")}
    return {**values, **{_title(key): digest for key, digest in fingerprint.content.items()}}
