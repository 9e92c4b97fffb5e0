"""How texts were put before a model while it was trained: what its weights know of where a text begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hlat.data.tokenizer import Tokenizer

# Words, numbers, runs of white space, signs and other scripts: two tokenizers of one vocabulary that split
# text differently differ on some of these.
_PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "def read(self, size=-1):\n    return self._buffer[:size]  # 12345.678\n",
    " two  spaces,\ttabs\t\tand\r\nlines\n\n\nof text ",
    "Grüße, naïve café — “quoted” … 東京タワー Привет мир 😀",
    "don't I'll we've ABCdef x1y2 $9.99 50% a/b\\c <tag> {k: v}",
)


@dataclass(frozen=True)
class Convention:
    """What is done to a text before it becomes ids. The default is HLAT's own stream.

    Attributes:
        bos: id before every text; None: the weights have never seen one.
        empty: id that stands for a text without tokens; None: the end-of-document token.
        special: a special token that is spelled in a prompt is taken as such, as `transformers` does it, and
            the tokenizer's files go back as they came.
        template: it is taken as such because the examples that HLAT trained on had templates with them.
    """

    bos: int | None = None
    empty: int | None = None
    special: bool = False
    template: bool = False

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        known = {"bos": self.bos, "empty": self.empty, "special": self.special}
        return {**known, "template": True} if self.template else known

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Convention:
        """The reverse of `to_json`; absent keys have the defaults. Raises ValueError for other values."""
        ids = {name: values.get(name) for name in ("bos", "empty")}
        for name, value in ids.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ValueError(f"{name} is {value!r}")
        return cls(**ids, special=values.get("special") is True, template=values.get("template") is True)


def difference(own: Tokenizer, other: Tokenizer) -> str:
    """How the ids of one tokenizer mean something else than those of another; empty when they do not.

    Files that differ may say the same: an export writes a SentencePiece model, or plain bytes, as a
    tokenizer.json. So the pieces behind the ids are compared, and how some texts are divided into them.
    """
    if own.identity == other.identity:
        return ""
    mine, theirs = own.pieces(), other.pieces()
    changed = sum(mine.get(index, piece) != piece for index, piece in theirs.items())
    if changed:
        return f"{changed:,} of its {len(mine):,} ids stand for another text"
    if own.vocab_size != other.vocab_size:
        return f"it has {own.vocab_size:,} ids, theirs {other.vocab_size:,}"
    if own.eos_id != other.eos_id:
        return f"its end-of-document token is id {own.eos_id}, theirs is {other.eos_id}"
    if own.encode_batch(_PROBES) != other.encode_batch(_PROBES):
        return "it divides text into tokens differently"
    return ""


def extends(own: Tokenizer, other: Tokenizer) -> bool:
    """Whether a tokenizer has the ids of another one, in the same meaning, and more: special tokens that were
    added for finetuning.
    """
    mine, theirs = own.pieces(), other.pieces()
    return all(mine.get(index) == piece for index, piece in theirs.items()) and (
        own.encode_batch(_PROBES) == other.encode_batch(_PROBES)
    )
