"""Copies of a run's checkpoints in a store.

```
s3://bucket/folder/<run.name>/step-00000300-5f0c2d1a9b3e/
    unfinished.json                         there while the folder is uploaded, or deleted
    data-00000.safetensors, index.json, …   as on the disk
    run/                                    metrics.jsonl, fingerprint.json, recipe.yaml, resolved.yaml,
                                            environment.json
    complete.json                           uploaded last: without it there is no checkpoint
```
The second number is the beginning of the checksum in `complete.json`, which covers everything: an upload that
is repeated goes on where it was, and two different checkpoints of one step never mix.

What a store holds may be all that is left of a run, so a folder is deleted only where it is known whose it is
and that it is not needed: one of `unfinished.json` that names this run, or a whole copy of this run when this
process has put a newer one beside it or has compared one. A copy that is damaged, or has lost its marker, is
never deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hlat.checkpoint import folder as folders
from hlat.checkpoint.codec import unseal
from hlat.checkpoint.copies import UNFINISHED, Copies, Copy, checksum, copy_of
from hlat.checkpoint.folder import Broken
from hlat.checkpoint.reader import Checkpoint
from hlat.checkpoint.retention import expired
from hlat.host import json_text
from hlat.observe.aside import put_aside
from hlat.observe.claim import UNCLAIMED, Claim
from hlat.observe.durable import beside
from hlat.observe.jsonl import read_rows
from hlat.storage.fingerprint import FILE as FINGERPRINT
from hlat.storage.remote import Remote
from hlat.storage.transfer import side_by_side

RUN_FILES = "run"
METRICS = "metrics.jsonl"
KEPT_BESIDE = (METRICS, FINGERPRINT, "recipe.yaml", "resolved.yaml", "environment.json")


class Gone(Exception):
    """The checkpoint on the disk is not there any more, or is another one by now."""


@dataclass(frozen=True)
class Owner:
    """How a run knows what it has written.

    Attributes:
        mark: stands in `unfinished.json`.
        owns: whether a checkpoint of this meta data is one of the run.
    """

    mark: str = ""
    owns: Callable[[Mapping[str, Any]], bool] = lambda meta: True


class Mirror:
    """A run's checkpoints in a store. One process writes to it: the one that holds the run folder's lock.

    Args:
        remote: the run's folder there.
        root: the checkpoints folder on the disk.
        keep: newest checkpoints to keep, at least 1.
        claim: asked before each file that is uploaded and each copy that is deleted or fetched.
        owner: of what may be deleted.

    Attributes:
        unusable: name of a copy that turned out to be damaged -> why.
    """

    def __init__(
        self,
        remote: Remote,
        root: Path,
        keep: int,
        claim: Claim = UNCLAIMED,
        owner: Owner | None = None,
    ) -> None:
        self.remote, self.root, self.keep, self.claim = remote, root, keep, claim
        self._owner = owner or Owner()
        self.unusable: dict[str, str] = {}
        self._markers: dict[str, dict[str, Any]] = {}
        self._good: set[str] = set()  # copies of which this process has compared every byte
        self._owned: dict[str, bool] = {}

    def look(self) -> Copies:
        """What there is. Raises StoreError."""
        return self._sorted(self.remote.files())

    def copies(self) -> list[Copy]:
        """The complete checkpoints, oldest first. Raises StoreError."""
        return self.look().whole

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
        name = f"{path.name}-{checksum(text)}"
        if self._sorted(self.remote.files(name)).whole and name not in self.unusable:
            return None
        try:
            Checkpoint(path).verify()
            self._mark(name)
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
        self._good.add(name)
        self.unusable.pop(name, None)
        self.remote.remove(f"{name}/{UNFINISHED}")
        return copy_of(name, marker)

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
        self._good.add(copy.name)
        return final

    def meta(self, copy: Copy) -> dict[str, Any]:
        """A copy's `meta.json`, compared with its checksum. Raises Broken, StoreError."""
        try:
            text = self.remote.read(f"{copy.name}/{folders.META}")
            digest = copy.marker["files"][folders.META]["sha256"]
        except FileNotFoundError as error:
            raise Broken(f"{folders.META} is missing") from error
        except (KeyError, TypeError) as error:
            raise Broken(f"{folders.MARKER} cannot be understood: {error!r}") from error
        if hashlib.sha256(text).hexdigest() != digest:
            raise Broken(f"{folders.META} is damaged: its bytes do not match their checksum")
        try:
            found = json_text.loads(text)
        except ValueError as error:
            raise Broken(f"{folders.META} is no JSON: {error}") from error
        if not isinstance(found, dict):
            raise Broken(f"{folders.META} is {type(found).__name__}, not a mapping")
        return found

    def tidy(self) -> list[Copy]:
        """Delete the copies that retention does not keep, older ones of a step that was saved anew, and what
        killed processes of this run left unfinished. Returns the complete copies deleted. Raises StoreError.
        """
        found = self.look()
        newest = {copy.entry.step: copy for copy in found.whole}
        old = [copy for copy in found.whole if newest[copy.entry.step] is not copy]
        kept = [copy.entry for copy in newest.values()]
        names = {copy.entry: copy for copy in newest.values()}
        old += [names[entry] for entry in expired(kept, self.keep)]
        old = [copy for copy in old if self._may_go(copy, found)]
        for name in [copy.name for copy in old] + self._left_by_us(found):
            self._mark(name)
            self.remote.delete(name, folders.MARKER, UNFINISHED)
        for name in sorted({copy.name for copy in found.whole} & found.marked):
            self.claim.confirm()
            self.remote.remove(f"{name}/{UNFINISHED}")  # its process ended a moment too early
        return old

    def abort_uploads(self) -> int:
        """Drop the parts of large files that killed processes of this run were uploading. Returns how many
        uploads. Raises StoreError.
        """
        names = [name for name in self.look().marked if self._marked_by_us(name)]
        self.claim.confirm()
        return self.remote.abort_uploads(names)

    def _may_go(self, copy: Copy, found: Copies) -> bool:
        """Whether a copy may be deleted: it is whole and this run's own, and a newer one is known to be
        good.
        """
        later = (other.name for other in found.whole if other.entry.sequence > copy.entry.sequence)
        return copy.name not in self.unusable and any(n in self._good for n in later) and self._owns(copy)

    def _owns(self, copy: Copy) -> bool:
        if copy.name not in self._owned:
            try:
                self._owned[copy.name] = self._owner.owns(self.meta(copy))
            except Broken as error:
                self.unusable[copy.name] = str(error)
                return False
        return self._owned[copy.name]

    def _mark(self, name: str) -> None:
        """Say that a folder is this run's, and not whole, before anything in it changes."""
        self.claim.confirm()
        self.remote.write(f"{name}/{UNFINISHED}", json.dumps({"run": self._owner.mark}).encode())

    def _marked_by_us(self, name: str) -> bool:
        try:
            found = json_text.loads(self.remote.read(f"{name}/{UNFINISHED}"))
        except (FileNotFoundError, ValueError):
            return False
        return isinstance(found, dict) and found.get("run") == self._owner.mark

    def _left_by_us(self, found: Copies) -> list[str]:
        """Unfinished folders of this run, but for those of checkpoints on the disk: their upload may go
        on.
        """
        local = set()
        for path in folders.step_folders(self.root).values():
            try:
                local.add(f"{path.name}-{checksum(self._marker_text(path))}")
            except Gone:
                continue
        return [name for name in found.unfinished if name not in local and self._marked_by_us(name)]

    def _sorted(self, listed: dict[str, int]) -> Copies:
        return Copies.of(listed, self._marker, self.unusable)

    def _marker(self, name: str) -> dict[str, Any]:
        """A copy's marker, read once: the name says what is in it. Raises Broken when it is damaged."""
        if name not in self._markers:
            try:
                text = self.remote.read(f"{name}/{folders.MARKER}")
                marker = unseal(text)
            except FileNotFoundError:
                raise Broken(folders.NOT_COMPLETE) from None
            except ValueError as error:
                raise Broken(f"{folders.MARKER} is damaged: {error}") from error
            if checksum(text) != name.rpartition("-")[2]:
                raise Broken(f"{folders.MARKER} is that of another checkpoint")
            if marker.get("format") != folders.FORMAT:
                raise Broken(f"its format is {marker.get('format')}, this version reads {folders.FORMAT}")
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
        this checkpoint. Rows on the disk that the copy does not have are put aside.
        """
        run = self.root.parent
        if _last_step(run / METRICS) >= copy.entry.step:
            return
        partial = beside(run / METRICS)
        try:
            fetched = self._download(copy, METRICS, partial)
            if fetched and not _begins_with(partial, run / METRICS):
                put_aside([run / METRICS, run / FINGERPRINT], run / "logs")
            if not self._fetch_file(copy, FINGERPRINT):
                (run / FINGERPRINT).unlink(missing_ok=True)  # it is about the rows that go
            if fetched:
                os.replace(partial, run / METRICS)  # last: where they have come, all has
        finally:
            partial.unlink(missing_ok=True)

    def _fetch_file(self, copy: Copy, name: str) -> bool:
        """Bring back a file of the run folder. Returns whether the copy has it: there may have been none
        yet.
        """
        target = self.root.parent / name
        partial = beside(target)
        try:
            if found := self._download(copy, name, partial):
                os.replace(partial, target)
            return found
        finally:
            partial.unlink(missing_ok=True)

    def _download(self, copy: Copy, name: str, to: Path) -> bool:
        try:
            self.remote.download(f"{copy.name}/{RUN_FILES}/{name}", to)
        except FileNotFoundError:
            return False
        return True


def _begins_with(longer: Path, shorter: Path) -> bool:
    """Whether a file begins with the rows of another one, which may be missing."""
    if not shorter.exists():
        return True
    own = shorter.read_bytes()
    own = own[: own.rfind(b"\n") + 1]
    with longer.open("rb") as file:
        return file.read(len(own)) == own


def _last_step(metrics: Path) -> int:
    """The last step a metrics file has a training row of; -1 without one."""
    if not metrics.is_file():
        return -1
    return max((row["step"] for row in read_rows(metrics) if row.get("kind") == "train"), default=-1)


def newer(copies: list[Copy], sequence: int, unusable: Container[str]) -> list[Copy]:
    """The copies saved after the one of a sequence number, newest first, without those known as damaged."""
    later = [copy for copy in copies if copy.entry.sequence > sequence and copy.name not in unusable]
    return later[::-1]
