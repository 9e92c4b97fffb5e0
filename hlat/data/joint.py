"""What follows a prompt, in the ids that it has there.

A prompt and its completion are one text, which is encoded as one; the ids after those of the prompt are the
completion's, as the evaluation harness divides a context from its continuation. Encoded by itself, a
completion would begin as a text does: with a space that is not there, for many tokenizers.

Where a token of the whole text has characters of both (a prompt that ends with a space, before a word), the
ids of the prompt are no beginning of those of the whole. Nobody who asks for a completion sees the ids of
the whole: `hlat generate`, and whoever uses the exported model, encodes the prompt and nothing else, and the
model goes on from there. So the prompt keeps the ids it has alone, and after them come ids that make up
the rest of the text: those that the rest has behind something it does not join with. `whole[len(prompt):]`,
which is what the harness takes, would leave out characters, or say some twice. Such prompts are counted: it
is better to let the completion begin with the space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hlat.data.quoted import Quoted
from hlat.data.text_encoder import Ids, TextEncoder

if TYPE_CHECKING:
    from hlat.data.tokenizer import Tokenizer

_ANCHORS = ("", "\n", ":", ".", "a", "\u00e9")  # what a rest may be encoded behind


class Joint:
    """Encodes texts in parts that follow each other.

    Args:
        tokenizer, literals: see `TextEncoder`.
        begin: whether texts begin as the convention says, with BOS perhaps; a chat template writes its own.

    Attributes:
        straddling: texts so far of which a token has characters of two parts.
    """

    def __init__(self, tokenizer: Tokenizer, literals: str = "", begin: bool = True) -> None:
        self.encoder, self._begin = TextEncoder(tokenizer, literals), begin
        self.straddling = 0

    def split(self, texts: Sequence[Sequence[Quoted]]) -> list[list[Ids]]:
        """Ids of each part of each text, int64 (n,): as many lists as texts, as many arrays in each as parts.
        The first part begins a text (see `TextEncoder.encode`).
        """
        begun = [[Quoted.joined(parts[: n + 1]) for n in range(len(parts))] for parts in texts]
        ids = iter(self.encoder.encode([text for texts_ in begun for text in texts_], begin=self._begin))
        return [self._divide([next(ids) for _ in parts], parts) for parts in texts]

    def choices(self, prompts: Sequence[Quoted], words: Sequence[Quoted]) -> list[list[Ids]]:
        """Ids of each prompt, and of each word as it follows that prompt."""
        wholes = [text for prompt in prompts for text in (prompt, *(prompt + word for word in words))]
        ids = iter(self.encoder.encode(wholes))
        found = []
        for _ in prompts:
            head, before = next(ids), self.straddling
            rest = [self._divide([head, next(ids)], [Quoted(""), word])[1] for word in words]
            self.straddling = min(self.straddling, before + 1)
            found.append([head, *rest])
        return found

    def _divide(self, begun: Sequence[Ids], parts: Sequence[Quoted]) -> list[Ids]:
        """The ids that each part adds, from those of the text up to the end of each."""
        made, joins = [begun[0]], False
        for before, whole, part in zip(begun, begun[1:], parts[1:], strict=False):
            if np.array_equal(whole[: len(before)], before):
                made.append(whole[len(before) :])
                continue
            joins = True
            encode, decode = self._encode_plain, self.encoder.tokenizer.decode
            made.append(
                np.array(after(encode, decode, before.tolist(), whole.tolist(), part), dtype=np.int64)
            )
        self.straddling += joins
        return made

    def _encode_plain(self, text: Quoted) -> list[int]:
        return list(self.encoder.encode([text], begin=False)[0].tolist())


def after(
    encode: Callable[[Quoted], list[int]],
    decode: Callable[[Sequence[int]], str],
    head: Sequence[int],
    whole: Sequence[int],
    rest: Quoted,
) -> list[int]:
    """Ids of `rest` that go on from those of `head`, where they are not the end of `whole`.

    Args:
        encode: ids of a text that nothing precedes, without BOS.
        decode: text of ids.
        head, whole: ids of what is before the rest, and of both together.
    """
    wanted = decode(whole)

    def fits(ids: list[int]) -> bool:
        return decode([*head, *ids]) == wanted

    for made in _behind(encode, rest):
        if fits(made):
            return made
    singly: list[int] = []
    for n in range(len(rest.text)):
        singly += next(_behind(encode, rest.part(n, n + 1), _ANCHORS[1:]), [])
    return singly if fits(singly) else encode(rest)


def _behind(
    encode: Callable[[Quoted], list[int]], rest: Quoted, anchors: Sequence[str] = _ANCHORS
) -> Iterator[list[int]]:
    """Ids of a text behind each of the anchors that it does not join with."""
    for anchor in anchors:
        lead = encode(Quoted(anchor)) if anchor else []
        both = encode(Quoted(anchor) + rest)
        if both[: len(lead)] == lead:
            yield both[len(lead) :]
