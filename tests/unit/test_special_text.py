"""Text that spells a special token is text, also where the token is a word of the vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hlat.cli import main
from hlat.data.quoted import Quoted
from hlat.data.text_encoder import TextEncoder
from hlat.data.tokenizer import load_tokenizer
from hlat.errors import UserError

CORPUS = ["the cat sat, hello world < / s > THE X"] * 20
KINDS = ("Unigram", "BPE", "BPE with ignored merges", "BPE with byte fallback", "WordPiece", "WordLevel")
NORMALIZERS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "Lowercase": {"type": "Lowercase"},
    "NFKC": {"type": "NFKC"},
    "Prepend": {"type": "Prepend", "prepend": "▁"},
    "Strip": {"type": "Strip", "strip_left": True, "strip_right": True},
}
SPELLED = ("</s>", "the </s> cat", "<s>the", "a</s></s>b", "THE </S> X", "＜/s＞ the", " </s>")


def definition(kind: str) -> dict[str, Any]:
    """A tokenizer.json whose vocabulary has `<s>` and `</s>` as words that its model can make of text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    special, options = ["<unk>", "<s>", "</s>"], {"show_progress": False}
    trainer: Any
    if kind == "Unigram":
        backend = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", **options)
    elif kind.startswith("BPE"):
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        if "fallback" in kind:
            special += [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, **options)
    else:
        model, train = getattr(models, kind), getattr(trainers, f"{kind}Trainer")
        backend = Tokenizer(model(unk_token="<unk>"))
        trainer = train(vocab_size=80, special_tokens=special, **options)
    words = kind in ("WordPiece", "WordLevel")
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit() if words else pre_tokenizers.Metaspace()
    backend.train_from_iterator(CORPUS, trainer)
    made: dict[str, Any] = json.loads(backend.to_str())
    if kind == "BPE with ignored merges":
        made["model"]["ignore_merges"] = True
        made["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    made["model"]["byte_fallback"] = "fallback" in kind
    if kind == "BPE":
        steps = ["/s", "</s"]
        size = max(made["model"]["vocab"].values())
        made["model"]["vocab"] |= {word: size + 1 + n for n, word in enumerate(steps)}
        made["model"]["merges"] = [["/", "s"], ["<", "/s"], ["</s", ">"], *made["model"]["merges"]]
    return made


@pytest.fixture(scope="module")
def definitions() -> dict[str, dict[str, Any]]:
    return {kind: definition(kind) for kind in KINDS}


def write(folder: Path, content: dict[str, Any], normalizer: str, marked: bool | None) -> Path:
    """A tokenizer whose added tokens are special, are not, or (None) are words of the vocabulary alone."""
    added = [token | {"special": bool(marked)} for token in content["added_tokens"] if marked is not None]
    folder.mkdir(exist_ok=True)
    said = content | {"normalizer": NORMALIZERS[normalizer], "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_text_never_holds_a_special_token(definitions, tmp_path: Path, kind: str) -> None:
    from tokenizers import Tokenizer

    for normalizer in NORMALIZERS:
        for marked in (True, False, None):
            folder = write(tmp_path / "t", definitions[kind], normalizer, marked)
            tokenizer = load_tokenizer(folder)
            marks = [tokenizer.bos_id, tokenizer.eos_id]
            assert marks == [1, 2]
            bare = Tokenizer.from_file(str(folder / "tokenizer.json"))
            bare.encode_special_tokens = True
            if marked:  # the case is one
                assert any(set(marks) & set(bare.encode(text).ids) for text in SPELLED) is (
                    kind != "BPE with byte fallback"
                )
            encoder = TextEncoder(tokenizer, "<s></s>")
            for text in SPELLED:
                assert not {*marks} & {*tokenizer.encode(text)}, (normalizer, marked, text)
                [ids] = encoder.encode([Quoted("<s>") + Quoted.of(text) + Quoted("</s>")])
                found = [index for index in ids.tolist() if index in marks]
                assert found == marks and [ids[0], ids[-1]] == marks, (normalizer, marked, text)
            for text in ("the cat", "hello, cat", "the é x"):  # what spells none has the library's ids
                assert tokenizer.encode(text) == bare.encode(text, add_special_tokens=False).ids
            assert 2 in tokenizer.encode_special(["the </s> cat"])[0], "where it is asked for it is one"


@pytest.mark.parametrize("kind", ["Unigram", "WordLevel"])
def test_text_that_no_token_stands_for_is_one_line(definitions, tmp_path: Path, kind: str, capsys) -> None:
    """A vocabulary without an unknown token: the library raises plain exceptions."""
    model = definitions[kind]["model"] | ({"unk_id": None} if kind == "Unigram" else {"unk_token": "none"})
    folder = write(tmp_path / "t", definitions[kind] | {"model": model}, "none", True)
    tokenizer = load_tokenizer(folder)
    assert 0 not in tokenizer.encode("the cat")
    with pytest.raises(UserError, match="cannot encode the text 'the é'"):
        tokenizer.encode_batch(["the cat", "the é"])
    with pytest.raises(UserError, match="cannot encode the text '<s>é</s>'"):
        TextEncoder(tokenizer, "<s>").encode([Quoted("<s>") + Quoted.of("é</s>")])
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.txt").write_text("the é")
    built = ["data", "tokenize", str(tmp_path / "d"), "--tokenizer", str(folder), "--workers", "1"]
    assert main([*built, "--out", str(tmp_path / "o")]) == 2
    said = capsys.readouterr().err
    assert said.count("hlat: error:") == 1 and "cannot encode the text 'the é'" in said
    assert "Traceback" not in said
