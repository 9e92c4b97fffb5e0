"""Damage that fuzzers found, each read by every reader it can reach: JSON that is too deep, pieces that are
no text, messages that quote too much."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from hlat.checkpoint.codec import unseal
from hlat.checkpoint.layout import Broken, Index
from hlat.data.chat_template import TemplateFiles
from hlat.data.hub import saved_splits
from hlat.data.tokenizer import load_tokenizer
from hlat.errors import UserError
from hlat.host import json_text
from hlat.observe.jsonl import read_rows
from hlat.storage.fingerprint import FILE, read_stretches

DEEP = b'{"a": ' + b"[" * 100_000


def test_what_is_too_deep_is_no_value() -> None:
    assert json_text.loads(b'{"a": [1]}') == {"a": [1]}
    for text in (DEEP, DEEP.decode(), b"{", b"\xff"):
        with pytest.raises(ValueError):
            json_text.loads(text)


def test_every_reader_takes_it_for_damage(tmp_path: Path) -> None:
    for name in (FILE, "dataset_dict.json", "manifest.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes(DEEP + b"\n")
    assert read_stretches(tmp_path) == [] and saved_splits(tmp_path) is None
    assert list(read_rows(tmp_path / "metrics.jsonl")) == []
    with pytest.raises(ValueError):
        unseal(DEEP)
    with pytest.raises(Broken):
        Index.from_json(DEEP)
    with pytest.raises(UserError):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        DEEP,
        b"\xff",
        json.dumps({"chat_template": "\ud800"}).encode(),
        json.dumps({"chat_template": [{"name": "\ud800", "template": "x"}]}).encode(),
    ],
)
def test_a_chat_template_of_a_damaged_file_is_refused(config: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(config)
    with pytest.raises(UserError, match="JSON|Unicode"):
        TemplateFiles.read(tmp_path)


@pytest.mark.parametrize("value", [[1], [None, ["x"]], [{"name": 1, "template": "x"}], {"x": 1}, 7])
def test_a_chat_template_of_another_type_is_none(value: object, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}), encoding="utf-8")
    assert TemplateFiles.read(tmp_path) is None


def test_a_message_that_quotes_too_much_is_cut() -> None:
    error = UserError("Unknown version 'x" + "y" * 5000 + "z'", where="tokenizer.json", fix="save it again")
    assert len(error.line()) < 1000 and error.line().endswith("yz'; save it again")
    assert error.line().startswith("tokenizer.json: Unknown version 'xyy")


def test_a_sentencepiece_model_with_a_piece_that_is_no_text_is_refused(tmp_path: Path) -> None:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words é"] * 20), model_writer=model, vocab_size=20, model_type="bpe",
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    content = model.getvalue()
    assert load_tokenizer(_written(tmp_path, content)).encode("words")
    damaged = content.replace("é".encode(), b"\xff\xa9", 1)  # a piece: they come first
    assert damaged != content
    with pytest.raises(UserError, match="not UTF-8"):
        load_tokenizer(_written(tmp_path, damaged))


def _written(folder: Path, content: bytes) -> Path:
    (folder / "tokenizer.model").write_bytes(content)
    return folder / "tokenizer.model"
