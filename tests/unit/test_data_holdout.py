"""Held-out batches: every held-out token once, and the bytes of exactly that text."""

import numpy as np
import pytest

from hlat.data.build import build
from hlat.data.holdout import HoldoutStream
from hlat.data.packed import TokenFolder, document_hash
from hlat.data.sources import resolve_source
from hlat.data.tokenizer import load_tokenizer
from hlat.data.train_tokenizer import train_bpe

TEXTS = [f"text {i}: grüße, 日本語 und {i * i}\n" * (i % 5 + 1) for i in range(60)]


@pytest.fixture(scope="module", params=["bytes", "bpe", "sentencepiece"])
def held_out(request, tmp_path_factory):
    """(folders of two sources, tokenizer, held-out texts by hash)."""
    root = tmp_path_factory.mktemp("holdout")
    tokenizer = make_tokenizer(request.param, root)
    folders, held = [], []
    for name, texts in (("a", TEXTS[:40]), ("b", TEXTS[40:])):
        (root / name).mkdir()
        for number, text in enumerate(texts):
            (root / name / f"{number}.txt").write_text(text)
        source = resolve_source(path=root / name)
        folders.append(TokenFolder(build([source], tokenizer, root / f"out_{name}", holdout=0.4).folder))
        below = folders[-1].manifest["holdout_below"]
        held += [text for text in texts if document_hash(text.encode()) < below]
    return folders, tokenizer, sorted(held, key=lambda text: document_hash(text.encode()))


def make_tokenizer(kind, root):
    if kind == "bytes":
        return load_tokenizer("bytes")
    if kind == "bpe":
        return load_tokenizer(train_bpe(iter(TEXTS), 300, root / "bpe"))
    import sentencepiece

    (root / "text.txt").write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / "text.txt"),
        model_prefix=str(root / "sp"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return load_tokenizer(root / "sp.model")


def targets_of(batches):
    return [t for batch in batches for t in batch.targets.flatten().tolist() if t != -100]


def test_whole_stream_without_a_mask(held_out):
    folders, tokenizer, texts = held_out
    stream = HoldoutStream(folders, tokenizer, 16, False)
    expected = [i for text in texts for i in [*tokenizer.encode(text), tokenizer.eos_id]]
    batches = list(stream.batches(3))
    assert targets_of(batches) == expected and len(expected) == stream.targets == stream.targets_in()
    assert {tuple(batch.ids.shape) for batch in batches} == {(3, 16)}
    assert (
        batches[0].ids[0, 0] == tokenizer.eos_id
    )  # the first token of the first document has this for context
    flat = np.concatenate([batch.ids.flatten() for batch in batches])
    assert flat[1 : len(expected)].tolist() == expected[:-1]
    assert stream.text_bytes() == sum(len(text.encode()) for text in texts)
    assert stream.text() == "".join(texts).encode()
    assert stream.documents == len(texts)


@pytest.mark.parametrize("rows", [1, 5, 7, None])
def test_the_size_of_a_batch_changes_nothing(held_out, rows):
    folders, tokenizer, _ = held_out
    stream = HoldoutStream(folders, tokenizer, 16, True)
    seen = [targets_of(stream.batches(size, rows)) for size in (1, 2, 3, 8)]
    assert seen[0] and all(one == seen[0] for one in seen)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5, 2000])
def test_bytes_are_those_of_the_targets(held_out, mask, rows):
    """Counted token by token: each target's own bytes, EOS none."""
    folders, tokenizer, texts = held_out
    stream = HoldoutStream(folders, tokenizer, 16, mask)
    batches = list(stream.batches(2, rows))
    targets = targets_of(batches)
    assert stream.targets_in(rows) == len(targets)
    assert len(batches) <= -(-rows // 2)
    if rows < 2000:
        full = [i for text in texts for i in [*tokenizer.encode(text), tokenizer.eos_id]][: rows * 16]
        assert len(batches) == -(-rows // 2) and (mask or targets == full)
    if tokenizer.byte_exact:
        assert stream.text_bytes(rows) == sum(tokenizer.count_bytes([t]) for t in targets)
        assert stream.text(rows) == tokenizer.decode_bytes(targets)
        assert len(stream.text(rows)) == stream.text_bytes(rows)


def test_first_tokens_are_no_targets_with_the_mask(held_out):
    folders, tokenizer, texts = held_out
    stream = HoldoutStream(folders, tokenizer, 16, True)
    expected = [i for text in texts for i in [*tokenizer.encode(text)[1:], tokenizer.eos_id]]
    assert targets_of(stream.batches(3)) == expected
    if tokenizer.byte_exact:
        skipped = sum(tokenizer.count_bytes(tokenizer.encode(text)[:1]) for text in texts)
        assert stream.text_bytes() == sum(len(text.encode()) for text in texts) - skipped


def test_batches_are_the_same_every_time_and_for_every_batch_size(held_out):
    folders, tokenizer, _ = held_out
    stream = HoldoutStream(folders, tokenizer, 16, False)
    assert (
        targets_of(stream.batches(2, 6))
        == targets_of(stream.batches(2, 6))
        == targets_of(stream.batches(4, 6))
    )


def test_nothing_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    folder = build(
        [resolve_source(path=tmp_path / "a.txt")], load_tokenizer("bytes"), tmp_path / "out", holdout=0.0
    ).folder
    stream = HoldoutStream([TokenFolder(folder)], load_tokenizer("bytes"), 16, False)
    assert not list(stream.batches(2, 3)) and stream.text_bytes() == 0 and stream.text(3) == b""
