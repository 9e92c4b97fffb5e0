"""Open a checkpoint: look at it, read single tensors, or load it into tensors of any layout."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from hlat.checkpoint import folder as folders
from hlat.checkpoint.codec import hash_header, hash_range, raw_bytes, read_into, sha256
from hlat.checkpoint.folder import Broken
from hlat.checkpoint.layout import Chunk, Index, Reader, boxes
from hlat.checkpoint.peers import Peers
from hlat.errors import UserError
from hlat.host import json_text
from hlat.storage.fingerprint import digest_of

EARLIER = "use an earlier checkpoint of the run, or copy this one again"


class Checkpoint:
    """A complete checkpoint. Opening it reads no tensor; every tensor read is compared with its checksum.

    Attributes:
        path: its folder.
        step: optimizer steps done.
        tokens: training tokens seen.
        meta: what was given to `save`, and `step`, `tokens` and `tokenizer` (name of the folder in `path`
            with the tokenizer's files, or None).
        verified: names of tensors begin like this whose bytes, and the files beside them, were compared with
            their checksums, so reads need not check again ("" = every tensor); None = of no tensor.
    """

    def __init__(self, path: Path, peers: Peers | None = None) -> None:
        """Open it.

        Args:
            path: the step folder.
            peers: the processes that will call `load_into` together; this one alone by default.

        Raises:
            Broken: it is incomplete, a file has another size, or its index or meta data are damaged.
        """
        self.path, self._peers = path, peers or Peers()
        self._marker = folders.read_marker(path)
        try:
            self.step, self.tokens = int(self._marker["step"]), int(self._marker["tokens"])
            folders.check_sizes(path, self._marker)
            self._index = Index.from_json(self._small(folders.INDEX))
            self.meta: dict[str, Any] = json_text.loads(self._small(folders.META))
        except (KeyError, TypeError, ValueError) as error:
            raise Broken(f"{folders.MARKER} or {folders.META} cannot be understood: {error!r}") from error
        for entry in self._index.tensors.values():
            for chunk in entry.chunks:
                size = self._marker["files"].get(chunk.record.file, {"bytes": 0})["bytes"]
                if chunk.record.start + _size(chunk, entry.dtype) > size:
                    raise Broken(f"{folders.INDEX} does not fit {chunk.record.file}")
        self.verified: str | None = None
        self._tokenizer_checked = False

    @property
    def tokenizer(self) -> Path | None:
        """The folder with the tokenizer's files, or None. Its files are compared with their checksums first.

        Raises UserError: one of them was changed, or lies there and is not the checkpoint's.
        """
        folder = self.path / folders.TOKENIZER
        if not self._tokenizer_checked:
            try:
                unsigned = folders.verify_tokenizer(self.path, self._marker)
            except Broken as broken:
                fix = "give the tokenizer back its files, or copy this checkpoint again"
                raise self._error(str(broken), fix) from broken
            if unsigned:
                line = f"{folder}: {unsigned[0]} has no checksum: whether it was changed is not known"
                logging.getLogger(__name__).warning(line)
            self._tokenizer_checked = True
        return folder if folder.is_dir() else None

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._index.tensors)

    def shape(self, name: str) -> torch.Size:
        """Logical shape. Raises KeyError for an unknown name."""
        return torch.Size(self._index.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype. Raises KeyError for an unknown name."""
        return self._index.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """One whole tensor on the CPU, put together from its parts; nothing else is read.

        Raises:
            KeyError: unknown name.
            UserError: its bytes are damaged or gone.
        """
        entry = self._index.tensors[name]
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        for chunk, box in boxes(entry):
            piece = self._rows(name, chunk, 0, chunk.shape[0] if chunk.shape else 1)
            if chunk.shape == entry.shape:
                return piece
            whole[box] = piece
        return whole

    def content(self) -> str:
        """Digest (hex) of the model's weights, from the checksums in the index: nothing is read."""
        weights = {
            name: [
                str(entry.dtype),
                entry.shape,
                sorted([c.offset, c.shape, c.record.sha256] for c in entry.chunks),
            ]
            for name, entry in self._index.tensors.items()
            if name.startswith("model/")
        }
        return digest_of(weights)

    def load_into(self, tensors: Mapping[str, Tensor], partial: bool = False, ignore: str = "") -> None:
        """Fill tensors in place, whatever layout they or the checkpoint have. Collective among the peers.

        Args:
            tensors: global name -> plain tensor, DTensor or subclass with DCP's `__create_chunk_list__`; each
                rank names those of which it holds a part.
            partial: allow stored tensors that no rank asks for.
            ignore: allow those whose names begin like this.

        Raises:
            UserError: a name the checkpoint lacks, another shape or dtype, a stored tensor that nobody asked
                for (unless `partial`), damaged bytes. The same error on every rank, before anything is
                changed except for damage.
        """
        answers = self._peers.gather((self._mismatch(tensors), set(tensors)))
        if problem := next((problem for problem, _ in answers if problem), None):
            raise problem
        unasked = sorted(set(self._index.tensors).difference(*(names for _, names in answers)))
        if ignore:
            unasked = [name for name in unasked if not name.startswith(ignore)]
        if unasked and not partial:
            raise self._error(
                f"holds {len(unasked)} tensors that the run has no place for: {_listed(unasked)}",
                "resume with the model and optimizer it was saved with",
            )
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            dcp.load(
                dict(tensors),
                storage_reader=Reader(self._index, self._rows),
                planner=planner,
                process_group=self._peers.group,
                no_dist=self._peers.group is None,
            )
        except CheckpointException as error:
            raise first_failure(error) from error

    def verify(self, part: int = 0, parts: int = 1, only: str = "") -> None:
        """Compare every byte with its checksum.

        Args:
            part, parts: look only at chunks number `part`, `part + parts`, ...: the share of one of several
                processes.
            only: of the tensors, look at those whose names begin like this; the other files are all compared.

        Raises:
            Broken: what is damaged.
        """
        for name, entry in self._marker["files"].items():
            if "sha256" in entry:
                folders.verify_file(self.path, name, entry["sha256"])
        for name, digest in self._index.headers.items():
            if hash_header(self.path / name) != digest:
                raise Broken(f"{name} is damaged: its header does not match its checksum")
        chunks = [(name, entry.dtype, c) for name, entry in self._index.tensors.items() for c in entry.chunks]
        chunks = [item for item in chunks if item[0].startswith(only)]
        chunks.sort(key=lambda item: (item[2].record.file, item[2].record.start))
        for name, dtype, chunk in chunks[part::parts]:
            with (self.path / chunk.record.file).open("rb", buffering=0) as file:
                if hash_range(file, chunk.record.start, _size(chunk, dtype)) != chunk.record.sha256:
                    raise Broken(
                        f"{chunk.record.file} is damaged: the bytes of '{name}' do not match their checksum"
                    )
        self.verified = only if parts == 1 else None

    def _rows(self, name: str, chunk: Chunk, first: int, count: int) -> Tensor:
        """Rows of a chunk. Reads only these once all is verified, before that the whole chunk to check it."""
        dtype, shape = self._index.tensors[name].dtype, chunk.shape
        known = self.verified is not None and name.startswith(self.verified)
        whole = not shape or not known
        piece = torch.empty(shape if whole else (count, *shape[1:]), dtype=dtype)
        start = chunk.record.start + (0 if whole else first * _size(chunk, dtype) // max(shape[0], 1))
        digest = None if known else sha256()
        try:
            with (self.path / chunk.record.file).open("rb") as file:
                complete = read_into(file, start, raw_bytes(piece), digest)
        except OSError as error:
            raise self._error(f"{chunk.record.file} cannot be read: {error.strerror}", EARLIER) from error
        if not complete or (digest is not None and digest.hexdigest() != chunk.record.sha256):
            raise self._error(
                f"{chunk.record.file} is damaged: '{name}' does not match its checksum", EARLIER
            )
        return piece.narrow(0, first, count) if whole and shape else piece

    def _mismatch(self, tensors: Mapping[str, Tensor]) -> UserError | None:
        for name, tensor in tensors.items():
            entry = self._index.tensors.get(name)
            if entry is None:
                close = difflib.get_close_matches(name, self._index.tensors, 1)
                hint = f"the nearest it has is '{close[0]}'" if close else f"it has {_listed(self.names())}"
                return self._error(f"has no tensor '{name}'", f"{hint}: it is of another model or optimizer")
            if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
                stored, wanted = _kind(entry.shape, entry.dtype), _kind(tuple(tensor.shape), tensor.dtype)
                return self._error(
                    f"'{name}' is {stored}, the run needs {wanted}",
                    "resume with the recipe it was saved with",
                )
        return None

    def _small(self, name: str) -> bytes:
        folders.verify_file(self.path, name, self._marker["files"][name]["sha256"])
        return (self.path / name).read_bytes()

    def _error(self, what: str, fix: str) -> UserError:
        return UserError(what, where=f"checkpoint {self.path}", fix=fix)


def _size(chunk: Chunk, dtype: torch.dtype) -> int:
    return math.prod(chunk.shape) * dtype.itemsize


def _kind(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{'x'.join(map(str, shape)) or 'a scalar'} {str(dtype).removeprefix('torch.')}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def first_failure(error: CheckpointException) -> BaseException:
    """What really went wrong inside DCP, on the lowest rank that failed."""
    failures = error.failures
    return failures[min(failures)][0] if failures else error


def newest_in(
    root: Path, verify: bool, peers: Peers, before: int | None = None, only: str = ""
) -> tuple[Checkpoint | None, dict[int, str]]:
    """The newest usable checkpoint of a checkpoints folder, and the reason for each newer step that is not.

    Args:
        root: the checkpoints folder; it may be missing.
        verify: compare every byte with its checksum, shared among the peers; otherwise only sizes, index and
            meta data.
        peers: the processes that call this together.
        before: look only at steps below this one.
        only: to `verify`, compare of the tensors those whose names begin like this.
    """
    order = sorted(folders.entries(root), key=lambda entry: entry.sequence, reverse=True)
    known = {entry.step for entry in order}
    unreadable = {s: _marker_problem(p) for s, p in folders.step_folders(root).items() if s not in known}
    order = [entry for entry in order if before is None or entry.step < before]
    steps, reasons = peers.from_first(([entry.step for entry in order], unreadable))
    skipped: dict[int, str] = {}
    for step in steps:
        path = folders.step_folders(root).get(step, folders.step_folder(root, step))
        checkpoint, problem = usable(path, verify, peers, only)
        if checkpoint is not None:
            return checkpoint, skipped | {s: reason for s, reason in reasons.items() if s > step}
        skipped[step] = problem
    return None, skipped | reasons


def usable(path: Path, verify: bool, peers: Peers, only: str = "") -> tuple[Checkpoint | None, str]:
    """A checkpoint of a run, or None and the reason why it cannot be used; see `newest_in`."""
    checkpoint, problem = None, ""
    try:
        checkpoint = Checkpoint(path, peers)
        if verify:
            checkpoint.verify(peers.rank, peers.world, only)
    except (Broken, OSError) as error:
        problem = str(error)
    problem = next((p for p in peers.gather(problem) if p), "")
    if problem or checkpoint is None:
        return None, problem
    checkpoint.verified = only if verify else None
    return checkpoint, ""


def _marker_problem(folder: Path) -> str:
    try:
        folders.read_marker(folder)
    except Broken as broken:
        return str(broken)
    return "it appeared while the folder was being read"


def skipped_lines(
    root: Path, skipped: Mapping[int, str], used: Checkpoint | None, before: int | None = None
) -> list[str]:
    """A line about each checkpoint that `newest_in` passed over, newest first."""
    below = "" if before is None else f" below step {before}"
    instead = f"using step {used.step} instead" if used else f"no other one here{below} can be used"
    return [
        f"skipped checkpoint {folders.step_folder(root, step)}: {reason}; {instead}"
        for step, reason in sorted(skipped.items(), reverse=True)
    ]


def lost(root: Path, skipped: Mapping[int, str], nxd: Path, unfinished: Sequence[str]) -> UserError | None:
    """The error for a run whose checkpoints are there and cannot be used: to begin at step 0 would write over
    them. None where there are none, or only the one folder that a process killed in its very first save
    leaves.

    Args:
        root, skipped: the checkpoints folder, and what `newest_in` says when it finds none in it.
        nxd, unfinished: the folder of NxD's files, and the names in it that are not marked as complete.
    """
    reasons = [*skipped.values(), *(folders.NOT_COMPLETE for _ in unfinished)]
    if not reasons or reasons == [folders.NOT_COMPLETE]:
        return None
    known = [f"step {step}: {reason}" for step, reason in sorted(skipped.items())]
    known += [f"{name}: it is not marked as done" for name in sorted(unfinished)]
    return UserError(
        f"there are checkpoints and none can be used ({'; '.join(known)})",
        where=str(root if skipped else nxd),
        fix="restore one of them; to start anew move this folder away or choose another run.dir",
    )


def open_checkpoint(
    path: Path | str,
    warn: Callable[[str], None] | None = None,
    only: str | None = None,
    peers: Peers | None = None,
) -> Checkpoint:
    """Open a step folder, or the newest complete checkpoint of a checkpoints folder or a run folder.

    Args:
        path: the folder.
        warn: called on the first process with one line about each newer checkpoint that was skipped; the log
            by default.
        only: of a run, skip checkpoints in which the bytes of a tensor whose name begins like this, or of a
            file that is no tensor, are damaged; None = those tensors are compared when they are read.
        peers: the processes that call this together.

    Raises:
        UserError: nothing there, or what is there is incomplete or damaged.
    """
    path, peers = Path(path), peers or Peers()
    if not path.is_dir():
        raise UserError(
            "no such folder",
            where=str(path),
            fix="give a run folder or one of its checkpoints/step-* folders",
        )
    if (path / folders.MARKER).exists() or (path / folders.INDEX).exists() or path.name.startswith("step-"):
        try:
            return Checkpoint(path, peers)
        except Broken as broken:
            raise UserError(str(broken), where=f"checkpoint {path}", fix=EARLIER) from broken
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    checkpoint, skipped = newest_in(root, only is not None, peers, only=only or "")
    if checkpoint is None:
        raise _none_usable(path, skipped)
    for line in skipped_lines(root, skipped, checkpoint) if peers.rank == 0 else []:
        (warn or logging.getLogger(__name__).warning)(line)
    return checkpoint


def _none_usable(path: Path, skipped: Mapping[int, str]) -> UserError:
    reasons = "; ".join(f"step {step}: {reason}" for step, reason in sorted(skipped.items()))
    what = f"no checkpoint here can be used ({reasons})" if reasons else "no complete checkpoint here"
    fix = "give a run folder or one of its checkpoints/step-* folders"
    if reasons:
        fix = "copy one of them again"
    if any((path / "nxd-checkpoints").glob("step-*/done")):
        fix = f"turn NxD's files into one: hlat convert from-nxd {path} {path}"
    return UserError(what, where=str(path), fix=fix)
