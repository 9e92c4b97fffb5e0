"""The `tokenizers` library: running it, and copies of a tokenizer to which some of its tokens are nothing.

The library's `encode_special_tokens` leaves special tokens in a text alone, but where the vocabulary itself
has one as a word, the model makes it of the text all the same: every Unigram vocabulary does, WordLevel and
WordPiece where their splitting keeps the word whole, BPE where merges lead there. SentencePiece, from which
most of these vocabularies come, never makes a control symbol of a text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hlat.errors import UserError

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_SHOWN = 40  # characters of a text in an error


def run(
    backend: Any, texts: Sequence[str], where: str, special: bool = False, shown: str | None = None
) -> list[list[int]]:
    """Ids of texts.

    Args:
        backend: a `tokenizers.Tokenizer`.
        where: the tokenizer, for errors.
        special: whether its post-processor adds BOS and the like.
        shown: how an error shows a single text that was changed to be encoded.

    Raises UserError for a text with a character that the vocabulary has nothing for.
    """
    # The fast variant skips offsets; it came with tokenizers 0.20.1.
    encode = getattr(backend, "encode_batch_fast", backend.encode_batch)
    try:
        return [encoding.ids for encoding in encode(list(texts), add_special_tokens=special)]
    except BaseException as error:  # the library raises plain Exception, and panics with a BaseException
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        if len(texts) > 1:  # find the one
            return [ids for text in texts for ids in run(backend, [text], where, special)]
        raise UserError(
            f"cannot encode the text {(shown or texts[0])[:_SHOWN]!r} ({error})",
            where=where,
            fix="take a tokenizer that has an unknown token or bytes for what its vocabulary lacks",
        ) from error


def open_definition(definition: Mapping[str, Any]) -> Any:
    """A `tokenizers.Tokenizer` of a parsed tokenizer.json, in which special tokens are found."""
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(json.dumps(definition))
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = False
    return backend


def stand_ins(definition: Mapping[str, Any]) -> set[str]:
    """Tokens that stand for what the vocabulary lacks: the unknown token, and bytes. Text is made of these,
    whatever a file calls them.
    """
    model = definition["model"]
    found = {model["unk_token"]} if model.get("unk_token") else set()
    if model["type"] == "Unigram" and model.get("unk_id") is not None:
        found.add(model["vocab"][model["unk_id"]][0])
    if model.get("byte_fallback"):
        found |= {word for word in _words(model) if _BYTE.fullmatch(word)}
    return found


def made_of_text(definition: Mapping[str, Any], contents: Collection[str]) -> set[str]:
    """Those of some tokens that the model makes of text that spells them. One of a single character is not
    counted: nothing else could stand for it.
    """
    model = definition["model"]
    wanted = {text for text in contents if len(text) > 1} - stand_ins(definition)
    if model["type"] == "BPE" and not model.get("ignore_merges"):
        return wanted & {_merged(model, *_pair(merge)) for merge in model["merges"]}
    return wanted & _words(model).keys()


def hide(definition: Mapping[str, Any], contents: Collection[str]) -> tuple[Any, dict[int, int]]:
    """A copy of a tokenizer to which some of its tokens are nothing.

    Args:
        definition: its tokenizer.json, parsed, as the library writes it.
        contents: the tokens: added ones, and words of the vocabulary, which get names that nobody can guess.

    Returns:
        The copy, and the tokenizer's id for each id of the copy's added tokens; all others are the same.
    """
    hidden = made_of_text(definition, contents)
    rest = [token for token in definition["added_tokens"] if token["content"] not in contents]
    model = _without(definition["model"], hidden) if hidden else definition["model"]
    copied = {**definition, "model": model, "added_tokens": rest, "post_processor": None}
    backend = open_definition(copied)
    return backend, {backend.token_to_id(token["content"]): token["id"] for token in rest}


def _without(model: Mapping[str, Any], hidden: set[str]) -> dict[str, Any]:
    nonce = secrets.token_hex(16)  # between two characters that Unicode keeps out of texts
    names = {word: f"\ufdd0w{n}x{nonce}\ufdd1" for n, word in enumerate(sorted(hidden))}
    changed = dict(model)
    if isinstance(model["vocab"], list):
        changed["vocab"] = [[names.get(word, word), score] for word, score in model["vocab"]]
    else:
        changed["vocab"] = {names.get(word, word): index for word, index in model["vocab"].items()}
    if "merges" in model:
        pairs = [_pair(merge) for merge in model["merges"]]
        changed["merges"] = [
            list(pair) for pair in pairs if hidden.isdisjoint({*pair, _merged(model, *pair)})
        ]
    return changed


def _words(model: Mapping[str, Any]) -> dict[str, int]:
    vocab = model["vocab"]
    return {word: index for index, (word, _) in enumerate(vocab)} if isinstance(vocab, list) else vocab


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _merged(model: Mapping[str, Any], left: str, right: str) -> str:
    return left + right.removeprefix(model.get("continuing_subword_prefix") or "")
