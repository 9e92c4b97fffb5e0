"""The tokenizer inside a GGUF file, written as Hugging Face files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hlat.checkpoint.hf_tokenizer import add_bos
from hlat.checkpoint.sentencepiece_json import (
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceModel,
    to_tokenizers,
)

_LISTS: dict[str, Any] = {"tokens": str, "token_type": int, "scores": int | float, "merges": str}
# How Llama 3 splits text into words: contractions, letters, up to three digits, signs, line ends, spaces.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer(values: dict[str, Any], folder: Path, max_seq_len: int) -> str | None:
    """Writes tokenizer.json and tokenizer_config.json into `folder`.

    Returns None, or why this tokenizer cannot be expressed; nothing is written then.

    Args:
        values: the file's `tokenizer.*` metadata.
    """
    tokens, kinds = values.get("tokenizer.ggml.tokens"), values.get("tokenizer.ggml.token_type")
    if not tokens:
        return "the file holds no vocabulary"
    if problem := _wrong_type(values):
        return f"its vocabulary is damaged ({problem})"
    kinds = kinds or [1] * len(tokens)
    model, split = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre", "default")
    if model not in ("gpt2", "llama"):
        return f"its tokenizer '{model}' is not supported"
    try:
        backend = (_byte_level if model == "gpt2" else _sentencepiece)(values, tokens, kinds, split)
    except Exception as error:  # the tokenizers library raises plain Exception
        return f"its vocabulary is damaged ({error})"
    if backend is None:
        return f"its way of splitting words ('{split}') is not known"
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_seq_len}
    config |= {"clean_up_tokenization_spaces": False}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        index = values.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and 0 <= index < len(tokens):
            config[f"{name}_token"] = tokens[index]
    if values.get("tokenizer.ggml.add_bos_token", model == "llama") and "bos_token" in config:
        add_bos(backend, tokens.index(config["bos_token"]))
    if values.get("tokenizer.chat_template"):
        config["chat_template"] = values["tokenizer.chat_template"]
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return None


def _wrong_type(values: dict[str, Any]) -> str:
    """The first of the values that is not of its type; empty: all are."""
    for name, inner in _LISTS.items():
        value = values.get(f"tokenizer.ggml.{name}")
        if value and not (isinstance(value, list) and all(isinstance(item, inner) for item in value)):
            return f"tokenizer.ggml.{name} is no list of {'texts' if inner is str else 'numbers'}"
    for name in ("bos", "eos", "unknown", "padding"):
        value = values.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            return f"tokenizer.ggml.{name}_token_id is no number"
    if not isinstance(values.get("tokenizer.chat_template", ""), str):
        return "tokenizer.chat_template is no text"
    return ""


def _sentencepiece(values: dict[str, Any], tokens: list[str], kinds: list[int], split: str) -> Any:
    scores = values.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    pieces = list(zip(tokens, scores, kinds, strict=True))
    prefix = bool(values.get("tokenizer.ggml.add_space_prefix", True))
    return to_tokenizers(SentencePieceModel(pieces, dummy_prefix=prefix))


def _byte_level(values: dict[str, Any], tokens: list[str], kinds: list[int], split: str) -> Any:
    """A GPT-2 style byte-level BPE; None for an unknown splitting rule."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    space = bool(values.get("tokenizer.ggml.add_space_prefix", False))
    by_words = pre_tokenizers.ByteLevel(add_prefix_space=space)
    rules: dict[str, Any] = {
        "gpt-2": by_words,
        "default": by_words,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_words]),
        "llama-bpe": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_LLAMA3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False),
            ]
        ),
    }
    if split not in rules:
        return None
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in values.get("tokenizer.ggml.merges") or []]
    # Only Llama 3 takes a word that is in the vocabulary whole, without its merges.
    whole = split == "llama-bpe"
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole))  # type: ignore[arg-type]
    backend.pre_tokenizer = rules[split]
    backend.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind in (CONTROL, UNKNOWN)]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    defined = [token for token, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED]
    backend.add_tokens([AddedToken(token, normalized=False) for token in defined])
    return backend
