"""The folder of one checkpoint: names, what makes it complete, and how it appears, is replaced and goes away.

```
checkpoints/step-00000300/
    complete.json               step, tokens, every file's size and checksum; written last
    index.json                  tensor name -> dtype, shape, and where each rectangle of it lies, with its
    checksum meta.json                   everything that is not a tensor
    data-00000.safetensors      one file per process that saved
    tokenizer/
```
A folder is built as `.step-00000300.partial-<pid>-<host>~<id>`, flushed to the disk and renamed in one move,
so a process that is killed leaves the old state or the new one. The id tells processes of one number apart
that are in two containers, or of which one is dead. Deleting goes the other way: renamed to
`.step-….deleted-…` first. Replacing an existing step is two renames; in between the old one is called
`.step-….replaced-…` and still found by readers.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hlat import process
from hlat.checkpoint.codec import hash_file, seal, unseal, write_bytes
from hlat.checkpoint.retention import Entry
from hlat.data import tokenizer_files as tokenizer_texts
from hlat.observe.durable import sync_folder

FORMAT = 1
MARKER, INDEX, META, TOKENIZER = "complete.json", "index.json", "meta.json", "tokenizer"
TOKENIZER_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".vocab"}
FOREIGN_IDLE_SECONDS = (
    15 * 60
)  # a partial folder of another machine that nobody has written to for this long is dead

_STEP = re.compile(r"step-(\d{8,})")
_SCRATCH = re.compile(
    r"\.(?P<name>.+)\.(?P<kind>partial|deleted|replaced)-(?P<pid>\d+)-(?P<host>[^~]+)(?:~(?P<id>.*))?"
)
_writing: set[Path] = set()  # partial folders this very process is filling


NOT_COMPLETE = f"it is not complete: {MARKER} is missing"


class Broken(Exception):
    """A checkpoint that is not complete or not intact; the text says why."""


def step_folder(root: Path, step: int) -> Path:
    """`root/step-00000300` for step 300."""
    return root / f"step-{step:08d}"


def scratch(final: Path, kind: str) -> Path:
    """The hidden name beside `final` under which this process builds, replaces or deletes it."""
    own = _process_id(os.getpid())
    return final.with_name(f".{final.name}.{kind}-{os.getpid()}-{socket.gethostname()}~{own}")


def _process_id(pid: int) -> str:
    """What a process of this number has here that no other has: where numbers mean the same, and its start;
    empty where that is not known.
    """
    space, birth = process.space(), process.birth(pid)
    return f"{hashlib.sha256(space.encode()).hexdigest()[:8]}-{birth}" if space and birth else ""


def step_folders(root: Path) -> dict[int, Path]:
    """Step -> folder, for every checkpoint folder under `root`, whether intact or not."""
    found: dict[int, Path] = {}
    names = sorted(os.listdir(root), reverse=True) if root.is_dir() else []  # "step-…" comes before ".step-…"
    for name in names:
        hidden = _SCRATCH.fullmatch(name)
        match = _STEP.fullmatch(hidden["name"] if hidden and hidden["kind"] == "replaced" else name)
        if match:
            found.setdefault(int(match[1]), root / name)
    return found


def read_marker(folder: Path) -> dict[str, Any]:
    """The content of `complete.json`. Raises Broken if the checkpoint is not complete."""
    try:
        marker = unseal((folder / MARKER).read_bytes())
    except FileNotFoundError:
        raise Broken(NOT_COMPLETE) from None
    except (OSError, ValueError) as error:
        raise Broken(f"{MARKER} cannot be read: {error}") from error
    if marker.get("format") != FORMAT:
        raise Broken(f"its format is {marker.get('format')}, this version of HLAT reads {FORMAT}")
    named = _STEP.fullmatch(folder.name)
    if named and marker.get("step") not in (0, int(named[1])):  # the same step twice would hide this one
        raise Broken(f"its {MARKER} is that of step {marker.get('step')}")
    return marker


def check_names(marker: dict[str, Any]) -> None:
    """Raise Broken if the marker names a file outside the checkpoint."""
    for name in marker["files"]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise Broken(f"{MARKER} names a file outside the checkpoint: {name}")


def check_sizes(folder: Path, marker: dict[str, Any]) -> None:
    """Raise Broken if a file named in the marker is missing or has another size."""
    check_names(marker)
    for name, entry in marker["files"].items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise Broken(f"{name} is missing ({error.strerror})") from error
        if size != entry["bytes"]:
            raise Broken(f"{name} has {size} bytes instead of {entry['bytes']}")


def entries(root: Path) -> list[Entry]:
    """The complete checkpoints under `root`, by step."""
    found = []
    for step, folder in sorted(step_folders(root).items()):
        try:
            marker = read_marker(folder)
        except Broken:
            continue
        found.append(Entry(step, marker["tokens"], marker["sequence"], marker["permanent"]))
    return found


def begin(final: Path) -> Path:
    """Create the empty partial folder for `final` (and its parents). Raises OSError."""
    partial = scratch(final, "partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _writing.add(partial)
    return partial


def abandon(partial: Path) -> None:
    """Remove what is left of a partial folder; nothing happens after `commit`."""
    _writing.discard(partial)
    shutil.rmtree(partial, ignore_errors=True)


def seal_folder(
    partial: Path,
    data: Sequence[str],
    index: bytes,
    meta: bytes,
    tokenizer: Sequence[Path],
    marker: dict[str, Any],
) -> None:
    """Write everything but the data files into a partial folder, the marker last, and flush it to the disk.

    Args:
        partial: from `begin`, with the data files already in it.
        data: names of the data files; their checksums stand in the index.
        index, meta: contents of `index.json` and `meta.json`.
        tokenizer: files to copy into `tokenizer/`.
        marker: `step, tokens, sequence, permanent`.

    Raises:
        OSError: disk full, not writable, a tokenizer file that is gone.
    """
    files: dict[str, Any] = {name: {"bytes": (partial / name).stat().st_size} for name in data}
    files[INDEX] = write_bytes(partial / INDEX, index)
    files[META] = write_bytes(partial / META, meta)
    if tokenizer:
        (partial / TOKENIZER).mkdir()
        for source, name in zip(tokenizer, stored_names(tokenizer), strict=True):
            copy = partial / TOKENIZER / name
            copy.parent.mkdir(exist_ok=True)
            files[f"{TOKENIZER}/{name}"] = write_bytes(copy, source.read_bytes())
        for folder in {(partial / name).parent for name in files if name.startswith(f"{TOKENIZER}/")}:
            sync_folder(folder)
        sync_folder(partial / TOKENIZER)
    write_bytes(partial / MARKER, seal({"format": FORMAT, **marker, "files": files}))
    sync_folder(partial)


def commit(partial: Path, final: Path) -> None:
    """Give a sealed partial folder its name, in place of an older folder of that name. Raises OSError."""
    replaced = scratch(final, "replaced")
    partial.stat()  # gone when another process has taken the run folder: then nothing is to be moved
    if final.exists():
        remove(replaced)
        os.rename(final, replaced)
    try:
        os.rename(partial, final)
    except OSError:
        if replaced.exists():
            os.rename(replaced, final)
        raise
    sync_folder(final.parent)
    _writing.discard(partial)
    with contextlib.suppress(OSError):  # what stays of the old one is removed at the next start
        remove(replaced)


def remove(folder: Path) -> None:
    """Delete a folder so that a kill half-way never leaves one that looks complete. Raises OSError."""
    if not folder.exists():
        return
    hidden = _SCRATCH.fullmatch(folder.name)
    deleted = scratch(folder.with_name(hidden["name"] if hidden else folder.name), "deleted")
    if folder != deleted:
        shutil.rmtree(deleted, ignore_errors=True)
        os.rename(folder, deleted)
    shutil.rmtree(deleted)


def clean(root: Path, warn: Callable[[str], None], alone: bool = False) -> None:
    """Tidy up after processes that were killed: partial and deleted folders go, an interrupted replacement is
    undone. What cannot be removed is reported to `warn`.

    Args:
        root: the checkpoints folder.
        warn: receives a line.
        alone: this process holds the run folder: whoever else is still writing here has lost it, and shall
            not complete a checkpoint any more. Otherwise folders of processes that still run are left alone;
            where that cannot be asked, those in which something has changed within 15 minutes.
    """
    for path in sorted(root.glob(".*")) if root.is_dir() else []:
        hidden = _SCRATCH.fullmatch(path.name)
        if not hidden or not path.is_dir() or path in _writing:
            continue
        try:
            if not alone and not _stale(path, int(hidden["pid"]), hidden["id"] or ""):
                continue
            if hidden["kind"] == "replaced" and not path.with_name(hidden["name"]).exists():
                os.rename(path, path.with_name(hidden["name"]))
            else:
                remove(path)
                if hidden["kind"] == "partial":
                    warn(f"removed {path}: process {hidden['pid']} ended before this checkpoint was complete")
        except OSError as error:
            warn(f"could not tidy up {path}: {error.strerror}")


def _stale(path: Path, pid: int, owner: str) -> bool:
    """Whether the process that made a folder has ended; see `_process_id` for `owner`."""
    space = _process_id(os.getpid()).partition("-")[0]
    if owner and owner.partition("-")[0] == space:
        return pid == os.getpid() or _process_id(pid) != owner or not process.runs(pid, "")
    newest = max((item.stat().st_mtime for item in [path, *path.rglob("*")]), default=0.0)
    return time.time() - newest > FOREIGN_IDLE_SECONDS


def tokenizer_files(tokenizer: Path | Sequence[Path] | None) -> list[Path]:
    """The files of a tokenizer given as a file, a list of files, or a folder (without weights in it)."""
    if tokenizer is None:
        return []
    if not isinstance(tokenizer, Path):
        return list(tokenizer)
    if not tokenizer.is_dir():
        return [tokenizer]
    templates = tokenizer_texts.TEMPLATES
    places = [tokenizer, *([tokenizer / templates] if (tokenizer / templates).is_dir() else [])]
    found = [path for place in places for path in place.iterdir()]
    return sorted(path for path in found if path.is_file() and path.suffix in TOKENIZER_SUFFIXES)


def stored_names(files: Sequence[Path]) -> list[str]:
    """Names of tokenizer files inside a checkpoint: their own, but a tokenizer.json under another name gets
    that name, by which it is looked for. It is the first file of a tokenizer.
    """
    names = [tokenizer_texts.kept_name(file) for file in files]
    if files and files[0].suffix == ".json" and "tokenizer.json" not in names and "vocab.json" not in names:
        names[0] = "tokenizer.json"
    return names


def verify_tokenizer(folder: Path, marker: dict[str, Any]) -> list[str]:
    """Compare the files of a checkpoint's tokenizer with their checksums.

    Returns the names of those that have none.

    Raises:
        Broken: one is damaged, or a file that a tokenizer is read from was put there later.
    """
    named = {name: entry for name, entry in marker["files"].items() if name.startswith(f"{TOKENIZER}/")}
    for name, entry in named.items():
        if "sha256" in entry:
            verify_file(folder, name, entry["sha256"])
    for path in sorted((folder / TOKENIZER).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in named and path.suffix in TOKENIZER_SUFFIXES and not path.name.startswith("."):
            raise Broken(f"{name} was put there after the checkpoint was saved")
    return [name for name, entry in named.items() if "sha256" not in entry]


def verify_file(folder: Path, name: str, sha256: str) -> None:
    """Raise Broken unless the file has this checksum."""
    try:
        if hash_file(folder / name) != sha256:
            raise Broken(f"{name} is damaged: its bytes do not match their checksum")
    except OSError as error:
        raise Broken(f"{name} cannot be read: {error.strerror}") from error


def meta_text(meta: dict[str, Any], step: int, tokens: int, tokenizer: Sequence[Path]) -> bytes:
    """The content of `meta.json`. Raises TypeError for a value that is not JSON."""
    folder = TOKENIZER if tokenizer else None
    body = {**meta, "step": step, "tokens": tokens, "tokenizer": folder}
    return json.dumps(body, indent=1).encode() + b"\n"


def explain(error: OSError, place: Path, needed: int | None) -> tuple[str, str]:
    """Why a folder could not be written and what the user can do; `needed` is the size in bytes, if known."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{error.strerror or error}: {error.filename or place}",
            "make the folder writable or choose another",
        )
    size = "" if needed is None else f": it takes {needed / 1e6:.1f} MB"
    while not place.exists():
        place = place.parent
    with contextlib.suppress(OSError):
        size += f", {shutil.disk_usage(place).free / 1e6:.1f} MB are free"
    return (
        f"the disk is full{size}",
        "free some space, keep fewer checkpoints or move the folder to a larger disk",
    )
