"""Tokenized folders in a store (`data.sources: [{path: s3://bucket/tokens}]`), brought to the disk once.

    $XDG_CACHE_HOME/hlat/staged/<key>/     key: hash of the folder's manifest, which has a hash of every file

All processes of a machine share the copy; one of them fetches it while the others wait for its lock. A fetch
that was cut off goes on with the files that are whole. Copies are never changed; deleting one is safe while
no run reads it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from hlat.data.lock import locked_folder
from hlat.data.origins import is_origin, origin_files
from hlat.data.packed import SPLITS, TokenFolder, disk_error
from hlat.data.partial import discard
from hlat.data.progress import tokenizing
from hlat.data.sources import MANIFEST
from hlat.data.tokenizer_files import TEMPLATES
from hlat.errors import StorageFailed, UserError
from hlat.host import json_text
from hlat.storage.patience import Value, patiently
from hlat.storage.remote import Remote
from hlat.storage.transfer import side_by_side
from hlat.storage.user_cache import cache_root

PATIENCE, PAUSE = 300.0, 5.0  # seconds: how long a store may fail, and between attempts
TOKENIZER = "tokenizer"


def is_url(path: str | None) -> bool:
    """Whether a path names a folder in a store."""
    return path is not None and "://" in path


def staged(url: str, where: str = "data.sources", quiet: bool = False) -> Path:
    """The local copy of a tokenized folder in a store, fetched and verified unless it is there.

    Raises UserError for a URL without such a folder, a damaged one, or too little room; StorageFailed when
    the store does not answer.
    """
    remote = Remote(url, where)
    try:
        text = _patiently(lambda: remote.read(MANIFEST), url)
        manifest = json_text.loads(text)
        wanted = _files(manifest)
    except FileNotFoundError as error:
        fix = "copy a folder there that `hlat data tokenize` has written; text is not read from a store"
        raise UserError(f"there is no {MANIFEST} at {url}", where=where, fix=fix) from error
    except (ValueError, KeyError, TypeError) as error:
        fix = "tokenize again, and copy the whole folder there"
        raise UserError(f"not a manifest of tokens ({error})", where=f"{url}/{MANIFEST}", fix=fix) from error
    folder = cache_root() / "staged" / hashlib.sha256(text).hexdigest()[:32]
    if (folder / MANIFEST).is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked_folder(folder.with_name(f"{folder.name}.partial")) as partial:
            if (folder / MANIFEST).is_file():
                discard(partial)
                return folder
            _fetch(remote, wanted, partial, quiet)
            (partial / MANIFEST).write_bytes(text)
            TokenFolder(partial)
            os.rename(partial, folder)
            (folder / ".lock").unlink(missing_ok=True)
    except OSError as error:
        if not (folder / MANIFEST).is_file():
            raise disk_error(error, folder) from error
    return folder


def _files(manifest: dict[str, Any]) -> dict[str, str]:
    """Name and sha256 of every shard file."""
    found: dict[str, str] = {}
    for split in SPLITS:
        for shard in manifest["shards"][split]:
            name = str(shard["file"])
            if os.path.basename(name) != name:
                raise ValueError("a shard outside the folder")
            found |= {f"{name}.bin": str(shard["sha256"]), f"{name}.docs": str(shard["docs_sha256"])}
    return found | origin_files(manifest)


def _fetch(remote: Remote, wanted: dict[str, str], partial: Path, quiet: bool) -> None:
    listed = _patiently(remote.files, remote.url)
    tokenizer = [
        name
        for name in listed
        if PurePosixPath(name).parent in (PurePosixPath(TOKENIZER), PurePosixPath(TOKENIZER, TEMPLATES))
        and not name.endswith("/..")
    ]
    without = {name for name in wanted if is_origin(name)} - listed.keys()  # tokens are read without them
    wanted = {name: digest for name, digest in wanted.items() if name not in without}
    if missing := sorted(wanted.keys() - listed.keys()):
        what = f"{len(missing)} files are missing, first {missing[0]}"
        raise UserError(what, where=remote.url, fix="copy the whole folder there")
    here = {name for name, digest in wanted.items() if _digest(partial / name) == digest}
    total = sum(listed[name] for name in wanted.keys() - here)
    free = shutil.disk_usage(partial).free
    if total > free:
        what = f"fetching {remote.url} takes {total / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        raise UserError(
            what, where=str(partial.parent), fix="make room, or set XDG_CACHE_HOME to another disk"
        )
    (partial / TOKENIZER).mkdir(exist_ok=True)
    done, counting = 0, threading.Lock()

    def bring(name: str) -> None:
        nonlocal done
        for last in (False, True):
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).unlink(missing_ok=True)
            _patiently(lambda: remote.download(name, partial / name), remote.url)
            if name not in wanted or _digest(partial / name) == wanted[name]:
                with counting:
                    done += listed[name]
                    bar.update(done, total)
                return
            if last:
                fix = "copy this file there again"
                raise UserError("does not match its sha256", where=f"{remote.url}/{name}", fix=fix)

    with tokenizing(f"fetching {remote.url}", quiet) as bar:
        side_by_side(bring, [*sorted(wanted.keys() - here), *tokenizer])


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


def _patiently(work: Callable[[], Value], url: str) -> Value:
    def failure(what: str) -> StorageFailed:
        return StorageFailed(what, where=url, fix="start again when it does")

    return patiently(work, PATIENCE, "data.sources", failure, pauses=(PAUSE, PAUSE))
