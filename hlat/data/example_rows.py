"""From tokenized examples to batches: one row an example, cut and filled to a fixed length.

The loss is taken on completions and labels only: every other place has no target.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hlat.data.batch import IGNORE, Batch, LabelledBatch

Ids = np.ndarray
"""int64 (n,): the tokens of a prompt, completion or label."""


def fit_prompt(prompt: Ids, room: int, empty: int, bos_id: int | None = None) -> Ids:
    """A prompt with at most `room` tokens: its end, for there the question is put, after BOS if it begins
    with that. One without tokens becomes `empty`: the end of the document before, as a document begins in the
    stream of pretraining, or what the weights know in its place.
    """
    if not len(prompt):
        return np.array([empty], dtype=np.int64)
    if len(prompt) > room and bos_id is not None and prompt[0] == bos_id:
        return np.append(bos_id, prompt[len(prompt) - room + 1 :]).astype(np.int64)
    return prompt[-room:]


def pair_batch(
    prompts: Sequence[Ids],
    completions: Sequence[Ids],
    size: int,
    seq_len: int,
    fill: int,
    learned: Sequence[np.ndarray | None] | None = None,
) -> Batch:
    """Rows of prompt and completion, of which the completion's tokens are the targets.

    Args:
        prompts, completions: of at most `size` examples, each with at least one token; together at most
            seq_len + 1.
        size: rows; those beyond the examples have no target.
        seq_len: their length.
        fill: the id after the end of an example.
        learned: for each example which of its completion's tokens are targets, bool (n,); None: all.
    """
    ids = np.full((size, seq_len), fill, dtype=np.int64)
    targets = np.full((size, seq_len), IGNORE, dtype=np.int64)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        whole = np.concatenate([prompt, completion])
        ids[row, : len(whole) - 1] = whole[:-1]
        chosen = learned[row] if learned else None
        right = completion if chosen is None else np.where(chosen, completion, IGNORE)
        targets[row, len(prompt) - 1 : len(whole) - 1] = right
    return Batch(torch.from_numpy(ids), torch.from_numpy(targets))


def rows_per_example(spelled: Sequence[Ids]) -> int:
    """Rows an example needs: one for all labels of one token (they are read off the same place), else one for
    each label.
    """
    return 1 if max(map(len, spelled), default=1) == 1 else len(spelled)


def label_batch(
    prompts: Sequence[Ids],
    labels: Sequence[int],
    spelled: Sequence[Ids],
    size: int,
    seq_len: int,
    fill: int,
    *,
    count_tokens: bool = False,
    own: Sequence[Sequence[Ids]] | None = None,
) -> LabelledBatch:
    """Rows of prompts with every label, or prompts alone where labels are not spelled.

    Args:
        prompts: of at most `size` examples, at most seq_len + 1 - (longest label) tokens each.
        labels: the right label of each.
        spelled: tokens of each label; empty for a linear head. With `own` they only say how many there are at
            most.
        size: examples; those beyond the given ones have label -100 and no target.
        seq_len, fill: see `pair_batch`.
        count_tokens: the targets are the tokens of the right label instead of one for each example.
        own: for each example the tokens of each label after its prompt, where prompts make a difference.
    """
    per, longest, choices = rows_per_example(spelled), max(map(len, spelled), default=1), len(spelled) or 1
    ids = np.full((size * per, seq_len), fill, dtype=np.int64)
    targets = np.full((size * per, seq_len), IGNORE, dtype=np.int64)
    places = np.zeros((size * choices, longest), dtype=np.int64)
    tokens = np.full((size * choices, longest), IGNORE, dtype=np.int64)
    for number, word in enumerate(spelled):
        tokens[number::choices, : len(word)] = word
    if own:
        tokens[: len(own) * choices] = IGNORE
    right = np.full(size, IGNORE, dtype=np.int64)
    right[: len(labels)] = labels
    for i, (prompt, label) in enumerate(zip(prompts, labels, strict=True)):
        last = len(prompt) - 1
        ids[i * per : (i + 1) * per, : last + 1] = prompt
        places[i * choices : (i + 1) * choices] = last
        words = own[i] if own else spelled
        for number, word in enumerate(words):
            tokens[i * choices + number, : len(word)] = word
            ids[i * per + number % per, last + 1 : last + len(word)] = word[:-1]
            places[i * choices + number, : len(word)] += np.arange(len(word))
        if count_tokens:
            word = words[label]
            targets[i * per + label % per, last : last + len(word)] = word
        else:
            targets[i * per, last] = label
    parts = (torch.from_numpy(part) for part in (ids, targets))
    return LabelledBatch(
        *parts,
        labels=torch.from_numpy(right),
        places=torch.from_numpy(places),
        tokens=torch.from_numpy(tokens) if spelled else None,
    )
