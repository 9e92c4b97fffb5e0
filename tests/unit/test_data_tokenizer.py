"""Tokenizers: exact decoding, no accidental special tokens, splitting, training."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hlat.data import long_text
from hlat.data.packed import document_hash, holdout_threshold
from hlat.data.sources import resolve_source
from hlat.data.tokenizer import load_tokenizer
from hlat.data.train_tokenizer import train_bpe, trained_vocab, training_texts
from hlat.errors import UserError

TEXT = [
    "def f(x):\n    return x + 1\n\n\nclass A:\n    pass  # grüße\n" * 40,
    "the cat, the dog; 2024 = 42\n" * 60,
]
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return load_tokenizer(train_bpe(iter(TEXT), 400, tmp_path_factory.mktemp("bpe")))


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory):
    import sentencepiece

    folder = tmp_path_factory.mktemp("sp")
    (folder / "text.txt").write_text("\n".join(f"the cat number {i} sat on mat {i * 7}" for i in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "sp"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return load_tokenizer(folder / "sp.model")


@given(any_text)
@settings(max_examples=200, deadline=None)
def test_byte_level_decoding_is_exact(bpe, text):
    for tokenizer in (bpe, load_tokenizer("bytes")):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert (
            tokenizer.count_bytes(ids) == len(text.encode()) == sum(tokenizer.count_bytes([i]) for i in ids)
        )
        assert tokenizer.eos_id not in ids and max(ids, default=0) < tokenizer.vocab_size


def test_special_tokens_in_the_text_are_text(bpe):
    text = "a<|endoftext|>b"
    assert bpe.eos_id == 0 and 0 not in bpe.encode(text) and bpe.decode(bpe.encode(text)) == text
    assert bpe.decode([bpe.eos_id, *bpe.encode("x")]) == "x"


def test_encode_forms_agree(bpe, sentence_piece):
    for tokenizer in (bpe, sentence_piece, load_tokenizer("bytes")):
        batch = tokenizer.encode_batch(TEXT)
        assert batch == [tokenizer.encode(text) for text in TEXT]
        assert [array.tolist() for array in tokenizer.encode_arrays(TEXT)] == batch


def test_tokenizers_that_put_a_space_before_a_text_are_never_split(tmp_path, monkeypatch):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    monkeypatch.setattr(long_text, "SPLIT_ABOVE", 50)
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"]))
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert not tokenizer.takes_parts and not tokenizer.byte_exact
    assert tokenizer.encode_arrays([TEXT[0]])[0].tolist() == tokenizer.encode(TEXT[0])
    assert tokenizer.eos_id == 1


def test_sentence_piece_model(sentence_piece):
    text = "the cat number 5 sat é"
    assert sentence_piece.decode(sentence_piece.encode(text)) == text
    assert sentence_piece.eos_id == 2 and sentence_piece.bos_id == 1 and sentence_piece.vocab_size == 320
    assert 2 not in sentence_piece.encode("a</s>b")
    assert [path.suffix for path in sentence_piece.files()] == [".model"]


def test_end_token_is_taken_from_the_configuration_beside_it(bpe, tmp_path):
    definition = json.loads(bpe.files()[0].read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    unnamed = load_tokenizer(tmp_path)
    assert unnamed.eos_id == 0
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "!"}, "bos_token": None})
    )
    named = load_tokenizer(tmp_path / "tokenizer.json")
    assert named.eos_id == named.encode("!")[0] and named.identity != unnamed.identity
    assert [path.name for path in named.files()] == ["tokenizer.json", "tokenizer_config.json"]


def test_padding_and_truncation_of_a_saved_tokenizer_do_not_touch_documents(bpe, tmp_path):
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(bpe.files()[0]))
    backend.enable_truncation(5)
    backend.enable_padding(length=7)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode_batch(["a", TEXT[0]]) == bpe.encode_batch(["a", TEXT[0]])


def test_training_is_repeatable_and_learns(bpe, tmp_path):
    again = load_tokenizer(train_bpe(iter(TEXT), 400, tmp_path))
    assert again.identity == bpe.identity and again.vocab_size <= 400
    assert len(bpe.encode(TEXT[0])) < len(TEXT[0]) / 2


def test_training_text_leaves_out_what_is_held_out(tmp_path):
    texts = [f"document {i}" for i in range(300)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i:03}.txt").write_text(text)
    source, below = resolve_source(path=tmp_path), holdout_threshold(0.3)
    wanted = [text for text in texts if document_hash(text.encode()) >= below]
    assert list(training_texts([source], below)) == wanted and 150 < len(wanted) < 270
    sample = list(training_texts([source], below, limit=source.size // 2))
    assert set(sample) < set(wanted) and 60 < len(sample) < 150


@pytest.mark.parametrize("limit", [1, 2**40])
def test_there_is_always_a_text_to_train_on(tmp_path, limit):
    """Few documents, larger than the sample or with hashes below the held-out threshold."""
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(f"document {i}")
    source = resolve_source(path=tmp_path)
    marks = {document_hash(f"document {i}".encode()): f"document {i}" for i in range(5)}
    ordered = sorted(marks)
    for below in (0, ordered[2], ordered[4]):
        trained_on = [marks[mark] for mark in ordered if mark >= below]
        found = list(training_texts([source], below, limit=limit))
        assert found == trained_on[:1] if limit == 1 else set(found) == set(trained_on)
    assert list(training_texts([source], ordered[4] + 1, limit=limit)) == [marks[ordered[4]]]


def test_a_single_held_out_document_still_makes_a_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("words and words " * 50)
    below = document_hash((tmp_path / "a.txt").read_bytes()) + 1
    path = train_bpe(training_texts([resolve_source(path=tmp_path)], below), 300, tmp_path / "out")
    assert load_tokenizer(path).vocab_size > 257


@pytest.mark.parametrize(
    ("spec", "message"),
    [("train:bpe-12", "257"), ("train:unigram-300", "train:bpe-SIZE"), ("train:bpe-x", "train:bpe-SIZE")],
)
def test_bad_training_specs_are_one_line(spec, message):
    with pytest.raises(UserError, match=message):
        trained_vocab(spec)


def test_training_specs():
    assert trained_vocab("train:bpe-4096") == 4096 and trained_vocab("bytes") is None


def test_bad_tokenizer_files_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer("absent.model")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "x.model").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "x.model")


def test_bytes_cut_within_a_character_are_counted(bpe):
    ids = bpe.encode("日本語")
    assert len(ids) > 3
    pieces = [bpe.decode_bytes(np.array([i])) for i in ids]
    assert b"".join(pieces) == "日本語".encode()
