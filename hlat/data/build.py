"""Building a tokenized folder: work units over processes, resumable, one builder at a time, all or nothing.

Everything is written to `OUT.partial` beside the target and renamed when it is whole. A killed run leaves its
finished units there and the next one continues; a lock that the system drops with its holder keeps a second
builder waiting, who then finds the finished folder. Disk trouble removes the partial folder.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hlat.data import origins, pool
from hlat.data.lock import locked_folder
from hlat.data.losses import Dropped, Tally, add
from hlat.data.packed import (
    SPLITS,
    VERSION,
    TokenFolder,
    disk_error,
    holdout_threshold,
    token_dtype,
    write_json,
)
from hlat.data.partial import clear, discard
from hlat.data.sources import (
    FORMAT,
    MANIFEST,
    InputFile,
    Piece,
    Source,
    identity,
    refuse_changed,
    tokenized_folder,
    units,
)
from hlat.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from hlat.data.tokenizer_files import copy_files
from hlat.errors import UserError
from hlat.host import json_text
from hlat.storage.blocks import Reading, watching
from hlat.storage.fingerprint import digest_of


@dataclass
class Built:
    """What a build did.

    The folder, and the bytes of text and seconds spent now (0 when it was there already).
    """

    folder: Path
    bytes: int = 0
    seconds: float = 0.0
    reused_units: int = 0


def build_key(sources: list[Source], tokenizer: Tokenizer, holdout: float) -> str:
    """Fingerprint of all that decides the content of a tokenized folder."""
    parts: dict[str, Any] = {
        "format": [FORMAT, VERSION],
        "tokenizer": tokenizer.identity,
        "holdout": holdout_threshold(holdout),
        "sources": [identity(source) for source in sources],
    }
    if tokenizer.convention.bos is not None:
        parts["bos"] = tokenizer.convention.bos
    if isinstance(tokenizer, HuggingFaceTokenizer) and not tokenizer.takes_parts:
        parts["long_texts"] = (
            "whole"  # earlier versions cut those of some of these tokenizers at wrong places
        )
    return digest_of(parts)


def build(
    sources: list[Source],
    tokenizer: Tokenizer,
    out: Path,
    *,
    holdout: float,
    workers: int | None = None,
    key: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Built:
    """Tokenize the sources, in the order given, into the folder `out`.

    Args:
        holdout: fraction of the documents to hold out, in [0, 1).
        workers: processes; all cores unless given.
        key: `build_key` of the arguments when it is already known.
        progress: called with (bytes of text done, bytes in the input files).

    Raises UserError: nothing to tokenize, a file that cannot be read, a disk that refuses, `out` taken by
    something else.
    """
    if tokenizer.eos_id is None:
        raise UserError(
            "the tokenizer has no end-of-document token",
            where=tokenizer.spec,
            fix='set "eos_token" in tokenizer_config.json beside it',
        )
    key = key or build_key(sources, tokenizer, holdout)
    if _complete(out, key):
        return _found(out, sources)
    if out.is_symlink():
        raise UserError("is a link", where=str(out), fix="name the folder itself, or another one")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked_folder(out.with_name(f"{out.name}.partial")) as partial:
            if _complete(out, key):
                discard(partial)
                return _found(out, sources)
            try:
                return _build_locked(_Job(sources, tokenizer, holdout, key, partial), out, workers, progress)
            except UserError:
                _discard(partial)
                raise
            except OSError as error:
                _discard(partial)
                raise disk_error(error, out) from error
    except OSError as error:
        raise disk_error(error, out) from error


def _found(out: Path, sources: list[Source]) -> Built:
    """What is there already, unless too much was dropped of a source for what it allows now."""
    for source, entry in zip(sources, TokenFolder(out).manifest["sources"], strict=True):
        Tally(**entry["read"]).check(source)
    return Built(out)


def _discard(partial: Path) -> None:
    with suppress(OSError):  # what happened before is said; a rest is removed by the next build
        discard(partial)


def _complete(out: Path, key: str) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if tokenized_folder(out) and TokenFolder(out).manifest.get("key") == key:
        return True
    raise UserError(f"'{out}' exists and holds something else", where=str(out), fix="choose another folder")


class _Job:
    """The work in one partial folder: `job.json` (what the workers read), the tokenizer's copy, the units."""

    def __init__(
        self, sources: list[Source], tokenizer: Tokenizer, holdout: float, key: str, folder: Path
    ) -> None:
        self.sources, self.tokenizer, self.holdout, self.key, self.folder = (
            sources,
            tokenizer,
            holdout,
            key,
            folder,
        )
        self.reading = Reading()
        with watching(self.reading):
            self.units: list[tuple[int, list[Piece]]] = [
                (i, unit) for i, source in enumerate(sources) for unit in units(source)
            ]
        self.below = holdout_threshold(holdout)

    def prepare(self) -> None:
        """Write job.json and the tokenizer, after removing what another job left in the folder."""
        path = self.folder / "job.json"
        if _values(path).get("key") != self.key:
            clear(self.folder)
        copies = self.folder / "tokenizer"
        copies.mkdir(exist_ok=True)
        copy_files(self.tokenizer.kept_files(), copies)
        names = [file.name for file in self.tokenizer.files()]
        write_json(
            path,
            {
                "key": self.key,
                "tokenizer": f"tokenizer/{names[0]}" if names else self.tokenizer.spec,
                "tokenizer_identity": self.tokenizer.identity,
                "bos_id": self.tokenizer.convention.bos,
                "sources": [
                    {"text_field": s.text_field, "files": [asdict(file) for file in s.files]}
                    for s in self.sources
                ],
                "units": [
                    {"source": i, "pieces": [asdict(piece) for piece in pieces]} for i, pieces in self.units
                ],
            },
        )

    def finished(self) -> dict[int, dict[str, Any]]:
        """The units an earlier, interrupted run completed, with their statistics."""
        done = {}
        for number in range(len(self.units)):
            done[number] = _values(self.folder / f"unit-{number:05d}.json")
        return {number: unit for number, unit in done.items() if "read" in unit}

    def check(self, finished: dict[int, dict[str, Any]]) -> None:
        """Raise UserError where what a unit was made of is not what others have read."""
        for unit in finished.values():
            self.reading.merge(unit["read"])


def _values(path: Path) -> dict[str, Any]:
    """What this program wrote into a file of JSON, empty where there is none or it is damaged: that part of
    the work is then done again.
    """
    try:
        found = json_text.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _build_locked(job: _Job, out: Path, workers: int | None, progress: Callable[[int, int], None]) -> Built:
    started = time.perf_counter()
    job.prepare()
    done = job.finished()
    reused = len(done)
    total, written = sum(source.size for source in job.sources), 0

    def advance(size: int) -> None:
        nonlocal written
        written += size
        progress(written, total)

    todo = [number for number in range(len(job.units)) if number not in done]
    done |= pool.run(job.folder, todo, job.below, workers, advance)
    job.check(done)
    tallies = _tallies(job, done)
    threshold = _threshold_with_both_sides(job, done)
    if threshold != job.below:
        moved = [number for number, unit in done.items() if _moves(job.folder, unit, threshold, job.below)]
        done |= pool.run(job.folder, moved, threshold, workers, lambda size: None)
        job.check(done)
    refuse_changed(job.sources, "tokenized", job.reading)
    lines = [done[number]["lines"] for number in sorted(done)]
    write_json(job.folder / origins.FILE, origins.describe(job.sources, job.units, lines), indent=None)
    manifest = _manifest(job, [done[number] for number in sorted(done)], threshold, tallies)
    _publish(job, manifest, out)
    return Built(out, written, time.perf_counter() - started, reused)


def _tallies(job: _Job, done: dict[int, dict[str, Any]]) -> list[Tally]:
    """What was read of each source. Raises UserError where that is nothing, or too little."""
    tallies = [Tally() for _ in job.sources]
    for number, (place, _) in enumerate(job.units):
        tallies[place].add_unit(done[number])
    for tally, source in zip(tallies, job.sources, strict=True):
        tally.check(source)
    return tallies


def _hashes(folder: Path, unit: dict[str, Any]) -> np.ndarray:
    tables = [
        np.fromfile(folder / f"{shard['file']}.docs", dtype="<u8").reshape(-1, 3)[:, 2]
        for shard in unit["shards"].values()
    ]
    return np.concatenate(tables) if tables else np.zeros(0, dtype="<u8")


def _threshold_with_both_sides(job: _Job, done: dict[int, dict[str, Any]]) -> int:
    """The held-out threshold, moved only when one side would be empty.

    Then just so far that it gets the nearest document.
    """
    counts = {
        split: sum(unit["shards"].get(split, {}).get("documents", 0) for unit in done.values())
        for split in SPLITS
    }
    if not job.holdout or all(counts.values()):
        return job.below
    marks = [_hashes(job.folder, unit) for unit in done.values()]
    smallest = min(int(m.min()) for m in marks if len(m))
    largest = max(int(m.max()) for m in marks if len(m))
    if smallest == largest:
        return 0  # one document, or copies of one: trained on; the manifest shows that nothing is held out
    return smallest + 1 if not counts["holdout"] else largest


def _moves(folder: Path, unit: dict[str, Any], threshold: int, before: int) -> bool:
    """Whether a document of the unit changes sides."""
    marks = _hashes(folder, unit)
    return bool(((marks < np.uint64(threshold)) != (marks < np.uint64(before))).any())


def _manifest(
    job: _Job, finished: list[dict[str, Any]], threshold: int, tallies: list[Tally]
) -> dict[str, Any]:
    shards = {
        split: [unit["shards"][split] for unit in finished if split in unit["shards"]] for split in SPLITS
    }
    totals = {
        split: {
            what: sum(shard[what] for shard in shards[split]) for what in ("documents", "tokens", "bytes")
        }
        for split in SPLITS
    }
    dropped: Dropped = {}
    for tally in tallies:
        add(dropped, tally.dropped)
    tokenizer = job.tokenizer
    names = [file.name for file in tokenizer.files()]
    return {
        "format": FORMAT,
        "version": VERSION,
        "key": job.key,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "tokenizer": {
            "spec": names[0] if names else tokenizer.spec,
            "identity": tokenizer.identity,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "bos_id": tokenizer.convention.bos,
        },
        "sources": [
            {
                "label": s.label,
                "files": len(s.files),
                "bytes": s.size,
                "skipped": s.skipped,
                "read": asdict(tally),
            }
            for s, tally in zip(job.sources, tallies, strict=True)
        ],
        "holdout": job.holdout,
        "holdout_below": threshold,
        "totals": totals,
        "dropped": {
            reason: {"count": entry["count"], "examples": entry["examples"]}
            for reason, entry in dropped.items()
        },
        "shards": shards,
        "origins_sha256": hashlib.sha256((job.folder / origins.FILE).read_bytes()).hexdigest(),
    }


def _publish(job: _Job, manifest: dict[str, Any], out: Path) -> None:
    keep = {
        f"{shard['file']}{suffix}"
        for split in SPLITS
        for shard in manifest["shards"][split]
        for suffix in (".bin", ".docs", origins.SUFFIX)
    } | {origins.FILE}
    for item in job.folder.iterdir():
        if item.is_file() and item.name not in keep and item.name != ".lock":
            item.unlink()
    write_json(job.folder / MANIFEST, manifest)
    TokenFolder(job.folder)  # every size is right before the folder gets its name
    try:
        os.rename(job.folder, out)
    except OSError as error:
        # Where the file system has no locks two builders may finish; the first one's folder is as good as
        # ours.
        if not (out / MANIFEST).is_file():
            raise disk_error(error, out) from error
        discard(job.folder)
    (out / ".lock").unlink(missing_ok=True)


__all__ = ["Built", "InputFile", "build", "build_key"]
