"""How logical tensors lie in the files, and the two ends that torch.distributed.checkpoint (DCP) plugs into.

DCP plans: it turns any mixture of plain tensors, DTensors and subclasses with `__create_write_items__` into
rectangles of logical tensors, drops duplicates between ranks, balances the writes, and when loading finds the
stored rectangles each rank needs. So a checkpoint saved in one layout loads in any other. How the rectangles
are stored is decided here, because neither of DCP's own formats (torch 2.9 and 2.13) will do:

- `FileSystemWriter` keeps the plan in a pickle (`.metadata`), and reading a pickle runs the code in it.
- `HuggingFaceStorageWriter` files a rectangle under its tensor's name alone: of several rectangles of one
  tensor on one rank (a ZeRO-1 shard of a flat bucket) it keeps the last and loses the others without an
  error. It also holds a second copy of each file in memory.

Here the rectangles go into safetensors files and the plan into `index.json`; both are data, and checksummed.
A tensor saved whole is stored under its own name, a part of one as `name@row,column`.
"""

from __future__ import annotations

import errno
import json
import math
import operator
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from hlat.checkpoint.codec import CODE_DTYPES, DTYPE_CODES, ChunkRecord, hash_header, write_tensors
from hlat.checkpoint.folder import Broken
from hlat.host import json_text

_DATA_FILE = re.compile(r"data-\d{5,}\.safetensors")


@dataclass(frozen=True)
class Chunk:
    """One stored rectangle: its `offset` in the logical tensor, its `shape` and where its bytes are."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    record: ChunkRecord


@dataclass(frozen=True)
class Entry:
    """One logical tensor; its chunks cover it without overlap."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def complete(self) -> bool:
        """Whether the chunks have as many elements as the tensor and none sticks out of it."""
        inside = all(
            o >= 0 and n >= 0 and o + n <= size
            for chunk in self.chunks
            for o, n, size in zip(chunk.offset, chunk.shape, self.shape, strict=True)
        )
        return inside and sum(math.prod(chunk.shape) for chunk in self.chunks) == math.prod(self.shape)


@dataclass(frozen=True)
class Index:
    """The content of `index.json`: logical tensors by global name, and each data file's header checksum."""

    tensors: dict[str, Entry]
    headers: dict[str, str]

    def to_json(self) -> bytes:
        """The text of `index.json`, in UTF-8; the same for equal indexes."""
        tensors = {
            name: {
                "dtype": DTYPE_CODES[entry.dtype],
                "shape": entry.shape,
                "chunks": [{"offset": c.offset, "shape": c.shape, **vars(c.record)} for c in entry.chunks],
            }
            for name, entry in sorted(self.tensors.items())
        }
        return json.dumps({"headers": self.headers, "tensors": tensors}, separators=(",", ":")).encode()

    @staticmethod
    def from_json(text: bytes) -> Index:
        """Raises Broken if the text is no such index, or describes a tensor that its chunks do not cover."""
        try:
            data = json_text.loads(text)
            tensors = {name: _entry(item) for name, item in data["tensors"].items()}
            headers = {str(name): str(digest) for name, digest in data["headers"].items()}
            wrong = [name for name, entry in tensors.items() if not entry.complete()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Broken(f"index.json cannot be read: {error!r}") from error
        records = [chunk.record for entry in tensors.values() for chunk in entry.chunks]
        wrong += [r.file for r in records if r.start < 0 or r.file not in headers]
        wrong += [file for file in headers if not _DATA_FILE.fullmatch(file)]
        if wrong:
            raise Broken(f"index.json describes '{wrong[0]}' wrongly")
        return Index(tensors, headers)


def _entry(item: dict[str, Any]) -> Entry:
    chunks = [
        Chunk(
            _sizes(c["offset"]),
            _sizes(c["shape"]),
            ChunkRecord(c["file"], operator.index(c["start"]), c["sha256"]),
        )
        for c in item["chunks"]
    ]
    return Entry(CODE_DTYPES[item["dtype"]], _sizes(item["shape"]), tuple(chunks))


def _sizes(items: list[Any]) -> tuple[int, ...]:
    return tuple(map(operator.index, items))


def data_file(number: int) -> str:
    """Name of the data file of one rank, or of one part of a streamed checkpoint."""
    return f"data-{number:05d}.safetensors"


# -- saving
# ------------------------------------------------------------------------------------------------------------


class Snapshot(DefaultSavePlanner):
    """This rank's part of the tensors, cut into DCP's write items at once; saved now or later in another
    thread.

    Args:
        tensors: global name -> plain tensor, DTensor or subclass with DCP's `__create_write_items__`.
        buffers: staging memory kept by the caller between saves; the values are copied there (pinned memory
            for CUDA), and the tensors may change as soon as this returns. None to refer to the tensors
            themselves.

    Cutting first and copying pieces, rather than copying tensors as DCP's stagers do, also serves subclasses
    that are mere views of a flat buffer and have no copy of their own kind.
    """

    def __init__(self, tensors: Mapping[str, Tensor], buffers: dict[MetadataIndex, Tensor] | None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"'{name}' is a {type(tensor).__name__}, not a tensor: it belongs into the meta data"
                )
        cutter = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        cutter.set_up_planner(dict(tensors), is_coordinator=True)
        self.items = [item for item in cutter.create_local_plan().items if _stored(item)]
        self.pieces: dict[MetadataIndex, Tensor] = {}
        for item in self.items:
            piece = cutter.resolve_data(item)
            assert isinstance(piece, Tensor)
            piece = piece.detach()
            self.pieces[item.index] = piece if buffers is None else _staged(item.index, piece, buffers)
        if buffers is not None and any(piece.is_pinned() for piece in self.pieces.values()):
            torch.cuda.synchronize()

    def bytes(self) -> int:
        """Bytes of this rank's pieces, before duplicates on other ranks are dropped."""
        return sum(piece.numel() * piece.element_size() for piece in self.pieces.values())

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        self.state_dict, self.is_coordinator = {}, is_coordinator

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self.items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.pieces[write_item.index]


def _stored(item: WriteItem) -> bool:
    """False for the empty part a rank has of a tensor too small for all ranks."""
    assert item.type != WriteItemType.BYTE_IO and item.tensor_data is not None
    return math.prod(item.tensor_data.chunk.sizes) > 0 or math.prod(item.tensor_data.size) == 0


def _staged(index: MetadataIndex, piece: Tensor, buffers: dict[MetadataIndex, Tensor]) -> Tensor:
    buffer = buffers.get(index)
    pinned = piece.device.type == "cuda"
    if buffer is None or buffer.shape != piece.shape or buffer.dtype != piece.dtype:
        buffer = buffers[index] = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=pinned)
    return buffer.copy_(piece, non_blocking=pinned)


class Writer(StorageWriter):
    """Writes each rank's pieces into one safetensors file of a partial folder.

    Args:
        folder: the partial folder, the same on all ranks.
        finish: called on the coordinator after all ranks have written, with the index and the names of the
            data files; an exception it raises is raised on every rank.
    """

    def __init__(self, folder: Path, finish: Callable[[Index], None]) -> None:
        super().__init__()
        self.folder, self.on_finish = folder, finish

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        """The folder is fixed when the object is made."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [SavePlan(plan.items, storage_data=data_file(rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        items = sorted(plan.items, key=_order)
        entries = [(_key(item), cast(Tensor, planner.resolve_data(item))) for item in items]
        needed = sum(tensor.numel() * tensor.element_size() for _, tensor in entries)
        if needed > shutil.disk_usage(self.folder).free:  # before the disk is full for everybody else too
            raise OSError(errno.ENOSPC, "No space left on device", str(self.folder))
        records = write_tensors(self.folder / plan.storage_data, entries) if entries else []
        done: Future[list[WriteResult]] = Future()
        done.set_result(
            [WriteResult(item.index, 0, record) for item, record in zip(items, records, strict=True)]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        records = {result.index: result.storage_data for part in results for result in part}
        tensors = {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            chunks = [
                Chunk(tuple(c.offsets), tuple(c.sizes), records[MetadataIndex(name, c.offsets)])
                for c in stored.chunks
            ]
            tensors[name] = Entry(stored.properties.dtype, tuple(stored.size), tuple(chunks))
            if not tensors[name].complete():
                raise ValueError(f"the ranks hold only a part of tensor '{name}'")
        self.on_finish(make_index(self.folder, tensors))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        return isinstance(checkpoint_id, (str, PathLike))


def make_index(folder: Path, tensors: dict[str, Entry]) -> Index:
    """The index of tensors just written into `folder`. Raises OSError."""
    files = sorted({chunk.record.file for entry in tensors.values() for chunk in entry.chunks})
    return Index(tensors, {name: hash_header(folder / name) for name in files})


def _order(item: WriteItem) -> tuple[int, str, tuple[int, ...]]:
    """Wide elements first, for alignment; then by name, so that equal states give equal files."""
    assert item.tensor_data is not None
    return -item.tensor_data.properties.dtype.itemsize, item.index.fqn, tuple(item.index.offset or ())


def _key(item: WriteItem) -> str:
    """The tensor's name in the data file."""
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    name = item.index.fqn
    return name if chunk.sizes == item.tensor_data.size else f"{name}@{','.join(map(str, chunk.offsets))}"


# -- loading
# -----------------------------------------------------------------------------------------------------------

ReadRows = Callable[[str, Chunk, int, int], Tensor]


class Reader(StorageReader):
    """Serves DCP's read items from an opened checkpoint.

    Args:
        contents: the checkpoint's index.
        read_rows: `(name, chunk, first, count)` -> that many rows of the chunk (dimension 0), a CPU tensor; a
            chunk of a 0-dimensional tensor counts as one row.
    """

    def __init__(self, contents: Index, read_rows: ReadRows) -> None:
        super().__init__()
        self.contents, self.read_rows = contents, read_rows

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        """The checkpoint is fixed when the object is made."""

    def read_metadata(
        self, *args: Any
    ) -> Metadata:  # (without `kwargs` DCP does not look for files per rank)
        tensors: dict[str, Any] = {}
        storage: dict[MetadataIndex, Chunk] = {}
        for name, entry in self.contents.tensors.items():
            chunks = [ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.shape)) for c in entry.chunks]
            kind = TensorProperties(dtype=entry.dtype)
            tensors[name] = TensorStorageMetadata(kind, torch.Size(entry.shape), chunks)
            storage |= {MetadataIndex(name, chunk.offset): chunk for chunk in entry.chunks}
        return Metadata(tensors, storage_data=storage)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        self.chunks: dict[MetadataIndex, Chunk] = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in sorted(plan.items, key=lambda item: _place(self.chunks[item.storage_index])):
            assert item.type == LoadItemType.TENSOR, "nothing but tensors is stored"
            rows = (item.storage_offsets[0], item.lengths[0]) if item.lengths else (0, 1)
            piece = self.read_rows(item.storage_index.fqn, self.chunks[item.storage_index], *rows)
            for dim in range(1, len(item.lengths)):
                piece = piece.narrow(dim, item.storage_offsets[dim], item.lengths[dim])
            target = planner.resolve_tensor(item).detach()
            target.copy_(piece)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        return isinstance(checkpoint_id, (str, PathLike))


def _place(chunk: Chunk) -> tuple[str, int]:
    return chunk.record.file, chunk.record.start


def boxes(entry: Entry) -> Iterator[tuple[Chunk, tuple[slice, ...]]]:
    """The chunks of a tensor with the index expression each one fills."""
    for chunk in entry.chunks:
        yield chunk, tuple(slice(o, o + s) for o, s in zip(chunk.offset, chunk.shape, strict=True))
