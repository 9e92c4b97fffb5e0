"""Save checkpoints of a run, find the newest good one, and keep the folder tidy.

```python
store = CheckpointStore(run_dir / "checkpoints", keep=3, permanent_every_tokens=None, async_=True)
if (checkpoint := store.newest()) is not None:
    checkpoint.load_into(tensors)
...
store.save(step, tensors, meta, tokens)     # returns after a copy in memory; writes in the background
...
store.wait()                                # before the process ends
```
Tensors go by global logical name (`model/<parameter>`, `optim/<slot>/<parameter>`) and may be plain, DTensors
or pieces of a flat bucket: see `layout`. What makes a checkpoint complete and a save atomic is in `folder`,
which ones stay in `retention`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex

from hlat.checkpoint import folder as folders
from hlat.checkpoint.codec import rng_from_json, rng_to_json
from hlat.checkpoint.layout import Index, Snapshot, Writer
from hlat.checkpoint.peers import Peers
from hlat.checkpoint.reader import Checkpoint, first_failure, newest_in, open_checkpoint, skipped_lines
from hlat.checkpoint.retention import expired, is_permanent
from hlat.checkpoint.stream import write_weights
from hlat.errors import FolderLost, SaveFailed, UserError
from hlat.observe.claim import UNCLAIMED, Claim

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "open_checkpoint",
    "rng_from_json",
    "rng_to_json",
    "write_weights",
]

# DCP announces at every single-process save and load that it runs in a single process.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class CheckpointStore:
    """The checkpoints folder of one run. With torch.distributed initialised, every method but `steps` is
    collective.

    Args:
        root: the checkpoints folder; created by the first save. What killed processes left in it is removed
            now.
        keep: newest checkpoints to keep, at least 1.
        permanent_every_tokens: also keep for ever the first checkpoint after every so many training tokens;
            None for none.
        async_: write in a background thread from a copy in memory (which takes as much as the tensors, on the
            CPU).
        warn: called with one line about each skipped checkpoint and each folder tidied up; the log by
            default.
        claim: asked, on the first process, before a checkpoint is begun, gets its name or is deleted. With
            a name it says that nobody else may write here: what others have begun goes.

    Raises:
        UserError: `keep` or `permanent_every_tokens` below 1.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep: int,
        permanent_every_tokens: int | None = None,
        async_: bool = False,
        warn: Callable[[str], None] | None = None,
        claim: Claim = UNCLAIMED,
    ) -> None:
        for key, value in (("keep", keep), ("permanent_every_tokens", permanent_every_tokens)):
            if value is not None and value < 1:
                raise UserError(f"{value} is too small", where=f"checkpoint.{key}", fix="write 1 or more")
        self.root, self.keep, self.every, self.async_ = Path(root), keep, permanent_every_tokens, async_
        self._warn = warn or logging.getLogger(__name__).warning
        self._peers, self._claim = Peers.meet(), claim
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self.keep_back: Callable[[int], bool] = lambda step: False
        """Whether the checkpoint of a step, which retention would delete, stays for now (first process)."""
        self.after_sequence = 0
        """The next checkpoint counts as newer than one of this number that is kept elsewhere."""
        self._buffers: dict[MetadataIndex, Tensor] = {}
        self.skipped: dict[int, str] = {}
        """Step -> why the last `newest` did not take its checkpoint; the same on every process."""
        self._remarks: list[str] = []  # from the background thread, passed on by the next call
        if self._peers.rank == 0:
            claim.confirm()
            folders.clean(self.root, self._warn, alone=bool(claim.name))

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        meta: dict[str, Any],
        tokens: int,
        tokenizer: Path | Sequence[Path] | None = None,
        wait: bool = False,
        obstacle: OSError | None = None,
    ) -> None:
        """Save a checkpoint, replacing one of the same step. Waits for the save before it to finish.

        Args:
            step: optimizer steps done.
            tensors: global name -> tensor; may be changed as soon as this returns.
            meta: everything else, JSON values only.
            tokens: training tokens seen so far.
            tokenizer: its files, or a folder of them, copied into the checkpoint.
            wait: return only when it is complete on the disk.
            obstacle: on the first process, a failure that forbids this save: it fails with it everywhere.

        Raises:
            SaveFailed: this save (or, in the background, the one before it) failed: disk full, not writable.
                The same on every process. What was complete before is untouched, nothing half-written stays.
            FolderLost: another process has taken the run folder. The same on every process.
            TypeError: a value in `meta` that is not JSON, or in `tensors` that is not a tensor.
        """
        self.wait()
        background = self.async_ and not wait
        files = folders.tokenizer_files(tokenizer)
        text = folders.meta_text(meta, step, tokens, files)
        snapshot = Snapshot(tensors, self._buffers if background else None)
        arguments = (step, snapshot, text, tokens, files, obstacle)
        if background:
            self._pending = self._pool.submit(self._write, *arguments)
        else:
            self._write(*arguments)
            self._report()

    @property
    def busy(self) -> bool:
        """Whether a save is being written in the background."""
        return self._pending is not None and not self._pending.done()

    @property
    def failure(self) -> BaseException | None:
        """Why a save in the background failed, once it has; `wait` will raise it."""
        return self._pending.exception() if self._pending is not None and self._pending.done() else None

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes what exists once."""
        return self._peers.rank == 0

    def wait(self) -> None:
        """Wait until the last save is complete on the disk. Raises what `save` raises."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        finally:
            self._report()

    def newest(self, verify: bool = True, before: int | None = None) -> Checkpoint | None:
        """The newest complete and undamaged checkpoint; None if there is none. Newer ones skipped are passed
        to `warn`.

        Args:
            verify: compare every byte with its checksum (a full read, shared among the processes); without it
                damage shows when the tensors are read.
            before: look only at steps below this one.
        """
        self.wait()
        checkpoint, self.skipped = newest_in(self.root, verify, self._peers, before)
        if self._peers.rank == 0:
            for line in skipped_lines(self.root, self.skipped, checkpoint, before):
                self._warn(line)
        return checkpoint

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending (their bytes are not checked)."""
        return [entry.step for entry in folders.entries(self.root)]

    def _report(self) -> None:
        while self._remarks:
            self._warn(self._remarks.pop(0))

    def _write(
        self,
        step: int,
        snapshot: Snapshot,
        meta: bytes,
        tokens: int,
        tokenizer: list[Path],
        obstacle: OSError | None,
    ) -> None:
        """Write one checkpoint, on all ranks; it is complete and has its name when this returns."""
        final = folders.step_folder(self.root, step)
        try:
            partial = self._begin(final, obstacle)
        except OSError as error:
            raise self._failure(error, step, snapshot) from error

        def finish(index: Index) -> None:  # on rank 0, after all ranks have written
            existing = [entry for entry in folders.entries(self.root) if entry.step != step]
            known = [entry.sequence for entry in folders.entries(self.root)]
            marker = {
                "step": step,
                "tokens": tokens,
                "sequence": 1 + max([self.after_sequence, *known]),
                "permanent": is_permanent(step, tokens, existing, self.every),
            }
            folders.seal_folder(partial, sorted(index.headers), index.to_json(), meta, tokenizer, marker)
            self._claim.confirm()
            folders.commit(partial, final)
            self.skipped.pop(step, None)
            self._delete_expired()

        try:
            dcp.save(
                {},  # the planner already has the tensors
                storage_writer=Writer(partial, finish),
                planner=snapshot,
                process_group=self._peers.group,
                no_dist=self._peers.group is None,
            )
        except CheckpointException as error:
            failure = first_failure(error)
            if isinstance(failure, OSError):
                raise self._failure(failure, step, snapshot) from failure
            raise failure from error
        finally:
            if self._peers.rank == 0:
                folders.abandon(partial)

    def _begin(self, final: Path, obstacle: OSError | None) -> Path:
        """The partial folder, made by rank 0 for all. Raises its OSError or FolderLost on every rank."""
        answer: Path | OSError | FolderLost = final
        if self._peers.rank == 0:
            try:
                self._claim.check_place()
                self._claim.confirm()
                answer = obstacle or folders.begin(final)
            except (OSError, FolderLost) as error:
                answer = error
        answer = self._peers.from_first(answer)
        if not isinstance(answer, Path):
            raise answer
        return answer

    def _delete_expired(self) -> None:
        entries = [replace(e, usable=e.step not in self.skipped) for e in folders.entries(self.root)]
        # Uploads only go on to newer ones: asked about the newest first, they keep back one and no more.
        for entry in reversed(expired(entries, self.keep)):
            if self.keep_back(entry.step):
                continue
            try:
                self._claim.confirm()
                folders.remove(folders.step_folders(self.root)[entry.step])
            except OSError as error:
                self._remarks.append(f"could not delete the old checkpoint of step {entry.step}: {error}")

    def _failure(self, error: OSError, step: int, snapshot: Snapshot) -> SaveFailed:
        usable = [entry for entry in folders.entries(self.root) if entry.step not in self.skipped]
        newest = max(usable, key=lambda entry: entry.sequence, default=None)
        last = f"the one of step {newest.step} is untouched" if newest else "there is no earlier one"
        reason, remedy = folders.explain(error, self.root, snapshot.bytes())
        what = f"checkpoint of step {step} was not saved ({reason}); {last}"
        return SaveFailed(what, where=str(self.root), fix=remedy)
