"""Ids of texts with quoted parts: special tokens of a template are tokens, what a record spells is text.

Where no record spells one, the ids are those of `AutoTokenizer` for the whole text. Where one does, the text
is encoded by a copy of the tokenizer in which the special tokens have names that nobody can guess. The
template's get these names, so that what a record spells is nothing to the copy, and everything else is
divided as it was.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from hlat.data.quoted import Quoted

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
        if self._normalizes:
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
        names, real, hidden = self._renamed_ids
        spelled = [part if index is None else names[part] for part, index in self._pieces(text)]
        ids = _run(self._renamed, ["".join(spelled)])[0].ids
        if not hidden.isdisjoint(ids):  # the vocabulary itself has the token as a word: break the word
            broken = (self._broken(part, names[""]) for part in spelled)
            ids = _run(self._renamed, ["".join(broken)])[0].ids
        return np.array([real.get(index, index) for index in ids if real.get(index, 0) >= 0], dtype=np.int64)

    def _broken(self, part: str, between: str) -> str:
        return self._pattern.sub(lambda found: found[0][0] + between + found[0][1:], part)

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
        wanted = [index for _, index in self._pieces(text) if index is not None]
        special = set(self.control.values())
        return ids if [index for index in ids.tolist() if index in special] == wanted else self._apart(text)

    @cached_property
    def _normalizes(self) -> bool:
        """Whether special tokens are looked for after normalisation."""
        if self._definition is None or not self._definition.get("normalizer"):
            return False
        return any(t["normalized"] for t in self._definition["added_tokens"] if t["content"] in self.control)

    @cached_property
    def _definition(self) -> dict[str, Any] | None:
        return self.tokenizer.definition()

    @cached_property
    def _renamed(self) -> Any:
        """The tokenizer with other names for its special tokens, and one more, which breaks words."""
        from tokenizers import AddedToken

        assert self._definition is not None
        added = self._definition["added_tokens"]
        rest = [token for token in added if token["content"] not in self.control]
        backend = _backend_of({**self._definition, "added_tokens": rest, "post_processor": None})
        flags = {token["content"]: (token["lstrip"], token["rstrip"]) for token in added}
        for content, name in self._names.items():
            left, right = flags.get(content, (False, False))
            backend.add_special_tokens([AddedToken(name, lstrip=left, rstrip=right, normalized=False)])
        return backend

    @cached_property
    def _names(self) -> dict[str, str]:
        """A name that nobody can guess for each special token, and under "" for what breaks words."""
        nonce = secrets.token_hex(16)  # between two characters that Unicode keeps out of texts
        return {content: f"\ufdd0{n}x{nonce}\ufdd1" for n, content in enumerate(["", *self.control])}

    @cached_property
    def _renamed_ids(self) -> tuple[dict[str, str], dict[int, int], set[int]]:
        """Names; ids of the copy that are others of the tokenizer (-1: of none); the special tokens' own."""
        assert self._definition is not None
        find = self._renamed.token_to_id
        real = {find(name): self.control.get(content, -1) for content, name in self._names.items()}
        rest = [t for t in self._definition["added_tokens"] if t["content"] not in self.control]
        real |= {find(token["content"]): token["id"] for token in rest}
        return self._names, real, set(self.control.values()) - real.keys()


def _backend_of(definition: Any) -> Any:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(json.dumps(definition))
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = False
    return backend


def _run(backend: Any, texts: Sequence[str]) -> list[Any]:
    run = getattr(backend, "encode_batch_fast", backend.encode_batch)  # without offsets; tokenizers 0.20.1
    return list(run(list(texts), add_special_tokens=False))
