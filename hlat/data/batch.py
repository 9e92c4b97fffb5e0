"""What the model is fed: token ids, targets, and where documents begin."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from hlat.data.mixture import number_documents

IGNORE = -100


@dataclass
class Batch:
    """B rows of S tokens; every batch of a run has the same shapes.

    Attributes:
        ids: (B, S) int64.
        targets: (B, S) int64, the next id; -100 where there is none to learn.
        positions: (B, S) int64, counted from the document's first token in the row; None without a document
            mask (0..S-1 is meant).
        documents: (B, S) int32, the row's documents numbered from 0; None without a document mask.
    """

    ids: Tensor
    targets: Tensor
    positions: Tensor | None = None
    documents: Tensor | None = None

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device (the copy may still be under way on an accelerator)."""
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        return replace(
            self, **{name: p.to(device, non_blocking=True) for name, p in parts.items() if p is not None}
        )

    def targets_count(self) -> Tensor:
        """Number of targets that are not -100: int64 scalar, on the batch's device."""
        return (self.targets != IGNORE).sum()


@dataclass
class LabelledBatch(Batch):
    """B examples with C possible labels each, in rows of S tokens.

    An example has one row, its prompt, when every label is one token or labels are not spelled; else C rows,
    row c ending in label c. `targets` has what the loss is divided by: one target for each example (its last
    prompt token), or each token of its right label.

    Attributes:
        labels: (B,) int64, the right label; -100 for a row that only fills the batch.
        places: (B C, L) int64, or (B, 1) without spelled labels: the places in a row where the L tokens of a
            label are predicted. Candidate n of the first axis is in row n // (B C / rows).
        tokens: (B C, L) int64, the tokens of the labels, -100 beyond the end of a shorter one; None without
            spelled labels.
    """

    labels: Tensor = field(kw_only=True)
    places: Tensor = field(kw_only=True)
    tokens: Tensor | None = field(default=None, kw_only=True)


def make_batch(rows_BT: np.ndarray, eos_id: int, document_mask: bool, bos_id: int | None = None) -> Batch:
    """A batch from rows of S + 1 consecutive stream tokens, int64 (B, S+1).

    Where documents begin with BOS, `bos_id` is never a target: it is given before a text, not foretold. If it
    is EOS too, that holds for the second of two in succession: the first ends the document before.

    With the document mask a document's EOS is still a target, and the first token of the next document is
    not: it would be predicted from another document.
    """
    ids, targets = rows_BT[:, :-1].copy(), rows_BT[:, 1:].copy()
    if bos_id is not None:
        given = targets == bos_id
        targets[given if bos_id != eos_id else given & (ids == eos_id)] = IGNORE
    if not document_mask:
        return Batch(torch.from_numpy(ids), torch.from_numpy(targets))
    documents = number_documents(rows_BT, eos_id, bos_id)
    changes = documents[:, 1:] != documents[:, :-1]
    targets[changes] = IGNORE
    columns = np.arange(ids.shape[1], dtype=np.int64)
    begins = np.zeros_like(ids)
    begins[:, 1:] = np.where(changes[:, :-1], columns[1:], 0)
    positions = columns - np.maximum.accumulate(begins, axis=1)
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(targets),
        torch.from_numpy(positions),
        torch.from_numpy(documents[:, :-1].copy()),
    )


def rows_of(
    step: int, micro_batch: int, accumulate: int, rank: int, world: int, global_batch: int
) -> list[range]:
    """Numbers of the rows in each micro-batch of one rank in global step `step` (from 0).

    The step's rows are step*G ... step*G + G-1, G = micro_batch * accumulate * world; rank r takes the r-th
    of `world` equal runs of them. So the union over the ranks is the same for every `world`. Raises
    ValueError when G is not `global_batch` (0: any).
    """
    per_rank = micro_batch * accumulate
    if global_batch and per_rank * world != global_batch:
        raise ValueError(
            f"{micro_batch} x {accumulate} x {world} rows are not the global batch {global_batch}"
        )
    first = step * per_rank * world + rank * per_rank
    return [range(start, start + micro_batch) for start in range(first, first + per_rank, micro_batch)]
