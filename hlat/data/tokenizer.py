"""Tokenizers: SentencePiece `.model`, `tokenizer.json`, and plain bytes.

In HLAT's stream a document is its ids followed by one end-of-document id (EOS); BOS comes before it only
where the weights that are trained on know one (`Tokenizer.convention`). `encode` adds neither; the writer of
the shards does. Text that happens to spell a special token (`</s>`)
is encoded as ordinary text, so EOS ids in a stream are document ends and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hlat.data.convention import Convention
from hlat.data.sources import MANIFEST
from hlat.errors import UserError
from hlat.host.limits import cores
from hlat.paths import expand

# Names under which published tokenizers keep their end-of-document token, tried when no tokenizer_config.json
# says it.
_EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<｜end▁of▁sentence｜>")
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<｜begin▁of▁sentence｜>")
# Longer texts are encoded in pieces, where the tokenizer allows it: an encoding takes some hundred bytes per
# token while it is built.
SPLIT_ABOVE = 4 * 2**20
# Where long texts may be cut. Next to other white space a cut could change how the run of white space is
# split into words.
_LINE_END = re.compile(r"(?<=\S)\n(?=\S)")


class Tokenizer:
    """What all tokenizers share."""

    vocab_size: int  # largest id + 1
    bos_id: int | None = None
    eos_id: int | None = None
    byte_exact: bool = (
        False  # decode_bytes(encode(text)) is the text, and every id stands for a fixed number of bytes
    )
    identity: str  # hex sha256 of everything that decides the ids
    convention = Convention()  # how the weights it is used with know texts
    companions: tuple[Path, ...] = ()  # further files that go where the tokenizer goes: a chat template, …
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

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS and EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, without BOS and EOS."""
        raise NotImplementedError

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode_batch`, each as int64 (n,); long texts piecewise where that gives the same ids."""
        return [np.asarray(ids, dtype=np.int64) for ids in self.encode_batch(texts)]

    def encode_parts(self, texts: Sequence[str], *, begin: bool) -> list[np.ndarray]:
        """Ids of prompts (`begin`) or of what follows them, as the convention says, each int64 (n,): a prompt
        begins with BOS where the weights know one, unless it is spelled there already.
        """
        arrays, bos = self.encode_arrays(texts), self.convention.bos
        if bos is None or not begin:
            return arrays
        return [ids if ids[:1].tolist() == [bos] else np.append(bos, ids).astype(np.int64) for ids in arrays]

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
        return {byte: spelled for spelled, byte in _byte_spellings().items()} | {256: "<|endoftext|>"}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return bytes(int(i) for i in ids if i < 256)


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library.

    BOS and EOS are read from `tokenizer_config.json` beside it, else by usual names.
    """

    def __init__(self, path: Path) -> None:
        config = path.with_name("tokenizer_config.json")
        super().__init__(str(path), [path, config] if config.is_file() else [path])
        from tokenizers import Tokenizer as Backend

        content = _read(path)
        try:
            self._backend = Backend.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise UserError(
                f"not a tokenizer.json ({error})",
                where=str(path),
                fix="name a file saved by the tokenizers library",
            ) from error
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True
        self._definition: dict[str, Any] = json.loads(content)
        self._vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocabulary.values(), default=-1) + 1
        named = _config_tokens(config)
        self.eos_id = self._first_known([named.get("eos_token"), *_EOS_NAMES])
        self.bos_id = self._first_known([named.get("bos_token"), *_BOS_NAMES])
        self.byte_exact = self._is_byte_level()
        self.identity = hashlib.sha256(content + f"\0{self.eos_id}".encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # The fast variant skips offsets; it came with tokenizers 0.20.1.
        run = getattr(self._backend, "encode_batch_fast", self._backend.encode_batch)
        return [encoding.ids for encoding in run(list(texts), add_special_tokens=False)]

    def pieces(self) -> dict[int, str]:
        return {index: piece for piece, index in self._vocabulary.items()}

    def encode_parts(self, texts: Sequence[str], *, begin: bool) -> list[np.ndarray]:
        self._backend.encode_special_tokens = not self.convention.special
        try:
            return super().encode_parts(texts, begin=begin)
        finally:
            self._backend.encode_special_tokens = True

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        arrays = []
        for text in texts:
            parts = _line_parts(text) if len(text) > SPLIT_ABOVE and self._splits_at_lines else None
            arrays.append(np.concatenate(super().encode_arrays(parts)) if parts else None)
        short = iter(
            super().encode_arrays([text for text, done in zip(texts, arrays, strict=True) if done is None])
        )
        return [next(short) if done is None else done for done in arrays]

    def decode(self, ids: Sequence[int]) -> str:
        if self.byte_exact:
            return self.decode_bytes(ids).decode("utf-8", "replace")
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        if not self.byte_exact:
            return super().decode_bytes(ids)
        table = self._byte_table
        return b"".join(table.get(int(i), b"") for i in ids)

    def _first_known(self, names: Sequence[Any]) -> int | None:
        return next((self._vocabulary[name] for name in names if name in self._vocabulary), None)

    def _is_byte_level(self) -> bool:
        decoder = self._definition.get("decoder") or {}
        before = self._definition.get("pre_tokenizer") or {}
        steps = before.get("pretokenizers", [before])
        prefix = any(step.get("type") == "ByteLevel" and step.get("add_prefix_space") for step in steps)
        return decoder.get("type") == "ByteLevel" and not self._definition.get("normalizer") and not prefix

    @cached_property
    def _byte_table(self) -> dict[int, bytes]:
        """Bytes of each id."""
        spelled = _byte_spellings()
        table = {}
        added = {token["id"]: token for token in self._definition.get("added_tokens", [])}
        for piece, index in self._vocabulary.items():
            if index in added:
                table[index] = b"" if added[index].get("special") else piece.encode("utf-8")
            else:
                table[index] = (
                    bytes(spelled[c] for c in piece)
                    if all(c in spelled for c in piece)
                    else piece.encode("utf-8")
                )
        return table

    @cached_property
    def _splits_at_lines(self) -> bool:
        """Whether encoding line blocks apart gives the ids of the whole.

        Not so for tokenizers that put a space before a text.
        """
        probes = ["a b\n", "x = 1;\n", "  // y)\n", "7\n", "é\n"]
        starts = ["next line", "{", "7 of", "(a)", "#é", "'s"]
        return all(self.encode(a + b) == self.encode(a) + self.encode(b) for a in probes for b in starts)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`.

    Decoding is exact only as far as the model's own normalisation keeps the text.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        super().__init__(str(path), [path])
        import sentencepiece

        content = _read(path)
        self._backend = sentencepiece.SentencePieceProcessor()
        try:
            self._backend.LoadFromSerializedProto(content)
        except Exception as error:  # RuntimeError or a protobuf error, by version
            raise UserError(
                f"not a SentencePiece model ({error})", where=str(path), fix="name a .model file"
            ) from error
        self._threads = threads or cores()
        self.vocab_size = self._backend.vocab_size()
        self.eos_id = self._backend.eos_id() if self._backend.eos_id() >= 0 else None
        self.bos_id = self._backend.bos_id() if self._backend.bos_id() >= 0 else None
        self.identity = hashlib.sha256(content).hexdigest()

    def pieces(self) -> dict[int, str]:
        return {index: self._backend.id_to_piece(index) for index in range(self.vocab_size)}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._backend.encode(list(texts), out_type=int, num_threads=self._threads)

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([int(i) for i in ids])


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
            if json.loads(manifest.read_text(encoding="utf-8"))["tokenizer"]["spec"] == "bytes":
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


def _config_tokens(path: Path) -> dict[str, str]:
    """bos_token and eos_token of a tokenizer_config.json: strings there, or objects with `content`."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(_read(path))
    except ValueError as error:
        raise UserError(f"not JSON ({error})", where=str(path), fix="repair or remove the file") from error
    values = {name: config.get(name) for name in ("bos_token", "eos_token")}
    texts = {
        name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _line_parts(text: str) -> list[str]:
    """The text in parts of at least SPLIT_ABOVE/4 characters, cut at line feeds between visible ones."""
    parts, start, wanted = [], 0, SPLIT_ABOVE // 4
    while len(text) - start > wanted and (found := _LINE_END.search(text, start + wanted)):
        parts.append(text[start : found.end()])
        start = found.end()
    return [*parts, text[start:]]
