"""Which documents a step's batch was made of: found from the data order, so that training notes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from hlat.data.batch import rows_of

if TYPE_CHECKING:
    from hlat.data.loader import Data
    from hlat.data.shard import Shard

Found = dict[str, Any]
"""One document in one row: see `documents_in`."""


def rows_in(step: int, global_batch: int) -> range:
    """Numbers of the rows that data step `step` (from 1) holds."""
    if step < 1:
        raise ValueError(f"steps are counted from 1, got {step}")
    return rows_of(step - 1, global_batch, 1, 0, 1, global_batch)[0]


def documents_in(data: Data, row: int) -> Iterator[Found]:
    """The documents in a global row, in order, as JSON values.

    `source`: number in the recipe; `folder`, `shard`: the tokenized folder and its shard; `document`: number
    in the shard; `hash`: of its content, as the shard's table has it; `first`, `last`: which of its `tokens`
    (the end-of-document token included) the row holds, counted from 0.
    """
    number, k = data.train.quota.locate(row)
    folder = data.folders[number]
    for shard_number, first, count in data.train.sources[number].spans(k):
        shard = folder.shards["train"][shard_number]
        for document, begin, end in _overlapping(shard, first, first + count):
            yield {
                "source": number,
                "folder": str(folder.folder),
                "shard": shard.path.stem,
                "document": document,
                "hash": f"{int(shard.table[document, 2]):016x}",
                "first": max(first, begin) - begin,
                "last": min(first + count, end) - begin - 1,
                "tokens": end - begin,
            }


def document_ids(data: Data, found: Found) -> np.ndarray:
    """All ids of a document that `documents_in` has found, without the end-of-document token: int64 (n,)."""
    shards = data.folders[found["source"]].shards["train"]
    shard = next(shard for shard in shards if shard.path.stem == found["shard"])
    number = found["document"]
    begin = int(shard.table[number - 1, 0]) if number else 0
    return shard.ids(begin, int(shard.table[number, 0]) - 1)


def _overlapping(shard: Shard, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(number, first token, end) of the documents with tokens in [first, stop) of a shard."""
    ends = shard.table[:, 0]
    number = int(np.searchsorted(ends, first, side="right"))
    begin = int(ends[number - 1]) if number else 0
    while begin < stop:
        end = int(ends[number])
        yield number, begin, end
        number, begin = number + 1, end
