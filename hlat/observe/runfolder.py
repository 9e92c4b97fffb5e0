"""The run folder: everything a run leaves behind, in one place that may be moved, copied and resumed.

`{recipe.yaml, resolved.yaml, environment.json, metrics.jsonl, logs/, checkpoints/}`, and
nxd-checkpoints/ where NxD's own files are written; see docs/run-folder.md.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hlat.errors import FolderLost, SaveFailed, UserError
from hlat.host import json_text
from hlat.observe import environment
from hlat.observe.claim import UNCLAIMED, Claim
from hlat.observe.jsonl import replace_file
from hlat.observe.lock import LOCK_FILE, Lock
from hlat.observe.sinks import METRICS_FILE
from hlat.paths import expand, folder_to_write, kind_of, read_whole

_FOLDERS = ("logs", "checkpoints")
_MOST_ENVIRONMENT = 1 << 30
_ROOM = 256  # bytes that the paths of files in a run folder need behind its own


class RunFolder:
    """Paths of a run folder. Making one touches no file; `start` does."""

    def __init__(self, path: str | Path) -> None:
        self.path = expand(path, "run.dir").absolute()
        self.recipe = self.path / "recipe.yaml"
        self.resolved = self.path / "resolved.yaml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / METRICS_FILE
        self.logs, self.checkpoints = (self.path / name for name in _FOLDERS)
        self.nxd_checkpoints = self.path / "nxd-checkpoints"
        self._lock: Lock | None = None
        self._created: list[Path] = []
        self._former: dict[Path, bytes | None] = {}  # what `start` has replaced; None: there was no such file

    @property
    def claim(self) -> Claim:
        """What to ask before writing here: the lock, on the rank that holds it."""
        return UNCLAIMED if self._lock is None else self._lock

    def check(self) -> None:
        """Raise UserError if `start` could not create or write this folder. Leaves nothing behind."""
        try:
            folder_to_write(self.path, room=_ROOM)
            files = (self.recipe, self.resolved, self.environment, self.metrics)
            odd = next((file for file in files if kind_of(file) not in ("file", "missing")), None)
        except UserError as error:
            raise self._error(error.what) from None
        if odd is not None:  # reading a pipe would wait for ever
            raise self._error(f"its {odd.name} is a {kind_of(odd)}, not a file")

    def start(
        self,
        recipe_text: bytes | str,
        resolved_text: str,
        *,
        description: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> RunFolder:
        """Create the folder, or continue in it, and hold its lock until `close`. For the first rank only.

        Args:
            recipe_text: the user's recipe file, kept as recipe.yaml to the last byte.
            resolved_text: the recipe with bases, overrides and defaults resolved, kept as resolved.yaml.
            description: this start's entry of environment.json (default: `environment.describe()`).
            say: receives a line where it has to wait for the lock.

        A start in an existing folder replaces both recipes; a text that differs from the new one moves to
        `logs/<name>-until-start-<n>.yaml`. Raises SaveFailed when the disk is full, UserError when the folder
        cannot be written for another reason or another process trains in it; then a folder that this call has
        created is gone again.
        """
        self.check()
        try:
            self._create()
            self._lock = Lock(self.path, say)
            self._remove_unfinished()
            for name in _FOLDERS:
                (self.path / name).mkdir(exist_ok=True)
            starts = self.starts()
            texts = ((self.recipe, _bytes(recipe_text)), (self.resolved, _bytes(resolved_text)))
            archived = [_archived(path, self.logs, len(starts)) for path, _ in texts]
            files = (self.recipe, self.resolved, self.environment, *archived)
            self._former = {path: path.read_bytes() if path.exists() else None for path in files}
            self._lock.confirm()  # a stop since the lock was taken may have been a long one
            for (path, data), old in zip(texts, archived, strict=True):
                _replace(path, data, old)
            starts.append(dict(description) if description is not None else environment.describe())
            self._lock.confirm()
            self._write_starts(starts, self._lock.token)
            self._lock.latest, self._lock.turn = self._holder, len(starts)
        except OSError as error:
            self.abandon()
            what = error.strerror or str(error)
            file = Path(error.filename).name if isinstance(error.filename, str | Path) else ""
            failed = self._error(f"{file}: {what}" if file in (LOCK_FILE, *_FOLDERS) else what)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise SaveFailed(failed.what, where=failed.where, fix="make room there") from error
            raise failed from error
        except BaseException:
            self.abandon()
            raise
        return self

    def starts(self) -> list[dict[str, Any]]:
        """The entries of environment.json, one a start, oldest first; empty without a readable file."""
        starts = self._read_environment().get("starts")
        return [entry for entry in starts if isinstance(entry, dict)] if isinstance(starts, list) else []

    def _remove_unfinished(self) -> None:
        """Remove what processes that were killed, or have lost the folder, had begun to write beside a file:
        one that was stopped shall not put it in place any more.
        """
        for path in (self.recipe, self.resolved, self.environment, self.metrics):
            for unfinished in self.path.glob(f".{path.name}.*.tmp"):
                unfinished.unlink(missing_ok=True)

    def _holder(self) -> str:
        """Token of the process that has started last; empty where there is no record of it."""
        return str(self._read_environment().get("holder", ""))

    def _read_environment(self) -> dict[str, Any]:
        try:
            content = json_text.loads(read_whole(self.environment, "", _MOST_ENVIRONMENT, "a list of starts"))
        except (UserError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _write_starts(self, starts: list[dict[str, Any]], holder: str) -> None:
        content = {"starts": starts, "holder": holder}
        replace_file(self.environment, json.dumps(content, indent=2).encode() + b"\n")

    def note_stop(self, **facts: Any) -> None:
        """Add `stopped`, with these facts, to this start's entry of environment.json, once: what stopped it
        first stands. A file that cannot be
        written is no reason to fail: the state is saved.
        """
        starts = self.starts()
        if starts and self._lock is not None and self._lock.holds():
            starts[-1].setdefault("stopped", facts)
            with contextlib.suppress(OSError):
                self._write_starts(starts, self._lock.token)

    def undo(self) -> None:
        """Take back what `start` wrote, while the folder is held: the run cannot continue as it is."""
        if self._lock is None or not self._lock.holds():
            return
        for path, data in self._former.items():
            if data is None:
                path.unlink(missing_ok=True)
            else:
                replace_file(path, data)

    def close(self) -> None:
        """Give the folder back; calling it again does nothing."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def abandon(self) -> None:
        """Close, and remove the folder if this process created it and nothing was trained in it.

        For a mistake that shows only after `start` (data, tokenizer): no folder stays behind.
        """
        trained = self.metrics.exists() and self.metrics.stat().st_size > 0
        saved = (self.checkpoints, self.nxd_checkpoints)
        trained = trained or any(folder.is_dir() and any(folder.iterdir()) for folder in saved)
        try:
            self.claim.check_place()
        except FolderLost:  # what is at the path is somebody else's
            trained = True
        created = [] if trained else self._created
        if self.path in created and self._lock is not None and self._lock.holds():
            shutil.rmtree(self.path, ignore_errors=True)
        self.close()
        for parent in created:
            try:
                parent.rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                break  # somebody else put something there
        self._created = []

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _create(self) -> None:
        missing = [parent for parent in (self.path, *self.path.parents) if not parent.exists()]
        for folder in reversed(missing):
            try:
                folder.mkdir()
            except FileExistsError:
                continue  # another process was faster; the lock decides between the two
            self._created.insert(0, folder)

    def _error(self, what: str) -> UserError:
        return UserError(
            f"cannot use the run folder: {what}", where=str(self.path), fix="choose another run.dir"
        )


def _archived(path: Path, archive: Path, start: int) -> Path:
    return archive / f"{path.stem}-until-start-{start}{path.suffix}"


def _bytes(text: bytes | str) -> bytes:
    return text.encode() if isinstance(text, str) else text


def _replace(path: Path, data: bytes, archived: Path) -> None:
    if path.exists():
        old = path.read_bytes()
        if old == data:
            return
        replace_file(archived, old)
    replace_file(path, data)
