"""Finetuning examples in ids: completions and labels as they follow their prompts, cut to fit a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from hlat.data.example_rows import Ids, fit_prompt
from hlat.data.example_text import WHERE, Example
from hlat.data.origins import Place
from hlat.data.quoted import Quoted
from hlat.errors import UserError

if TYPE_CHECKING:
    from hlat.data.joint import Joint

Kind = Literal["pairs", "words", "tokens", "head"]
"""What a row is for: a completion; the likelihoods of all labels; the right label's tokens (all labels in
evaluation); a linear head.
"""
_AT_ONCE = 1024  # examples that are encoded together


@dataclass
class Split:
    """Tokenized examples: `prompts` and, for pairs, `completions` (EOS included) with the tokens in them that
    are `learned` (None: all); `labels` by number, and how each is `spelled` after the prompt of an example;
    `texts` of prompt and completion, and the `places` they are from; `answers`, the text that is learned;
    `cut` prompts that lost their beginning; `quoting` records that spell special tokens, `too_long` examples
    that are left out.
    """

    prompts: list[Ids] = field(default_factory=list)
    completions: list[Ids] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    places: list[Place | None] = field(default_factory=list)
    cut: int = 0
    learned: list[np.ndarray | None] = field(default_factory=list)
    spelled: list[tuple[Ids, ...]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    quoting: int = 0
    too_long: int = 0

    @property
    def documents(self) -> int:
        """How many examples."""
        return len(self.prompts)


def encode_pairs(examples: Sequence[Example], joint: Joint, seq_len: int) -> Split:
    """A split of pairs, each with at most seq_len + 1 tokens.

    A pair ends with EOS, and a conversation too, unless its template ends the last turn with a special token.
    """
    split, eos = Split(), joint.encoder.tokenizer.eos_id
    assert eos is not None
    for some in _batches(examples):
        parts = [_parts(example) for example in some]
        for example, ids in zip(some, joint.split(parts), strict=True):
            targets = [np.full(len(part), n % 2 == 0) for n, part in enumerate(ids[1:])]
            if not _ended(joint, example, ids[-1]):
                ids, targets = [*ids, np.array([eos])], [*targets, np.array([True])]
            prompt, completion = ids[0], np.concatenate(ids[1:]).astype(np.int64)
            learned = np.concatenate(targets)
            if example.spans is not None and len(completion) > seq_len:
                prompt, completion, learned = _last_turns(prompt, completion, learned, seq_len)
            if _fits(split, joint, example, prompt, seq_len + 1 - len(completion)):
                split.completions.append(completion)
                split.learned.append(None if learned.all() else learned)
    return split


def encode_labelled(
    examples: Sequence[Example], labels: Mapping[str, str], joint: Joint, seq_len: int
) -> Split:
    """A split of labelled prompts, not cut yet: how long their labels are after any prompt is known when all
    are encoded (`cut_prompts`).

    Raises UserError for a label without tokens, too long a one, or two that are the same after a prompt.
    """
    split, words = Split(), [Quoted(word) for word in labels.values()]
    seen: dict[tuple[bytes, ...], tuple[Ids, ...]] = {}
    for some in _batches(examples):
        prompts = [example.prompt for example in some]
        for example, (prompt, *ids) in zip(some, joint.choices(prompts, words), strict=True):
            key = tuple(word.tobytes() for word in ids)
            if key not in seen:
                _check_labels(labels, ids, seq_len)
                seen[key] = tuple(ids)
            split.spelled.append(seen[key])
            _add(split, joint, example, prompt)
    return split


def encode_prompts(examples: Sequence[Example], joint: Joint) -> Split:
    """A split of prompts alone, not cut yet."""
    split = Split()
    for some in _batches(examples):
        ids = joint.split([[example.prompt] for example in some])
        for example, (prompt,) in zip(some, ids, strict=True):
            _add(split, joint, example, prompt)
    return split


def cut_prompts(split: Split, joint: Joint, room: int) -> None:
    """Let prompts lose their beginning until they have at most `room` tokens, at least 1."""
    split.cut = sum(len(prompt) > room for prompt in split.prompts)
    split.prompts = [_fitted(joint, prompt, room) for prompt in split.prompts]


def longest_spelling(splits: Sequence[Split]) -> list[Ids]:
    """For each label its longest spelling after any prompt; empty without labels."""
    every = {id(words): words for split in splits for words in split.spelled}
    return [max(spellings, key=len) for spellings in zip(*every.values(), strict=True)]


def _ended(joint: Joint, example: Example, last: Ids) -> bool:
    """Whether an example ends with EOS already; a conversation may also end with its template's own token."""
    if len(last) and last[-1] == joint.encoder.tokenizer.eos_id:
        return True
    return example.spans is not None and bool(joint.encoder.ends_with_one(example.completion))


def _parts(example: Example) -> list[Quoted]:
    """The prompt, and the completion in parts that are learned and not learned in turn."""
    if example.spans is None:
        return [example.prompt, example.completion]
    edges = [edge for span in example.spans for edge in span]
    pairs = zip(edges, edges[1:], strict=False)
    return [example.prompt, *(example.completion.part(first, end) for first, end in pairs)]


def _last_turns(
    prompt: Ids, completion: Ids, learned: np.ndarray, seq_len: int
) -> tuple[Ids, Ids, np.ndarray]:
    """The end of a conversation whose answers do not fit, from the first answer that does with all after it;
    what is before it is the prompt.
    """
    begins = np.flatnonzero(learned & ~np.append(True, learned[:-1]))
    first = next((n for n in begins if len(completion) - n <= seq_len), None)
    if first is None:
        return prompt, completion, learned
    return np.append(prompt, completion[:first]), completion[first:], learned[first:]


def _fits(split: Split, joint: Joint, example: Example, prompt: Ids, room: int) -> bool:
    """Add an example whose prompt gets so much room; False, counted, where there is none."""
    if room < 1:
        split.too_long += 1
        return False
    split.cut += len(prompt) > room
    _add(split, joint, example, _fitted(joint, prompt, room))
    return True


def _add(split: Split, joint: Joint, example: Example, prompt: Ids) -> None:
    split.prompts.append(prompt)
    split.labels.append(example.label)
    split.texts.append((example.prompt.text, example.completion.text))
    split.places.append(example.place)
    spans = example.spans or ((0, len(example.completion.text)),)
    split.answers.append("".join(joint.encoder.without(example.completion.part(*span)) for span in spans))
    split.quoting += joint.encoder.quotes_any(example.prompt + example.completion)


def _fitted(joint: Joint, prompt: Ids, room: int) -> Ids:
    tokenizer = joint.encoder.tokenizer
    assert tokenizer.eos_id is not None
    known = tokenizer.convention
    return fit_prompt(prompt, room, tokenizer.eos_id if known.empty is None else known.empty, known.bos)


def _check_labels(labels: Mapping[str, str], spelled: Sequence[Ids], seq_len: int) -> None:
    seen: dict[bytes, str] = {}
    for (label, word), ids in zip(labels.items(), spelled, strict=True):
        where = f"{WHERE}.labels.{label}"
        if not 0 < len(ids) <= seq_len:
            what = f"{word!r} has {len(ids)} tokens, and a row {seq_len}"
            raise UserError(what, where=where, fix="take a shorter word, or a larger data.seq_len")
        other = seen.setdefault(ids.tobytes(), label)
        if other != label:
            raise UserError(f"has the same tokens as label {other!r}", where=where, fix="take another word")


def _batches(examples: Sequence[Example]) -> list[Sequence[Example]]:
    return [examples[first : first + _AT_ONCE] for first in range(0, len(examples), _AT_ONCE)]
