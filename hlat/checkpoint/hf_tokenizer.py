"""Tokenizer files on their way into and out of Hugging Face folders.

A tokenizer that came from Hugging Face goes back file by file, unchanged, also when its weights were trained
on since. One that HLAT trained with is completed with what `AutoTokenizer` needs. HLAT's own stream has no
BOS (a document is its tokens and EOS), so the tokenizer then exported does not add one: the model would see
a token it was never trained on. Where documents did begin with BOS, it adds that.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlat.checkpoint.sentencepiece_json import PROBES, read_sentencepiece, to_tokenizers
from hlat.data.special_tokens import CONFIG, complete, read_named, read_object
from hlat.data.tokenizer_files import copy_files, tokenizer_files
from hlat.data.tokenizers_library import run
from hlat.errors import UserError
from hlat.paths import expand

if TYPE_CHECKING:
    from hlat.data.tokenizer import Tokenizer


def tokenizer_texts(folder: Path | None) -> list[Path]:
    """The files of a Hugging Face tokenizer, chat templates included, and nothing else of the folder."""
    return [] if folder is None else tokenizer_files(folder)


def copy_tokenizer(folder: Path, target: Path) -> None:
    """Copies `tokenizer_texts(folder)` unchanged."""
    copy_files(tokenizer_texts(folder), target)


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The token ids that config.json and generation_config.json name."""
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def export_tokenizer(tokenizer: Tokenizer, out: Path, max_seq_len: int, bos: int | None = None) -> list[str]:
    """Writes the files of a tokenizer that HLAT trained with, for AutoTokenizer. Returns warnings.

    tokenizer.json stays as it is but for a post-processor that adds special tokens, which is dropped. A
    SentencePiece `.model` is kept as tokenizer.model and translated to tokenizer.json, if the translation
    gives the same ids on a set of probes. `bytes` becomes a byte-level vocabulary without merges. `bos` is
    the id that is put before every text; None: nothing is.
    """
    config: dict[str, Any] = {}
    warnings: list[str] = []
    files = {path.suffix: path for path in tokenizer.files()}
    if not files:
        backend = _bytes_backend()
    else:
        copy_files([path for path in tokenizer.kept_files() if path.suffix != ".model"], out)
        config = read_object(tokenizer.files()[0].with_name(CONFIG))
        if ".model" in files:
            shutil.copyfile(files[".model"], out / "tokenizer.model")
            backend = _from_sentencepiece(files[".model"], tokenizer)
        else:
            backend = _without_added_tokens(tokenizer.files()[0])
    for key in ("add_bos_token", "add_eos_token"):
        config.pop(key, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["model_max_length"] = max_seq_len
    config["clean_up_tokenization_spaces"] = False
    if backend is None:
        # transformers reads the .model itself and then needs sentencepiece installed.
        named = read_named(files[".model"])
        legacy = named.prefixes_all and bool(named.tokenizer_class)
        config |= {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
        config |= {"add_bos_token": bos is not None, "add_eos_token": False}
        warnings.append(
            "this SentencePiece model has no exact tokenizer.json; only tokenizer.model is written"
        )
    else:
        if bos is not None:
            add_bos(backend, bos)
        backend.save(str(out / "tokenizer.json"))
        for key, index in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
            if index is not None and config.get(key) is None:
                config[key] = backend.id_to_token(index)
    (out / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return warnings


def _without_added_tokens(path: Path) -> Any:
    from tokenizers import Tokenizer as Backend

    from hlat.data.tokenizer import open_tokenizers

    backend, _ = open_tokenizers(path)
    if backend.encode("a").ids != backend.encode("a", add_special_tokens=False).ids:
        definition = json.loads(backend.to_str())
        definition["post_processor"] = None
        backend = Backend.from_str(json.dumps(definition))
    return backend


def add_bos(backend: Any, bos: int) -> None:
    """Let a `tokenizers` object put the token with this id before every text."""
    from tokenizers.processors import TemplateProcessing

    token = backend.id_to_token(bos)
    pair = f"{token}:0 $A:0 {token}:1 $B:1"
    backend.post_processor = TemplateProcessing(
        single=f"{token}:0 $A:0", pair=pair, special_tokens=[(token, bos)]
    )


def _from_sentencepiece(path: Path, tokenizer: Tokenizer) -> Any:
    try:
        backend = to_tokenizers(read_sentencepiece(path))
        named = read_named(path)
        complete(backend, named, str(path))
    except ValueError as error:
        raise UserError(str(error), where=str(path)) from None
    except UserError:
        raise
    except Exception:  # the tokenizers library raises plain Exception for what it cannot express
        return None
    probes = [f"a {token.content} b{token.content}c" for token in named.to_add(set())]
    same = all(
        [backend.encode(text, add_special_tokens=False).ids for text in texts] == encode(texts)
        for texts, encode in ((PROBES, tokenizer.encode_batch), (probes, tokenizer.encode_special))
    )
    return backend if same else None


def _bytes_backend() -> Any:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    vocab = {spelled[byte]: byte for byte in range(256)} | {"<|endoftext|>": 256}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    return backend


class PromptEncoder:
    """Encodes text as `AutoTokenizer` does for an imported model: special tokens in the text are recognised,
    and BOS and EOS are put around it if the tokenizer's files say so: the post-processor of a tokenizer.json,
    whatever else is said, and `add_bos_token` and `add_eos_token` of tokenizer_config.json beside a
    tokenizer.model alone.

    Args:
        folder: holds tokenizer.json or tokenizer.model, and perhaps tokenizer_config.json; or one of the
            former two.

    Attributes:
        bos_id: of the tokenizer; None: it has none.
        added: id that is put before a text; None: nothing is.
    """

    def __init__(self, folder: str | Path) -> None:
        from hlat.data.tokenizer import load_tokenizer, open_tokenizers

        tokenizer = load_tokenizer(folder)
        folder = expand(folder)
        folder = folder.parent if folder.is_file() else folder
        self.bos_id, self._backend, self._tokenizer = tokenizer.bos_id, None, tokenizer
        self._before: list[int] = []
        self._after: list[int] = []
        if (folder / "tokenizer.json").is_file():
            self._backend, _ = open_tokenizers(folder / "tokenizer.json")
        else:
            said = read_object(folder / CONFIG)
            # True is what LlamaTokenizer documents; transformers 5 adds no BOS where the files say nothing.
            if said.get("add_bos_token") is not False and tokenizer.bos_id is not None:
                self._before = [tokenizer.bos_id]
            if said.get("add_eos_token") is True and tokenizer.eos_id is not None:
                self._after = [tokenizer.eos_id]
        first, plain = self.encode("a")[:1], self.encode("a", special=False)[:1]
        self.added: int | None = first[0] if first and first != plain else None

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text; without `special` nothing is added to what the text itself holds."""
        if self._backend is not None:
            return run(self._backend, [text], self._tokenizer.spec, special)[0]
        [ids] = self._tokenizer.encode_special([text])
        return [*self._before, *ids, *self._after] if special else ids


def prompt_ids(folder: Path, text: str) -> list[int]:
    """Ids of one prompt; `PromptEncoder` says how."""
    return PromptEncoder(folder).encode(text)
