"""Tokenizers: SentencePiece `.model`, `tokenizer.json`, and plain bytes.

In HLAT's stream a document is its ids followed by one end-of-document id (EOS); BOS comes before it only
where the weights that are trained on know one (`Tokenizer.convention`). `encode` adds neither; the writer of
the shards does. Text that happens to spell a special token (`</s>`) is encoded as ordinary text, also where
a file does not mark EOS or BOS as special, so EOS ids in a stream are document ends and nothing else. Other
added tokens are found in a text, as `transformers` finds them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hlat.data import long_text
from hlat.data.convention import Convention
from hlat.data.sentencepiece_pieces import Pieces
from hlat.data.sources import MANIFEST
from hlat.data.special_tokens import (
    Token,
    complete,
    decided_beside,
    read_definition,
    read_named,
    sidecars,
)
from hlat.data.tokenizer_files import companions_of
from hlat.data.tokenizers_library import hide, made_of_text, run
from hlat.errors import UserError
from hlat.host import json_text
from hlat.host.limits import cores
from hlat.paths import expand

# Names under which published tokenizers keep their marks, tried where no file says them.
_EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<｜end▁of▁sentence｜>")
_BYTES_EOS = "<|endoftext|>"
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<｜begin▁of▁sentence｜>")


class Tokenizer:
    """What all tokenizers share."""

    vocab_size: int  # largest id + 1
    bos_id: int | None = None
    eos_id: int | None = None
    byte_exact: bool = (
        False  # decode_bytes(encode(text)) is the text, and every id stands for a fixed number of bytes
    )
    identity: str  # hex sha256 of everything that decides the ids
    takes_parts = False  # whether long texts are encoded in parts: see `hlat.data.long_text`
    convention = Convention()  # how the weights it is used with know texts
    companions: tuple[Path, ...] = ()  # further files that go where the tokenizer goes: chat templates, …
    of_weights = False  # whether it came with the weights that a run starts from

    def __init__(self, spec: str, files: list[Path]) -> None:
        self.spec, self._files = spec, files

    def files(self) -> list[Path]:
        """The files that define the tokenizer (empty for `bytes`)."""
        return list(self._files)

    def kept_files(self) -> list[Path]:
        """Those, and their companions: what a checkpoint keeps."""
        names = {path.name for path in self._files}
        return [*self._files, *(path for path in self.companions if path.name not in names)]

    def pieces(self) -> dict[int, str]:
        """What each id stands for, as the vocabulary spells it."""
        raise NotImplementedError

    def definition(self) -> dict[str, Any] | None:
        """Its tokenizer.json, parsed; None: it has none."""
        return None

    def added_tokens(self) -> list[tuple[str, int, bool]]:
        """Text and id of the tokens that are found in a text as a whole, and whether they are special."""
        return []

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS and EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, without BOS and EOS."""
        raise NotImplementedError

    def encode_special(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode_batch`, but special tokens that are spelled in the texts are taken as such."""
        return self.encode_batch(texts)

    def encode_later(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode_batch`, of texts that follow a special token."""
        return self.encode_batch(texts)

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode_batch`, each as int64 (n,); long texts piecewise where that gives the same ids."""
        return [np.asarray(ids, dtype=np.int64) for ids in self.encode_batch(texts)]

    def marks_in(self, ids: np.ndarray) -> bool:
        """Whether the ids of a text hold EOS, or BOS where texts begin with it: an ordinary token of the
        vocabulary is used as such a mark, and the document's borders would be ambiguous."""
        marks = [mark for mark in (self.eos_id, self.convention.bos) if mark is not None]
        return bool(np.isin(ids, marks).any())

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens give nothing. Bytes that are no whole character become U+FFFD."""
        raise NotImplementedError

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Bytes of ids. With `byte_exact` also right for ids that begin or end within a character."""
        return self.decode([int(i) for i in ids]).encode("utf-8")

    def count_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        """Length of `decode_bytes`."""
        return len(self.decode_bytes(ids))


class BytesTokenizer(Tokenizer):
    """Ids 0..255 are the bytes of the UTF-8 text, 256 is EOS."""

    def __init__(self) -> None:
        super().__init__("bytes", [])
        self.vocab_size, self.eos_id, self.byte_exact = 257, 256, True
        self.identity = hashlib.sha256(b"hlat bytes 257").hexdigest()

    def pieces(self) -> dict[int, str]:
        return {byte: spelled for spelled, byte in _byte_spellings().items()} | {256: _BYTES_EOS}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def added_tokens(self) -> list[tuple[str, int, bool]]:
        return [(_BYTES_EOS, 256, True)]

    def encode_special(self, texts: Sequence[str]) -> list[list[int]]:
        return [
            [*first.encode("utf-8"), *(index for part in rest for index in (256, *part.encode("utf-8")))]
            for first, *rest in (text.split(_BYTES_EOS) for text in texts)
        ]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return bytes(int(i) for i in ids if i < 256)


def open_tokenizers(path: Path) -> tuple[Any, set[int]]:
    """A tokenizer.json and the tokens that the files beside it add, as a `tokenizers` object.

    Returns it and the ids that are there for padding and masks alone. Raises UserError.
    """
    from tokenizers import Tokenizer as Backend

    content = _read(path)
    try:
        backend = Backend.from_str(content.decode("utf-8"))
    except BaseException as error:  # the library raises plain Exception, and panics with a BaseException
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise UserError(
            f"not a tokenizer.json ({error})",
            where=str(path),
            fix="name a file saved by the tokenizers library",
        ) from error
    backend.no_padding()
    backend.no_truncation()
    return backend, complete(backend, read_named(path), str(path))


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library.

    BOS, EOS and further tokens are those that the files beside it name (`hlat.data.special_tokens`), BOS and
    EOS else by usual names.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), [path, *sidecars(path)])
        self.companions = companions_of(path)
        self._backend, idle = open_tokenizers(path)
        self._definition = read_definition(path)
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        named = read_named(path)
        marks = [
            named.role(role, vocabulary.__contains__, names)
            for role, names in (("bos_token", _BOS_NAMES), ("eos_token", _EOS_NAMES))
        ]
        self.bos_id, self.eos_id = (None if text is None else vocabulary.get(text) for text in marks)
        self._never_in_texts([text for text in marks if text in vocabulary])
        special = [text for text, _, special in self.added_tokens() if special]
        # Special tokens that the model makes of texts which spell them.
        self._words = {vocabulary[text] for text in made_of_text(self._definition, special)}
        self.vocab_size = max((index for index in vocabulary.values() if index not in idle), default=-1) + 1
        self._vocabulary = {text: index for text, index in vocabulary.items() if index < self.vocab_size}
        self.byte_exact = self._is_byte_level()
        self.takes_parts = long_text.cuts_are_safe(self._definition, self._found_in_texts())
        decided = decided_beside(self._backend, self._definition, self.vocab_size)
        self.identity = hashlib.sha256(_read(path) + f"\0{self.eos_id}{decided}".encode()).hexdigest()

    def _never_in_texts(self, marks: Sequence[str | None]) -> None:
        """Mark them as special, also where the files do not."""
        known = {token.content: token for token in self._backend.get_added_tokens_decoder().values()}
        tokens = [known.get(text) or Token(text).added() for text in marks if text is not None]
        self._backend.add_special_tokens(tokens)
        self._backend.encode_special_tokens = True

    def definition(self) -> dict[str, Any]:
        return dict(json.loads(self._backend.to_str()))

    def added_tokens(self) -> list[tuple[str, int, bool]]:
        found = self._backend.get_added_tokens_decoder().items()
        return [(token.content, index, token.special) for index, token in sorted(found)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        found = run(self._backend, texts, self.spec)
        if not self._words:
            return found
        return [self._apart(ids, text) for ids, text in zip(found, texts, strict=True)]

    def _apart(self, ids: list[int], text: str) -> list[int]:
        """Ids of a text: these, or where a special token is among them those of text that is only text."""
        if self._words.isdisjoint(ids):
            return ids
        backend, real = self._plain
        try:
            [found] = run(backend, [text], self.spec)
        except UserError:
            return ids  # nothing else can stand for these characters
        return [real.get(index, index) for index in found]

    @cached_property
    def _plain(self) -> tuple[Any, dict[int, int]]:
        return hide(self.definition(), [text for text, _, special in self.added_tokens() if special])

    def encode_special(self, texts: Sequence[str]) -> list[list[int]]:
        self._backend.encode_special_tokens = False
        try:
            return run(self._backend, texts, self.spec)
        finally:
            self._backend.encode_special_tokens = True

    def pieces(self) -> dict[int, str]:
        return {index: piece for piece, index in self._vocabulary.items()}

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        arrays = []
        for text in texts:
            long = len(text) > long_text.SPLIT_ABOVE and self.takes_parts
            arrays.append(self._encode_in_parts(text) if long else None)
        short = iter(
            super().encode_arrays([text for text, done in zip(texts, arrays, strict=True) if done is None])
        )
        return [next(short) if done is None else done for done in arrays]

    def _encode_in_parts(self, text: str) -> np.ndarray:
        """A few parts at a time, each of which the backend's threads share: their encodings take many times
        the room of their ids.
        """
        parts, few = long_text.parts(text), long_text.AT_ONCE
        groups = (
            super(HuggingFaceTokenizer, self).encode_arrays(parts[start : start + few])
            for start in range(0, len(parts), few)
        )
        return np.concatenate([ids for group in groups for ids in group])

    def decode(self, ids: Sequence[int]) -> str:
        if self.byte_exact:
            return self.decode_bytes(ids).decode("utf-8", "replace")
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        if not self.byte_exact:
            return super().decode_bytes(ids)
        table = self._byte_table
        return b"".join(table.get(int(i), b"") for i in ids)

    def _is_byte_level(self) -> bool:
        decoder = self._definition.get("decoder") or {}
        before = self._definition.get("pre_tokenizer") or {}
        steps = before.get("pretokenizers", [before])
        prefix = any(step.get("type") == "ByteLevel" and step.get("add_prefix_space") for step in steps)
        exact = decoder.get("type") == "ByteLevel" and not self._definition.get("normalizer") and not prefix
        return exact and not any(token.lstrip or token.rstrip for token in self._found_in_texts())

    def _found_in_texts(self) -> list[Any]:
        return [token for token in self._backend.get_added_tokens_decoder().values() if not token.special]

    @cached_property
    def _byte_table(self) -> dict[int, bytes]:
        """Bytes of each id."""
        spelled = _byte_spellings()
        table = {}
        added = self._backend.get_added_tokens_decoder()
        for piece, index in self._vocabulary.items():
            if index in added:
                table[index] = b"" if added[index].special else piece.encode("utf-8")
            else:
                table[index] = (
                    bytes(spelled[c] for c in piece)
                    if all(c in spelled for c in piece)
                    else piece.encode("utf-8")
                )
        return table


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`, with the tokens that the files beside it add: see `sentencepiece_pieces`.

    Decoding is exact only as far as the model's own normalisation keeps the text.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        super().__init__(str(path), [path, *sidecars(path)])
        self.companions = companions_of(path)
        content = _read(path)
        self._pieces = Pieces(content, read_named(path), path, threads or cores())
        self.vocab_size = self._pieces.size
        self.bos_id, self.eos_id = self._pieces.marks
        further = f"\0{self._pieces.further}" if self._pieces.further else ""
        self.identity = hashlib.sha256(content + further.encode()).hexdigest()

    def pieces(self) -> dict[int, str]:
        return self._pieces.names

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._pieces.encode(texts, special=False)

    def encode_special(self, texts: Sequence[str]) -> list[list[int]]:
        return self._pieces.encode(texts, special=True)

    def encode_later(self, texts: Sequence[str]) -> list[list[int]]:
        return self._pieces.encode(texts, special=False, later=True)

    def added_tokens(self) -> list[tuple[str, int, bool]]:
        return self._pieces.added()

    def decode(self, ids: Sequence[int]) -> str:
        return self._pieces.decode([int(i) for i in ids])


def load_tokenizer(spec: str | Path, threads: int | None = None, where: str = "data.tokenizer") -> Tokenizer:
    """The tokenizer that a recipe names, or the option `where`.

    `bytes`, a `.model`, a `tokenizer.json`, a folder that holds one, or a tokenized folder.

    `threads` limits SentencePiece; the `tokenizers` library reads TOKENIZERS_PARALLELISM from the
    environment. Raises UserError when there is none.
    """
    if str(spec) == "bytes":
        return BytesTokenizer()
    if str(spec).startswith("train:"):
        raise UserError(
            f"'{spec}' is trained on the sources",
            where=where,
            fix="name the trained tokenizer.json here",
        )
    path = expand(spec, where)
    if path.is_dir():
        path = _inside(path)
        if path.name == "bytes":
            return BytesTokenizer()
    if not path.is_file():
        raise UserError(
            f"no tokenizer at '{path}'",
            where=where,
            fix="name a .model, a tokenizer.json, a folder with one, 'bytes' or 'train:bpe-4096'",
        )
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path, threads)


def _byte_spellings() -> dict[str, int]:
    """The printable character that byte-level vocabularies spell each byte with (the GPT-2 convention)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _inside(folder: Path) -> Path:
    for place in (folder, folder / "tokenizer"):
        if (place / "tokenizer.json").is_file():
            return place / "tokenizer.json"
        models = sorted(place.glob("*.model")) if place.is_dir() else []
        if models:
            return models[0]
    manifest = folder / MANIFEST
    if manifest.is_file():
        try:
            if json_text.loads(manifest.read_text(encoding="utf-8"))["tokenizer"]["spec"] == "bytes":
                return Path("bytes")
        except (ValueError, KeyError, TypeError):
            pass  # a broken manifest gets its own message where the shards are opened
    return folder / "tokenizer.json"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror})", where=str(path), fix="make it readable"
        ) from error
