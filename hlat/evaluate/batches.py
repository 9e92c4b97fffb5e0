"""Continuations to be scored, laid into batches of few different shapes.

Requests that begin alike (the choices of a question, each after the same context) share one row: the common
beginning once, then what is different of each, side by side. `hlat.model.attention.branch_mask` keeps the
branches apart, and positions go on from the beginning, so each branch is computed as if it stood alone. One
forward pass serves all choices, with every kind of parallelism, and no cache.

Needs no torch: the plan is made once and sent to all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

SHORTEST_BEGINNING = 8  # tokens; for less, a mask costs more than is saved
LONGEST_SHARED_ROW = 2048  # positions of a row with branches: attention grows with the square
MOST_MASK = 1 << 28  # elements of a batch's mask


@dataclass(frozen=True)
class Request:
    """Tokens to score: `continuation` after `context`. Both have at least one token."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """All but the last token: what the model is fed."""
        return (*self.context, *self.continuation[:-1])


def cut_left(request: Request, max_length: int) -> tuple[Request, int]:
    """The request with tokens dropped from the left until the model can be fed it, and how many those are.

    At least one token of context stays; a continuation that is too long for that loses its own first tokens.
    """
    tokens = (*request.context, *request.continuation)
    over = len(tokens) - (max_length + 1)
    if over <= 0:
        return request, 0
    kept = max(1, len(request.context) - over)
    tokens = tokens[over:]
    return Request(tokens[:kept], tokens[kept:]), over


@dataclass
class Row:
    """Requests that share a beginning of `shared` tokens (all tokens of a request that is alone).

    members: (number of the request, request).
    """

    members: list[tuple[int, Request]]
    shared: int

    @property
    def length(self) -> int:
        """Positions the row takes."""
        return self.shared + sum(len(request.tokens) - self.shared for _, request in self.members)

    @property
    def branches(self) -> bool:
        """Whether anything follows the shared beginning."""
        return self.length > self.shared


@dataclass
class Batch:
    """B rows of S positions, and T predictions to take from them.

    ids, positions, branches: (B, S); branches is empty where no row has any.
    places: (T,) index of each prediction in the flattened rows. targets: (T,) the token to predict.
    owners: (T,) number of the request it belongs to, -1 for padding.
    """

    ids: list[list[int]]
    positions: list[list[int]]
    branches: list[list[int]]
    places: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)

    @property
    def cost(self) -> int:
        """Positions to compute."""
        return len(self.ids) * len(self.ids[0])

    def to_json(self) -> dict[str, Any]:
        """As plain lists, for sending."""
        return dict(vars(self))


def shape_bucket(length: int, multiple: int = 8) -> int:
    """The least of few lengths (eight for each doubling, all multiples of `multiple`) that holds `length`."""
    step = max(8, 2 ** max(0, length.bit_length() - 1) // 8)
    length = -(-length // step) * step
    return -(-length // multiple) * multiple


def row_bucket(rows: int, most: int) -> int:
    """The least power of two, or `most`, that holds so many rows."""
    return min(most, 1 << (rows - 1).bit_length()) if rows > 0 else 1


def share_beginnings(requests: Sequence[tuple[int, Request]], max_length: int) -> list[Row]:
    """Put requests into rows so that as few positions as possible are computed twice.

    Sorted by tokens, those that begin alike are neighbours. One joins the row before it if the row grows by
    less than a row of its own would take.

    Args:
        requests: (number, request), each short enough for the model.
        max_length: positions of the longest row without branches; one with branches takes up to half as many
            again, or LONGEST_SHARED_ROW if that is more.
    """
    rows: list[Row] = []
    longest = max(max_length * 3 // 2, LONGEST_SHARED_ROW)
    for number, request in sorted(requests, key=lambda item: item[1].tokens):
        tokens = request.tokens
        if rows and (row := _joined(rows[-1], number, request, longest)):
            rows[-1] = row
        else:
            rows.append(Row([(number, request)], len(tokens)))
    return rows


def _joined(row: Row, number: int, request: Request, longest: int) -> Row | None:
    """The row with one more request, or None where it is better off alone."""
    tokens = request.tokens
    shared = min(row.shared, common_length(row.members[0][1].tokens, tokens))
    joined = Row([*row.members, (number, request)], shared)
    same = not joined.branches
    if same or (shared >= SHORTEST_BEGINNING and joined.length < row.length + len(tokens)):
        return joined if same or joined.length <= longest else None
    return None


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    shortest = min(len(a), len(b))
    if a[:shortest] == b[:shortest]:
        return shortest
    low, high = 0, shortest  # a[:low] is common, a[:high] is not
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def plan(rows: Sequence[Row], batch_size: int, multiple: int = 8, few_shapes: bool = True) -> Iterator[Batch]:
    """Batches of rows of about equal length, the longest first: what does not fit in memory fails at once.

    Args:
        batch_size: rows of a batch at most.
        multiple: lengths are multiples of it (of the tensor-parallel ranks under sequence parallelism).
        few_shapes: pad to few shapes, for a device that compiles a graph for each; else as little as can be.
    """
    for branches in (False, True):
        chosen = sorted((row for row in rows if row.branches == branches), key=lambda row: -row.length)
        while chosen:
            longest = chosen[0].length
            length = shape_bucket(longest, multiple) if few_shapes else -(-longest // multiple) * multiple
            most = max(1, min(batch_size, MOST_MASK // length**2)) if branches else batch_size
            part, chosen = chosen[:most], chosen[most:]
            yield _lay_out(part, row_bucket(len(part), most) if few_shapes else len(part), length)


def _lay_out(rows: Sequence[Row], count: int, length: int) -> Batch:
    empty = Batch([], [], [])
    branches: list[list[int]] = []
    for index in range(count):
        members = rows[index].members if index < len(rows) else []
        shared = rows[index].shared if members else 0
        ids = list(members[0][1].tokens[:shared]) if members else []
        positions, marks = list(range(shared)), [0] * shared
        for branch, (number, request) in enumerate(members, 1):
            rest = request.tokens[shared:]
            _add_targets(empty, number, request, index * length, shared, len(ids))
            ids += rest
            positions += range(shared, shared + len(rest))
            marks += [branch] * len(rest)
        pad = length - len(ids)
        empty.ids.append(ids + [0] * pad)
        empty.positions.append(positions + [0] * pad)
        branches.append(marks + [len(members) + 1] * pad)
    if any(row.branches for row in rows):
        empty.branches = branches
    pad = shape_bucket(len(empty.places)) - len(empty.places)
    empty.places += [0] * pad
    empty.targets += [0] * pad
    empty.owners += [-1] * pad
    return empty


def _add_targets(batch: Batch, number: int, request: Request, row: int, shared: int, branch: int) -> None:
    """Note where a request's continuation is predicted: row starts at `row`, its branch at `branch` in it."""
    first = len(request.context) - 1
    for position, token in enumerate(request.continuation, first):
        at = position if position < shared else branch + position - shared
        batch.places.append(row + at)
        batch.targets.append(token)
        batch.owners.append(number)
