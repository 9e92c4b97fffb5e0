"""A SentencePiece vocabulary as a `tokenizers` tokenizer, which is what Hugging Face folders hold."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of pieces, numbered as in sentencepiece_model.proto and in GGUF."""
UNIGRAM, BPE = 1, 2
SPACE = "\u2581"
PROBES = (
    "The quick brown fox, 1234567 times.",
    "  two  spaces\tand a tab \n\n\tdef f(x):\n        return x ** 2  # ok ",
    "Übergröße naïve café … 数学 математика العربية 한국어",
    "emoji 🙂🚀 and rare \u16a0\u2603 \U0001f9ff",
    "a",
    " ",
)
"""Texts on which a conversion must agree with the original before it is trusted."""


@dataclass(frozen=True)
class SentencePieceModel:
    """What of a `.model` file decides the ids of a text."""

    pieces: list[tuple[str, float, int]]
    """Text, score and kind; the position is the id."""
    algorithm: int = BPE
    dummy_prefix: bool = True
    squeeze_spaces: bool = False
    charsmap: bytes = b""
    byte_fallback: bool = True


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Parses a `.model` file, which is the message ModelProto of sentencepiece's protocol buffers.

    Raises ValueError for anything else.
    """
    try:
        return _parse(path.read_bytes())
    except (KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError("not a SentencePiece model") from error


def _parse(data: bytes) -> SentencePieceModel:
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            pieces.append((piece[1].decode("utf-8"), score, piece.get(3, NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if not pieces:
        raise ValueError("a SentencePiece model without pieces")
    return SentencePieceModel(
        pieces,
        algorithm=trainer.get(3, UNIGRAM),
        dummy_prefix=bool(normalizer.get(3, 1)),
        squeeze_spaces=bool(normalizer.get(4, 1)),
        charsmap=normalizer.get(2, b""),
        byte_fallback=bool(trainer.get(35, 0)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and raw values of one message: int for varints, bytes for the rest."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
        elif wire in (1, 2, 5):
            size, at = _varint(data, at) if wire == 2 else ((8 if wire == 1 else 4), at)
            if at + size > len(data):
                raise ValueError("a SentencePiece model that ends too early")
            yield number, data[at : at + size]
            at += size
        else:
            raise ValueError("not a SentencePiece model")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data):
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("a SentencePiece model that ends too early")


def to_tokenizers(model: SentencePieceModel) -> Tokenizer:
    """The same tokenizer for the `tokenizers` library, without BOS or EOS added to texts."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    unknown = next((i for i, (_, _, kind) in enumerate(model.pieces) if kind == UNKNOWN), None)
    if model.algorithm == BPE:
        vocab = {text: i for i, (text, _, _) in enumerate(model.pieces)}
        tokenizer = Tokenizer(
            models.BPE(
                vocab=vocab,
                merges=_merges(model, vocab),
                unk_token=None if unknown is None else model.pieces[unknown][0],
                fuse_unk=True,
                byte_fallback=model.byte_fallback,
            )
        )
    else:
        scores = [(text, score) for text, score, _ in model.pieces]
        tokenizer = Tokenizer(models.Unigram(scores, unknown, model.byte_fallback))
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.squeeze_spaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    tail = [decoders.Strip(" ", 1, 0)] if model.dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *tail]
    )
    special = [text for text, _, kind in model.pieces if kind in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    defined = [text for text, _, kind in model.pieces if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in defined])
    return tokenizer


def _merges(model: SentencePieceModel, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs in the order in which BPE joins them: by the score of the joined piece, best first."""
    joins = []
    for text, score, kind in model.pieces:
        if kind != NORMAL:
            continue
        splits = ((text[:i], text[i:]) for i in range(1, len(text)))
        known = [(left, right) for left, right in splits if left in vocab and right in vocab]
        joins += [(score, pair) for pair in sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    return [pair for _, pair in sorted(joins, key=lambda join: -join[0])]
