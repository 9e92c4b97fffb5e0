"""The common part of reducers that send less than the gradient: one compressor and one error store for each
bucket of matrices, driven over the replicas.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hlat.backend.groups import Group, Pending
from hlat.reduce.base import Reducer
from hlat.reduce.compressors import Ask, Compressor, Exchange, Feed
from hlat.reduce.dense import Dense
from hlat.reduce.grid import Grid, Sent
from hlat.reduce.stores import Nothing

if TYPE_CHECKING:
    from hlat.parallel.buckets import Bucket

Matrices = Sequence[tuple[int, int, int]]
MakeCompressor = Callable[[Grid, Matrices, int, torch.device], Compressor]
MakeStore = Callable[[Grid, torch.device], Nothing]


@dataclass
class Memory:
    """What lasts from step to step for one bucket."""

    grid: Grid
    matrices: Matrices
    compressor: Compressor
    store: Nothing

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {**self.store.state(), **self.compressor.state()}

    def feed(self, grad: Tensor, count: Tensor, dtype: torch.dtype, own: int | None = None) -> Feed:
        """A gradient, 1-D of the bucket's length, as the compressor reads it."""
        grid = self.grid
        view = grid.view(grad)
        return Feed(grid, view, self.store.read, count, dtype, self.matrices, grid.shards, own)

    def without_padding(self, reduced: Tensor, shard: int = 0) -> Tensor:
        """A reduced bucket (or its shard of this number) with zeros behind the last parameter: a sketch
        spreads some error there too.
        """
        offset, rows, columns = self.matrices[-1]
        used = max(0, offset + rows * columns - shard * self.grid.shard)
        if used < reduced.numel():
            reduced[used:].zero_()
        return reduced

    def error_bytes(self) -> int:
        """Bytes of the error store."""
        return sum(tensor.nbytes for tensor in self.store.state().values())


class Talk:
    """One bucket's exchange with the other replicas, round by round.

    Args:
        memory, feed: of the bucket. group: the replicas. `feed.own` set: ZeRO-1, a replica gets its shard.
    """

    def __init__(self, memory: Memory, feed: Feed, group: Group) -> None:
        self.memory, self.feed, self.group = memory, feed, group
        self.bytes = 0
        self.health: Tensor | None = None  # 0, or NaN where this rank's gradient is not finite
        self.reduced: Tensor
        self._exchange: Exchange = memory.compressor.exchange(feed)
        self._ask(next(self._exchange))

    def advance(self) -> bool:
        """Wait for the round under way and begin the next; True when there is none left."""
        self._pending.wait()
        try:
            self._ask(self._exchange.send(self._result))
        except StopIteration as done:
            parts, sent = done.value
            self.reduced = self.memory.without_padding(self.feed.grid.flat(parts), self.feed.own or 0)
            self._stage(sent)
            return True
        return False

    def commit(self, keep: Tensor) -> None:
        """Move store and compressor where `keep` () is True."""
        self.memory.store.commit(keep)
        self.memory.compressor.commit(keep)

    def _ask(self, ask: Ask) -> None:
        tensor = ask.tensor.contiguous()
        self.bytes += tensor.nbytes
        self._pending: Pending
        if ask.scatter and self.feed.own is not None:
            self._result = tensor.new_empty(1, *tensor.shape[1:])
            self._pending = self.group.start_reduce_scatter(self._result.view(-1), tensor.view(-1))
        else:
            self._result = tensor
            self._pending = self.group.start_all_reduce(tensor, ask.op)
        if ask.sent is not None:
            self._stage(ask.sent)  # while the collective is under way

    def _stage(self, sent: Sent) -> None:
        if self.health is None:
            self.health = self.memory.store.stage(self.feed.grad, sent)


class Compressed(Reducer):
    """A reducer that sends a part of each bucket of matrices, remembers the rest, and sums vectors densely.

    Args:
        dtype: dtype the sum travels in.
        group: the replicas.
        compressor, store: make those of one bucket.
        ratio: share of a bucket that is sent at a time, by which its units are sized.
        start_step: global batches that are reduced densely first.
        reset_below: forget the error when the learning rate falls to at most this share of the one before.
        summary: what was chosen, in a line.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        group: Group,
        compressor: MakeCompressor,
        store: MakeStore,
        *,
        ratio: float = 0.1,
        start_step: int = 10,
        reset_below: float = 0.0,
        summary: str = "",
    ) -> None:
        self.dtype, self.group, self.summary = dtype, group, summary
        self.start_step, self.reset_below = start_step, reset_below
        self.count = torch.zeros((), dtype=torch.int64)
        self._make = compressor, store, ratio
        self._dense = Dense(dtype, group)
        self._memories: dict[int, Memory] = {}
        self._names: list[str] = []
        self._remarks: list[str] = []
        self._talks: dict[int, Talk] = {}
        self._finished: list[Talk] = []
        self._step = self._wire = self._wire_last = self._full = 0
        self._numbers: dict[int, Tensor] = {}

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        """Make the error stores, so that a checkpoint can be loaded into them."""
        for bucket in buckets:
            self._memory(bucket)

    def begin(self, step: int, change: float) -> str:
        """A global batch begins: the error may be forgotten."""
        self._step = step
        if self.reset_below and change <= self.reset_below:
            self.reset()
            return "the reducer forgets its error"
        return "the reducer compresses from here on" if 0 < step == self.start_step else ""

    def start(self, bucket: Bucket) -> None:
        """Begin a bucket's reduction as soon as its gradient is complete, while backward goes on."""
        memory = self._memory(bucket)
        if memory is None or self._step < self.start_step:
            self._dense.start(bucket)
            self._wire += bucket.length * self.dtype.itemsize
            self._talks.pop(id(bucket), None)
        else:
            own = None if bucket.master.numel() == bucket.length else self.group.rank
            feed = memory.feed(bucket.grad, self.count, self.dtype, own)
            with torch.no_grad():
                self._talks[id(bucket)] = Talk(memory, feed, self.group)

    @torch.no_grad()
    def reduce(self, buckets: Sequence[Bucket]) -> list[Tensor]:
        """This rank's share of each reduced bucket, 1-D (all of it without ZeRO-1)."""
        for bucket in buckets:
            if id(bucket) not in self._talks and not self._dense.started(bucket):
                self.start(bucket)
        talks, self._talks = self._talks, {}
        waiting = list(talks.values())
        while waiting:  # round by round, so that the buckets' collectives overlap
            waiting = [talk for talk in waiting if not talk.advance()]
        dense = iter(self._dense.reduce([b for b in buckets if id(b) not in talks]))
        shards = [talks[id(b)].reduced if id(b) in talks else next(dense) for b in buckets]
        self._finished = list(talks.values())
        self._set_bytes(buckets)
        self._step += 1
        return shards

    def health(self) -> Tensor:
        """0, or NaN when this rank's gradient, sent or not, has a value that is not finite: fp32 ()."""
        marks = [talk.health for talk in self._finished if talk.health is not None]
        return torch.stack(marks).sum() if marks else torch.zeros((), device=self.count.device)

    @torch.no_grad()
    def commit(self, keep: Tensor) -> None:
        """Take the error of the last reduction over where `keep` () bool is True; else all stays bitwise."""
        for talk in self._finished:
            talk.commit(keep)
        if self._finished:
            self.count.add_(1)
        self._finished = []

    def forget(self, reason: str) -> None:
        """Start with an empty error after a restart, and say so: it belongs to replicas that are no more."""
        self.reset()
        self._remarks = [f"the error starts at zero: {reason}"]

    def reset(self) -> None:
        """Forget the error."""
        for memory in self._memories.values():
            for tensor in memory.store.state().values():
                tensor.zero_()

    def state(self) -> dict[str, Tensor]:
        """Tensors that belong in a checkpoint, by name. Those under `local/` are this rank's own, and mean
        something only in the layout they were saved in.
        """
        own = f"local/rank-{self.group.ranks[self.group.rank]}"
        named = {"count": self.count}
        for name, memory in zip(self._names, self._memories.values(), strict=True):
            named.update((f"{own}/{name}/{part}", tensor) for part, tensor in memory.tensors().items())
        return named

    def metrics(self) -> dict[str, Tensor]:
        """Bytes this rank gave to collectives in the last step and would have given densely; norm and bytes
        of its error.
        """
        bytes_held = sum(memory.error_bytes() for memory in self._memories.values())
        squares = [memory.store.squared_norm() for memory in self._memories.values()]
        zero = torch.zeros((), device=self.count.device)
        return {
            "reduce/wire_bytes": self._number(self._wire_last),
            "reduce/dense_bytes": self._number(self._full),
            "reduce/error_norm": torch.stack(squares).sum().sqrt() if squares else zero,
            "reduce/error_bytes": self._number(bytes_held),
        }

    def describe(self) -> list[str]:
        """What to say at the start of a run."""
        held = sum(memory.error_bytes() for memory in self._memories.values())
        exact = sum(4 * memory.grid.length for memory in self._memories.values())
        text = f"{self.summary}; error {held / 1e6:,.1f} MB a rank"
        return [text if held == exact else f"{text} instead of {exact / 1e6:,.1f} MB", *self._remarks]

    def _memory(self, bucket: Bucket) -> Memory | None:
        """The memory of a bucket of matrices, made when it is first seen; None for a bucket of vectors."""
        if any(len(spec.part.shape) < 2 for spec in bucket.specs):
            return None
        if id(bucket) not in self._memories:
            self.count = self.count.to(bucket.grad.device)
            self._names.append(f"bucket-{len(self._names)}")
            memory = make_memory(
                bucket.length,
                [(spec.offset, spec.shape[0], spec.numel // spec.shape[0]) for spec in bucket.specs],
                bucket.specs[0].path,
                bucket.grad.device,
                self.group.size,
                *self._make,
            )
            self._memories[id(bucket)] = memory
        return self._memories[id(bucket)]

    def _set_bytes(self, buckets: Sequence[Bucket]) -> None:
        self._wire_last = self._wire + sum(talk.bytes for talk in self._finished)
        self._wire = 0
        self._full = sum(bucket.length for bucket in buckets) * self.dtype.itemsize

    def _number(self, value: int) -> Tensor:
        """A number as a tensor on the device, made once."""
        if value not in self._numbers:
            self._numbers[value] = torch.tensor(value, device=self.count.device)
        return self._numbers[value]


def make_memory(
    length: int,
    matrices: Matrices,
    name: str,
    device: torch.device,
    replicas: int,
    compressor: MakeCompressor,
    store: MakeStore,
    ratio: float,
) -> Memory:
    """A bucket's memory.

    Args:
        length: of the bucket. matrices: (offset, rows, columns) of each parameter in it.
        name: of its first parameter: it salts the choice of blocks.
        replicas: how many take part.
        compressor, store: make these two.
        ratio: the share of a bucket that is sent, by which units are sized.
    """
    grid = Grid.fit(length, replicas, ratio)
    salt = zlib.crc32(name.encode()) & 0x7FFFFFFF
    return Memory(grid, matrices, compressor(grid, matrices, salt, device), store(grid, device))
