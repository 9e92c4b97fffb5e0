"""Copies of a run's checkpoints in a store.

```
s3://bucket/folder/<run.name>/step-00000300-5f0c2d1a9b3e/
    data-00000.safetensors, index.json, …   as on the disk
    run/                                    metrics.jsonl, fingerprint.json, recipe.yaml, resolved.yaml,
                                            environment.json
    complete.json                           uploaded last: without it there is no checkpoint
```
The second number is the beginning of the checksum in `complete.json`, which covers everything: an upload that
is repeated goes on where it was, and two different checkpoints of one step never mix.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hlat.checkpoint import folder as folders
from hlat.checkpoint.codec import unseal
from hlat.checkpoint.folder import Broken
from hlat.checkpoint.reader import Checkpoint
from hlat.checkpoint.retention import Entry, expired
from hlat.observe.claim import UNCLAIMED, Claim
from hlat.observe.durable import beside
from hlat.observe.jsonl import read_rows
from hlat.storage.fingerprint import FILE as FINGERPRINT
from hlat.storage.remote import Remote
from hlat.storage.transfer import side_by_side

RUN_FILES = "run"
METRICS = "metrics.jsonl"
KEPT_BESIDE = (METRICS, FINGERPRINT, "recipe.yaml", "resolved.yaml", "environment.json")
_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{12})")


class Gone(Exception):
    """The checkpoint on the disk is not there any more, or is another one by now."""


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


class Mirror:
    """A run's checkpoints in a store. One process writes to it: the one that holds the run folder's lock.

    Args:
        remote: the run's folder there.
        root: the checkpoints folder on the disk.
        keep: newest checkpoints to keep, at least 1.
        claim: asked before each file that is uploaded and each copy that is deleted or fetched.
    """

    def __init__(self, remote: Remote, root: Path, keep: int, claim: Claim = UNCLAIMED) -> None:
        self.remote, self.root, self.keep, self.claim = remote, root, keep, claim
        self.unusable: set[str] = set()  # names of copies that turned out to be damaged
        self._markers: dict[str, dict[str, Any]] = {}

    def copies(self) -> list[Copy]:
        """The complete checkpoints, oldest first. Raises StoreError."""
        return self._complete(self.remote.files())

    def upload(self, path: Path) -> Copy | None:
        """Upload a step folder; what is there already from an earlier attempt is compared and left. Returns
        None when all of it was there.

        Raises:
            Gone: the step was deleted or saved anew in the meantime.
            Broken: the checkpoint on the disk is damaged; it is not uploaded.
            StoreError: the store did not take it; what is there so far is no checkpoint.
            FolderLost: another process has taken the run folder.
        """
        self.claim.confirm()
        text = self._marker_text(path)
        marker = unseal(text)
        name = f"{path.name}-{_checksum(text)}"
        if self._complete(self.remote.files(name)):
            return None
        try:
            Checkpoint(path).verify()
            present = self.remote.files(name)

            def send(item: str) -> None:
                target = f"{name}/{item}"
                if target not in present or not self.remote.same(path / item, target):
                    self.claim.confirm()
                    self.remote.upload(path / item, target)

            side_by_side(send, list(marker["files"]))
            self._upload_beside(name)
        except (OSError, Broken) as error:
            if self._marker_text(path) != text:
                raise Gone(str(path)) from error
            if isinstance(error, OSError):
                raise Broken(f"{error.filename}: {error.strerror}") from error
            raise
        if self._marker_text(path) != text:  # renamed under our feet: the files may be of two checkpoints
            raise Gone(str(path))
        self.claim.confirm()
        self.remote.write(f"{name}/{folders.MARKER}", text)
        return _copy(name, marker)

    def fetch(self, copy: Copy) -> Path:
        """Bring a copy back to the disk, in place of a folder of that step. Returns the step folder.

        Raises:
            Broken: it is damaged.
            StoreError: the store did not answer.
            OSError: the disk did not take it.
        """
        final = folders.step_folder(self.root, copy.entry.step)
        partial = folders.begin(final)
        try:
            folders.check_names(copy.marker)
            names = list(copy.marker["files"])
            for name in names:
                (partial / name).parent.mkdir(exist_ok=True)
            side_by_side(lambda item: self.remote.download(f"{copy.name}/{item}", partial / item), names)
            self.remote.download(f"{copy.name}/{folders.MARKER}", partial / folders.MARKER)
            Checkpoint(partial).verify()
            self.claim.confirm()
            self._fetch_beside(copy)
            folders.commit(partial, final)
        except FileNotFoundError as error:
            raise Broken(f"a file is missing ({error})") from error
        finally:
            folders.abandon(partial)
        return final

    def meta(self, copy: Copy) -> bytes:
        """The content of a copy's `meta.json`. Raises FileNotFoundError, StoreError."""
        return self.remote.read(f"{copy.name}/{folders.META}")

    def tidy(self) -> list[Copy]:
        """Delete the copies that retention does not keep, older ones of a step that was saved anew, and what
        killed processes left unfinished. Returns the complete copies deleted. Raises StoreError.
        """
        listed = self.remote.files()
        copies = self._complete(listed)
        newest = {copy.entry.step: copy for copy in copies}
        old = [copy for copy in copies if newest[copy.entry.step] is not copy]
        kept = [copy.entry for copy in newest.values()]
        names = {copy.entry: copy for copy in newest.values()}
        old += [names[entry] for entry in expired(kept, self.keep)]
        for name in [copy.name for copy in old] + self._unfinished(listed, copies):
            self.claim.confirm()
            self.remote.delete(name, folders.MARKER)
        return old

    def _complete(self, listed: dict[str, int]) -> list[Copy]:
        found = []
        for name in {path.partition("/")[0] for path in listed}:
            if not _NAME.fullmatch(name) or f"{name}/{folders.MARKER}" not in listed:
                continue
            marker = self._marker(name)
            if marker is None:
                continue
            sizes = {item: listed.get(f"{name}/{item}") for item in marker["files"]}
            if all(sizes[item] == entry["bytes"] for item, entry in marker["files"].items()):
                found.append(_copy(name, marker, usable=name not in self.unusable))
        return sorted(found, key=lambda copy: (copy.entry.sequence, copy.entry.step))

    def _unfinished(self, listed: dict[str, int], copies: list[Copy]) -> list[str]:
        """Folders without a marker, but for those of checkpoints on the disk: their upload may go on."""
        local = set()
        for path in folders.step_folders(self.root).values():
            try:
                local.add(f"{path.name}-{_checksum(self._marker_text(path))}")
            except Gone:
                continue
        names = {path.partition("/")[0] for path in listed}
        return sorted(
            name
            for name in names
            if _NAME.fullmatch(name) and f"{name}/{folders.MARKER}" not in listed and name not in local
        )

    def _marker(self, name: str) -> dict[str, Any] | None:
        """A copy's marker, read once: the name says what is in it. None when it is damaged."""
        if name not in self._markers:
            try:
                text = self.remote.read(f"{name}/{folders.MARKER}")
                marker = unseal(text)
            except (FileNotFoundError, ValueError):
                return None
            if _checksum(text) != name.rpartition("-")[2] or marker.get("format") != folders.FORMAT:
                return None
            self._markers[name] = marker
        return self._markers[name]

    def _marker_text(self, path: Path) -> bytes:
        try:
            text = (path / folders.MARKER).read_bytes()
            unseal(text)
        except (OSError, ValueError) as error:
            raise Gone(str(path)) from error
        return text

    def _upload_beside(self, name: str) -> None:
        for file in KEPT_BESIDE:
            path = self.root.parent / file
            if path.is_file():
                data = path.read_bytes()
                if file == METRICS:  # as it is now: it grows, and its last row may be half there
                    data = data[: data.rfind(b"\n") + 1]
                self.remote.write(f"{name}/{RUN_FILES}/{file}", data)

    def _fetch_beside(self, copy: Copy) -> None:
        """The metrics so far come back as well, and what they stand for, where those on the disk end before
        this checkpoint.
        """
        if _last_step(self.root.parent / METRICS) >= copy.entry.step:
            return
        if not self._fetch_file(copy, FINGERPRINT):
            (self.root.parent / FINGERPRINT).unlink(missing_ok=True)  # it is about the rows that go
        self._fetch_file(copy, METRICS)  # last: where they have come, all has

    def _fetch_file(self, copy: Copy, name: str) -> bool:
        """Bring back a file of the run folder. Returns whether the copy has it: there may have been none
        yet.
        """
        target = self.root.parent / name
        partial = beside(target)
        try:
            self.remote.download(f"{copy.name}/{RUN_FILES}/{name}", partial)
            os.replace(partial, target)
        except FileNotFoundError:
            return False
        finally:
            partial.unlink(missing_ok=True)
        return True


def _last_step(metrics: Path) -> int:
    """The last step a metrics file has a training row of; -1 without one."""
    if not metrics.is_file():
        return -1
    return max((row["step"] for row in read_rows(metrics) if row.get("kind") == "train"), default=-1)


def newer(copies: list[Copy], sequence: int, unusable: set[str]) -> list[Copy]:
    """The copies saved after the one of a sequence number, newest first, without those known as damaged."""
    later = [copy for copy in copies if copy.entry.sequence > sequence and copy.name not in unusable]
    return later[::-1]


def _checksum(text: bytes) -> str:
    return str(json.loads(text)["checksum"])[:12]


def _copy(name: str, marker: dict[str, Any], usable: bool = True) -> Copy:
    entry = Entry(marker["step"], marker["tokens"], marker["sequence"], marker["permanent"], usable)
    return Copy(name, entry, marker)
