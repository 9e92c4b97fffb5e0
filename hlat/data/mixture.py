"""The global order of training rows, as a pure function of (seed, row index).

Three steps, each constant time and without state:
1. `Quota`: row index -> (source, how many rows of that source came before). The weights are brought to whole
   numbers a_i with sum A; the order repeats with period A and is laid out once by earliest deadline: row n of
   source i is allowed from the moment its share n*a_i/A has begun and due when the share is complete. At
   every prefix each source is less than one row away from its exact share.
2. `permute`: the k-th row of a source -> a window of its tokens. Epoch e = k // windows has its own
   pseudo-random permutation of the windows: a keyed Feistel network on the smallest even number of bits,
   walked until it falls inside.
3. `SourceRows.read`: a window -> tokens. The shards form one ring; the windows of an epoch start at the
   epoch's own offset and tile the ring without overlap (each reads one token more, the next window's first,
   as the last target).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm

import numpy as np

from hlat.data.shard import Shard
from hlat.errors import UserError

_MAX_PERIOD = 2**16
_ROUNDS = 6
_MASK = 2**64 - 1


class Quota:
    """Deterministic weighted interleaving of sources."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.shares = whole_shares(weights)
        self.period = sum(self.shares)
        order = _by_deadline(self.shares)
        self._source = np.array(order, dtype=np.int32)
        self._rank = np.zeros(self.period, dtype=np.int64)
        for source in range(len(self.shares)):
            places = np.flatnonzero(self._source == source)
            self._rank[places] = np.arange(len(places))

    def locate(self, index: int) -> tuple[int, int]:
        """(source, number of earlier rows of that source) of the row with this global index."""
        turn, place = divmod(index, self.period)
        source = int(self._source[place])
        return source, turn * self.shares[source] + int(self._rank[place])

    def counts(self, rows: int) -> list[int]:
        """How many of the first `rows` rows come from each source."""
        turns, rest = divmod(rows, self.period)
        partial = np.bincount(self._source[:rest], minlength=len(self.shares))
        return [turns * share + int(more) for share, more in zip(self.shares, partial, strict=True)]


def whole_shares(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the proportion of the weights as written in decimals (0.67 is 67/100).

    Should their sum exceed 65,536 they are rounded to that sum, by largest remainder; no source gets less
    than 1.
    """
    if not weights or any(not 0 < weight < float("inf") for weight in weights):
        raise UserError(
            "weights must be finite and above 0",
            where="data.sources",
            fix="remove a source that shall not be used",
        )
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(fraction.denominator for fraction in exact))
    shares = [int(fraction * scale) for fraction in exact]
    divisor = gcd(*shares)
    shares = [share // divisor for share in shares]
    total = sum(shares)
    if total <= _MAX_PERIOD:
        return shares
    free = _MAX_PERIOD - len(shares)
    rounded = [1 + share * free // total for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (-(shares[i] * free % total), i))
    for i in by_remainder[: _MAX_PERIOD - sum(rounded)]:
        rounded[i] += 1
    return rounded


def _by_deadline(shares: Sequence[int]) -> list[int]:
    """One period of sources, each always less than one row from its share.

    Earliest deadline first, as in proportionate-progress ("Pfair") scheduling of unit tasks on one processor.
    """
    period = sum(shares)
    taken = [0] * len(shares)
    order = []
    for place in range(1, period + 1):
        allowed = (i for i, share in enumerate(shares) if place * share > taken[i] * period)
        chosen = min(allowed, key=lambda i: (-(-(taken[i] + 1) * period // shares[i]), i))
        taken[chosen] += 1
        order.append(chosen)
    return order


@lru_cache(maxsize=1024)
def _keys(seed: int, source: int, epoch: int) -> tuple[int, ...]:
    """Round keys of an epoch's permutation, and last the number its window offset is made of."""
    digest = hashlib.shake_256(f"hlat order {seed} {source} {epoch}".encode()).digest(8 * (_ROUNDS + 1))
    return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8))


def permute(index: int, size: int, seed: int, source: int, epoch: int) -> int:
    """The place of `index` in the epoch's permutation of range(size).

    A bijection for every (seed, source, epoch).
    """
    if not 0 <= index < size:
        raise ValueError(f"{index} is not in range({size})")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = _keys(seed, source, epoch)[:_ROUNDS]
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        index = left << half | right
        if index < size:
            return index


def _mix(value: int) -> int:
    """A 64-bit finaliser (the one of splitmix64)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


class SourceRows:
    """The rows of one source: fixed windows over the ring of its training tokens.

    Args:
        shards: the training shards in order.
        seq_len: targets per row; a row holds seq_len + 1 ids.
        source: number of the source in the recipe; with `seed` it keys the permutations.

    Raises UserError when there are fewer tokens than one row takes.
    """

    def __init__(self, shards: Sequence[Shard], seq_len: int, seed: int, source: int, where: str) -> None:
        self._shards, self._seq_len, self._seed, self._source = list(shards), seq_len, seed, source
        self._starts = np.cumsum([0, *(shard.count for shard in self._shards)])
        self.tokens = int(self._starts[-1])
        self.windows = self.tokens // seq_len
        self.dropped_per_epoch = self.tokens - self.windows * seq_len
        if self.windows == 0:
            raise UserError(
                f"the source has {self.tokens} training tokens, one row takes {seq_len}",
                where=where,
                fix="add text or lower data.seq_len",
            )

    def start(self, k: int) -> int:
        """Place in the ring where the k-th row of this source begins."""
        epoch, within = divmod(k, self.windows)
        offset = _keys(self._seed, self._source, epoch)[_ROUNDS] % self.tokens if epoch else 0
        return (
            offset + permute(within, self.windows, self._seed, self._source, epoch) * self._seq_len
        ) % self.tokens

    def spans(self, k: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first token, count) of the runs of tokens that make the k-th row of this source."""
        place, left = self.start(k), self._seq_len + 1
        while left:
            number = int(np.searchsorted(self._starts, place, side="right")) - 1
            first = place - int(self._starts[number])
            count = min(left, self._shards[number].count - first)
            yield number, first, count
            left -= count
            place = (place + count) % self.tokens

    def read(self, k: int) -> np.ndarray:
        """Ids (seq_len + 1,) int64 of the k-th row of this source."""
        row = np.empty(self._seq_len + 1, dtype=np.int64)
        filled = 0
        for number, first, count in self.spans(k):
            row[filled : filled + count] = self._shards[number].ids(first, first + count)
            filled += count
        return row


class TrainStream:
    """All training rows in their global order.

    Nothing here changes: the state of a run is the index of its next row.

    Args:
        sources: one `SourceRows` per source of the recipe.
        weights: their weights, any scale.
        eos_id: the id that ends a document.
        document_mask: whether `row` also numbers the documents.
    """

    def __init__(
        self, sources: Sequence[SourceRows], weights: Sequence[float], eos_id: int, document_mask: bool
    ) -> None:
        self.sources, self.quota = list(sources), Quota(weights)
        self._eos_id, self._document_mask = eos_id, document_mask

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(ids (S+1,) int64, documents (S+1,) int32 or None) of a global row index >= 0."""
        ids = self.ids(index)
        return ids, number_documents(ids[None], self._eos_id)[0] if self._document_mask else None

    def ids(self, index: int) -> np.ndarray:
        """Ids (S+1,) int64 of a global row index >= 0."""
        source, k = self.quota.locate(index)
        return self.sources[source].read(k)


def number_documents(ids_BT: np.ndarray, eos_id: int, bos_id: int | None = None) -> np.ndarray:
    """int32 (B, T): the documents of each row numbered from 0; an EOS belongs to the document it ends.

    Where one token is both BOS and EOS, it ends a document if the next document's BOS follows.
    """
    ends = ids_BT[:, :-1] == eos_id
    if bos_id == eos_id:
        ends &= ids_BT[:, 1:] == bos_id
    documents = np.zeros(ids_BT.shape, dtype=np.int32)
    np.cumsum(ends, axis=1, out=documents[:, 1:])
    return documents
