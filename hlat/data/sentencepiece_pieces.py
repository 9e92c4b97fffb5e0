"""A SentencePiece model and the tokens that the files beside it add to its pieces.

Texts are divided at the added tokens, as the `tokenizers` library does it, and what is between them goes to
SentencePiece. Where `legacy` is not set only what begins the text gets the model's space in front, as in
`transformers`.

Pieces that are document marks or special tokens are made control pieces, which SentencePiece never finds in
a text, whatever they were before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hlat.data.special_tokens import Named, Token, misnumbered
from hlat.errors import UserError

_PLAIN = "\0"  # stands for the text between added tokens
_CONTROL = (
    b"\x18\x03"  # ModelProto.SentencePiece.type = CONTROL; of a field given twice the last value counts
)
_NO_PREFIX = b"\x1a\x02\x18\x00"  # normalizer_spec.add_dummy_prefix = false; parts of a message are merged


class Pieces:
    """The vocabulary.

    Args:
        content: of the `.model` file.
        threads: of one encoding.

    Attributes:
        size: largest id + 1, but for tokens for padding and masks alone.
        marks: ids of BOS and EOS, None where there is none.
        names: what each id stands for, as the vocabulary spells it.
        further: what the files beside the model decide, as text; empty: nothing.

    Raises UserError for content that is no model, or a file that gives a token an id it cannot have.
    """

    def __init__(self, content: bytes, named: Named, path: Path, threads: int) -> None:
        self._threads, self._path = threads, path
        plain = _processor(content, path)
        self._count = plain.vocab_size()
        try:
            names = [plain.id_to_piece(index) for index in range(self._count)]
        except UnicodeDecodeError as error:
            what = f"not a SentencePiece model (a piece is not UTF-8: {error})"
            raise UserError(what, where=str(path), fix="copy the file again") from error
        self._ids = {name: index for index, name in enumerate(names)}
        self._own = dict(enumerate(names))
        self._added = self._numbered(named)
        for index, name in self._own.items():
            # AutoTokenizer takes control pieces for special tokens where the files list no further ones.
            if plain.is_unknown(index) or (plain.is_control(index) and not named.extra):
                self._added.setdefault(name, (index, Token(name)))
        self.marks = tuple(
            self._mark(named, role, own)
            for role, own in (("bos_token", plain.bos_id()), ("eos_token", plain.eos_id()))
        )
        self._spelled = {
            index: token for index, token in self._added.values() if self._own.get(index) != token.content
        }
        idle = {self._ids[text] for text in named.idle() if text in self._added}
        used = [index for index, _ in self._added.values() if index not in idle]
        self.size = max([self._count - 1, *used]) + 1
        self.names = self._own | {i: t.content for i, t in self._spelled.items() if i < self.size}
        quiet = self._found_in_texts(plain)
        self._content = _as_control(content, quiet) if quiet else content
        self._legacy = named.prefixes_all
        self.further = self._decided(plain, quiet)

    def _numbered(self, named: Named) -> dict[str, tuple[int, Token]]:
        """Text -> (id, token), of all that are named. Completes `_ids` with those beyond the model."""
        added: dict[str, tuple[int, Token]] = {}
        ids = {token.content: index for index, token in named.numbered.items()}
        after = self._count
        for token in named.to_add(set()):
            index = self._ids.get(token.content)
            if index is None:
                said = ids.get(token.content, after)
                if said >= self._count and said != after:
                    raise misnumbered(token.content, said, after, str(self._path))
                index, after = said, max(after, said + 1)
                self._ids[token.content] = index
            added[token.content] = (index, token)
        return added

    def _mark(self, named: Named, role: str, own: int) -> int | None:
        text = named.role(role, self._ids.__contains__, [self._own[own]] if own >= 0 else [])
        index = self._ids.get(text) if text is not None else None
        if index is not None and text is not None:
            _, token = self._added.get(text, (index, Token(text)))
            self._added[text] = (index, replace(token, special=True))
        return index

    def _found_in_texts(self, plain: Any) -> set[int]:
        """Special tokens that are ordinary pieces of the model, which would find them."""
        known = [index for index, token in self._added.values() if token.special and index < self._count]
        kinds = (plain.is_control, plain.is_unknown, plain.is_byte, plain.is_unused)
        return {index for index in known if not any(kind(index) for kind in kinds)}

    def _decided(self, plain: Any, quiet: set[int]) -> str:
        beyond = [[i, *astuple(t)] for i, t in sorted(self._spelled.items()) if i < self.size]
        own = plain.eos_id() if plain.eos_id() >= 0 else None
        eos = self.marks[1] if self.marks[1] != own else None
        if not beyond and not quiet and eos is None:
            return ""
        legacy = self._legacy if beyond else None
        return json.dumps([beyond, sorted(quiet), eos, legacy], ensure_ascii=False)

    @cached_property
    def _whole(self) -> Any:
        return _processor(self._content, self._path)

    @cached_property
    def _bare(self) -> Any:
        """The model, without its space in front of a text."""
        return _processor(self._content + _NO_PREFIX, self._path)

    @cached_property
    def _in_documents(self) -> Any:
        return _finder([token for _, token in self._added.values() if not token.special])

    @cached_property
    def _in_prompts(self) -> Any:
        return _finder([replace(token, special=False) for _, token in self._added.values()])

    def added(self) -> list[tuple[str, int, bool]]:
        """Text, id, and whether it is special, of each token that is found in a text as a whole."""
        return sorted(
            ((text, index, token.special) for text, (index, token) in self._added.items()), key=lambda t: t[1]
        )

    def encode(self, texts: Sequence[str], special: bool, later: bool = False) -> list[list[int]]:
        """Ids of texts; with `special` the special tokens spelled in them are taken as such, with `later` the
        texts follow such a token.
        """
        finder = self._in_prompts if special else self._in_documents
        if finder is None:
            return self._pieces(self._bare if later and not self._legacy else self._whole, texts)
        divided = [list(_divided(finder, text)) for text in texts]
        first = [[s for s in parts if s[0] == _PLAIN and self._begins(s, later)] for parts in divided]
        rest = [[s for s in parts if s[0] == _PLAIN and not self._begins(s, later)] for parts in divided]
        ids: dict[tuple[int, int], list[int]] = {}
        for model, chosen in ((self._whole, first), (self._bare, rest)):
            places = [(number, start, stop) for number, part in enumerate(chosen) for _, start, stop in part]
            found = self._pieces(model, [texts[number][start:stop] for number, start, stop in places])
            ids |= {(number, start): one for (number, start, _), one in zip(places, found, strict=True)}
        return [
            [
                index
                for name, start, _ in parts
                for index in (ids[number, start] if name == _PLAIN else [self._added[name][0]])
            ]
            for number, parts in enumerate(divided)
        ]

    def _begins(self, part: tuple[str, int, int], later: bool) -> bool:
        return self._legacy or (part[1] == 0 and not later)

    def _pieces(self, model: Any, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        found: list[list[int]] = model.encode(list(texts), out_type=int, num_threads=self._threads)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens give nothing, nor do ids that stand for nothing."""
        parts: list[str] = []
        run: list[int] = []

        def flush(model: Any) -> None:
            if run:
                parts.append(model.decode(run))
                run.clear()

        for index in ids:
            model = self._whole if self._legacy or not any(parts) else self._bare
            if index in self._spelled:
                flush(model)
                token = self._spelled[index]
                parts.append("" if token.special else token.content)
            elif 0 <= index < self._count:
                run.append(index)
        flush(self._whole if self._legacy or not any(parts) else self._bare)
        return "".join(parts)


def _processor(content: bytes, path: Path) -> Any:
    import sentencepiece

    made = sentencepiece.SentencePieceProcessor()
    try:
        made.LoadFromSerializedProto(content)
    except Exception as error:  # RuntimeError or a protobuf error, by version
        raise UserError(
            f"not a SentencePiece model ({error})", where=str(path), fix="name a .model file"
        ) from error
    return made


def _finder(tokens: Sequence[Token]) -> Any:
    """A `tokenizers` object that finds these tokens in a text; None: there are none to be found."""
    if not tokens:
        return None
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    finder = Backend(models.WordLevel({_PLAIN: 0}, unk_token=_PLAIN))
    finder.add_tokens([token.added() for token in tokens])
    return finder


def _divided(finder: Any, text: str) -> Iterator[tuple[str, int, int]]:
    """(token found, or _PLAIN; first character; the one after its last)."""
    found = finder.encode(text, add_special_tokens=False)
    for index, place in zip(found.ids, found.offsets, strict=True):
        yield finder.id_to_token(index), *place  # `tokens` has them with the white space they took


def _as_control(content: bytes, ids: set[int]) -> bytes:
    """The model (protocol buffer ModelProto) with these pieces as control pieces."""
    made, at, number = bytearray(), 0, 0
    while at < len(content):
        start = at
        key, at = _varint(content, at)
        if key & 7 == 2:
            size, at = _varint(content, at)
        else:
            size = {1: 8, 5: 4}.get(key & 7, 0)
            if key & 7 == 0:
                _, at = _varint(content, at)
        body = content[at : at + size]
        at += size
        if key == 0x0A:  # pieces
            if number in ids:
                made += b"\x0a" + _as_varint(len(body) + len(_CONTROL)) + body + _CONTROL
                number += 1
                continue
            number += 1
        made += content[start:at]
    return bytes(made)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _as_varint(value: int) -> bytes:
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*made, value])
