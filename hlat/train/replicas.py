"""Whether ranks that hold the same weights and masters still do: a checksum of each bucket, compared over the
whole job.

Replicas compute the same update from the same gradient, so their weights are equal bit for bit. When they are
not, memory or a device is at fault, or a kernel that is not deterministic, and every further step mixes wrong
numbers into the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hlat.errors import TrainingStopped

if TYPE_CHECKING:
    from hlat.parallel.buckets import Bucket
    from hlat.parallel.plan import Part
    from hlat.train.run import Run

_ROW = 1024
_BLOCK = 1 << 22  # elements summed at a time: integers of 8 bytes are made of them
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(flat: Tensor) -> Tensor:
    """Three sums over the bit patterns of a tensor, int64 (3): plain, weighted by row, weighted by column of
    rows of 1024 elements. They wrap around. Any single changed bit changes the first; elements that change
    places, the others.
    """
    if flat.device.type == "xla":  # there a view of the bits is no view
        flat = flat.cpu()
    bits = flat.detach().reshape(-1).view(_BITS[flat.element_size()])
    total = torch.zeros(3, dtype=torch.int64, device=flat.device)
    for start in range(0, bits.numel(), _BLOCK):
        block = bits[start : start + _BLOCK].to(torch.int64)
        block = torch.nn.functional.pad(block, (0, -block.numel() % _ROW)).view(-1, _ROW)
        rows, columns = block.sum(1), block.sum(0)
        first = start // _ROW + 1
        place = torch.arange(first, first + len(rows), device=flat.device)
        column = torch.arange(1, _ROW + 1, device=flat.device)
        total += torch.stack([rows.sum(), (rows * place).sum(), (columns * column).sum()])
    return total


def verify(run: Run, names: Sequence[str], gather: Callable[[Any], list[Any]]) -> None:
    """Compare the weights of every rank with those of the ranks that hold the same parts. Collective; the
    host waits for the device.

    Args:
        run: its buckets' weights, its masters where replicas hold the same ones, its frozen parameters.
        names: of the ranks, for the message.
        gather: every rank's JSON value, by rank, on every rank.

    Raises:
        TrainingStopped: on every rank alike, naming the ranks that differ: the fewer of three and more, both
            of two.
    """
    frozen = {_key([name], [held.part]): held.value for name, held in run.frozen.items()}
    tables = gather(_table({what: flat for b in run.buckets for what, flat in _whole(b)} | frozen))
    if not any(_split(tables)):
        return
    single = {what: flat for b in run.buckets for what, flat in _single(b)}
    tables = gather(_table(single | frozen))
    for key, holders in _split(tables):
        raise TrainingStopped(
            f"after step {run.step} {_who(holders, names)} in {key}",
            where="parallel.verify_every",
            fix="check that machine's memory and device, then continue from a checkpoint before this step",
        )


def _table(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    if not tensors:
        return {}
    sums = torch.stack([checksum(tensor) for tensor in tensors.values()]).tolist()
    return dict(zip(tensors, sums, strict=True))


def _whole(bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
    """A bucket's weights, and its masters unless ZeRO-1 cut them, each with a text that is the same on all
    ranks that hold the same.
    """
    if bucket.apart:
        yield from _single(bucket)
        return
    key = _key([s.name for s in bucket.specs], [s.part for s in bucket.specs])
    yield key, bucket.weights
    if bucket.master.numel() == bucket.length:
        yield f"the master of {key}", bucket.master


def _single(bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
    """`_whole`, parameter by parameter."""
    for spec, weights in zip(bucket.specs, bucket.computed_with(), strict=True):
        key = _key([spec.name], [spec.part])
        yield key, weights.detach()
        if bucket.master.numel() == bucket.length:
            yield f"the master of {key}", spec.view(bucket.master)


def _key(names: Sequence[str], parts: Sequence[Part]) -> str:
    texts = []
    for name, part in zip(names, parts, strict=True):
        ranges = ", ".join(f"{o}:{o + n}" for o, n in zip(part.offset, part.size, strict=True))
        texts.append(f"{name}[{ranges}]")
    return " ".join(texts)


def _split(tables: Sequence[Mapping[str, list[int]]]) -> list[tuple[str, dict[int, tuple[int, ...]]]]:
    """What is not the same on all ranks that hold it: key and checksum by rank."""
    held: dict[str, dict[int, tuple[int, ...]]] = {}
    for rank, table in enumerate(tables):
        for key, sums in table.items():
            held.setdefault(key, {})[rank] = tuple(sums)
    return [(key, holders) for key, holders in held.items() if len(set(holders.values())) > 1]


def _who(holders: Mapping[int, tuple[int, ...]], names: Sequence[str]) -> str:
    common, count = Counter(holders.values()).most_common(1)[0]
    if count <= len(holders) / 2:
        return f"{' and '.join(names[rank] for rank in holders)} hold different weights"
    wrong = [names[rank] for rank, sums in holders.items() if sums != common]
    right = [str(rank) for rank, sums in holders.items() if sums == common]
    verb = "holds" if len(wrong) == 1 else "hold"
    return f"{', '.join(wrong)} {verb} other weights than ranks {', '.join(right)}"
