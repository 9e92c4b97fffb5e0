"""Ids of texts with quoted parts: special tokens of a template are tokens, what a record spells is text.

Where no record spells one, the ids are those of `AutoTokenizer` for the whole text. Where one does, the text
is encoded by a copy of the tokenizer in which the special tokens have names that nobody can guess. The
template's get these names, so that what a record spells is nothing to the copy, and everything else is
divided as it was.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from hlat.data.quoted import Quoted
from hlat.data.tokenizers_library import hide, made_of_text, run, stand_ins

if TYPE_CHECKING:
    from hlat.data.tokenizer import Tokenizer

Ids = np.ndarray
"""int64 (n,)."""


class TextEncoder:
    """Encodes texts with quoted parts.

    Args:
        tokenizer: whose ids.
        literals: all that templates spell. An added token that is not marked as special is one all the same
            where it is found here, for templates write their marks with such tokens too; white space is not.

    Attributes:
        control: the special tokens, by what spells them: those that are marked so, BOS, EOS, and as above.
    """

    def __init__(self, tokenizer: Tokenizer, literals: str = "") -> None:
        self.tokenizer = tokenizer
        own = (tokenizer.bos_id, tokenizer.eos_id)
        self.control = {
            text: index
            for text, index, special in tokenizer.added_tokens()
            if special or index in own or (text in literals and not text.isspace())
        }
        names = sorted((name for name in self.control if name), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._anywhere = re.compile(f"(?=({self._pattern.pattern}))")
        self.used = bool(self._pattern.search(literals))  # whether a template has any of them

    def encode(self, texts: Sequence[Quoted], *, begin: bool = True) -> list[Ids]:
        """Ids of texts, each int64 (n,). With `begin` they begin as the convention of the tokenizer says:
        with BOS where the weights know one, unless it is spelled there already.
        """
        found: list[Ids | None] = [self._apart(text) if self.quotes_any(text) else None for text in texts]
        plain = iter(self._whole([text.text for text, ids in zip(texts, found, strict=True) if ids is None]))
        arrays = [next(plain) if ids is None else ids for ids in found]
        if self._hides:
            arrays = [self._checked(text, ids) for text, ids in zip(texts, arrays, strict=True)]
        bos = self.tokenizer.convention.bos
        if bos is None or not begin:
            return arrays
        return [ids if ids[:1].tolist() == [bos] else np.append(bos, ids).astype(np.int64) for ids in arrays]

    def quotes_any(self, text: Quoted) -> bool:
        """Whether a special token is spelled with quoted characters, be it in part."""
        if not text.quotes:
            return False
        return any(text.touches(*match.span(1)) for match in self._anywhere.finditer(text.text))

    def without(self, text: Quoted) -> str:
        """The text without the template's special tokens."""
        return "".join(part for part, index in self._pieces(text) if index is None)

    def has_one(self, text: Quoted) -> bool:
        """Whether the template's part of a text has a special token."""
        return any(index is not None for _, index in self._pieces(text))

    def ends_with_one(self, text: Quoted) -> str:
        """The special token of the template that a text ends with; empty: none."""
        *_, (part, index) = [("", None), *self._pieces(text)]
        return "" if index is None else part

    def _pieces(self, text: Quoted) -> Iterator[tuple[str, int | None]]:
        """The text in order: special tokens of the template with their ids, text between them with None."""
        done = start = 0
        for first, end in [*text.quotes, (len(text.text),) * 2]:
            for match in self._pattern.finditer(text.text, start, first):
                if match.start() > done:
                    yield text.text[done : match.start()], None
                yield match[0], self.control[match[0]]
                done = match.end()
            start = end
        if done < len(text.text):
            yield text.text[done:], None

    def _whole(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of texts in which every special token is one."""
        if not texts:
            return []
        return [np.asarray(ids, dtype=np.int64) for ids in self.tokenizer.encode_special(texts)]

    def _apart(self, text: Quoted) -> Ids:
        """Ids of one text in which the template's special tokens alone are such."""
        if self._definition is None:
            return self._in_pieces(text)
        backend, names, real = self._renamed
        spelled = [part if index is None else names[part] for part, index in self._pieces(text)]
        [ids] = run(backend, ["".join(spelled)], self.tokenizer.spec, shown=text.text)
        return np.array([real.get(index, index) for index in ids], dtype=np.int64)

    def _in_pieces(self, text: Quoted) -> Ids:
        """The same for a tokenizer without a tokenizer.json: what is between special tokens by itself."""
        ids: list[int] = []
        for number, (part, index) in enumerate(self._pieces(text)):
            encode = self.tokenizer.encode_later if number else self.tokenizer.encode_batch
            ids += encode([part])[0] if index is None else [index]
        return np.array(ids, dtype=np.int64)

    def _checked(self, text: Quoted, ids: Ids) -> Ids:
        """The ids, or those of the text encoded apart where normalisation made a special token of quoted
        characters, as it makes ASCII of full-width letters.
        """
        if not text.quotes:
            return ids
        wanted = [index for _, index in self._pieces(text) if index in self._telling]
        found = [index for index in ids.tolist() if index in self._telling]
        return ids if found == wanted else self._apart(text)

    @cached_property
    def _hides(self) -> bool:
        """Whether a special token may come of characters that do not spell it: it is looked for after
        normalisation, or a word of the vocabulary, which normalisation comes before.
        """
        if self._definition is None:
            return False
        added = self._definition["added_tokens"]
        after = any(token["normalized"] for token in added if token["content"] in self.control)
        words = made_of_text(self._definition, self.control)
        return bool(words) or (after and bool(self._definition.get("normalizer")))

    @cached_property
    def _telling(self) -> set[int]:
        """Ids of special tokens that text is never made of."""
        ordinary = stand_ins(self._definition) if self._definition is not None else set()
        return {index for content, index in self.control.items() if content not in ordinary}

    @cached_property
    def _definition(self) -> dict[str, Any] | None:
        return self.tokenizer.definition()

    @cached_property
    def _renamed(self) -> tuple[Any, dict[str, str], dict[int, int]]:
        """The tokenizer with other names for its special tokens; the names; the tokenizer's ids for those ids
        of the copy that differ.
        """
        from tokenizers import AddedToken

        assert self._definition is not None
        backend, real = hide(self._definition, self.control)
        flags = {
            token["content"]: (token["lstrip"], token["rstrip"]) for token in self._definition["added_tokens"]
        }
        nonce = secrets.token_hex(16)  # between two characters that Unicode keeps out of texts
        names = {content: f"\ufdd0{n}x{nonce}\ufdd1" for n, content in enumerate(self.control)}
        tokens = []
        for content, name in names.items():
            left, right = flags.get(content, (False, False))
            tokens.append(AddedToken(name, lstrip=left, rstrip=right, normalized=False))
        backend.add_special_tokens(tokens)
        real |= {backend.token_to_id(name): self.control[content] for content, name in names.items()}
        return backend, names, real
