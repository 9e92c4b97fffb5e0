"""Ids of finetuning examples: completions and labels as `hlat generate` and `hlat eval` see them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from hlat.data import open_data
from hlat.data.convention import Convention
from hlat.data.example_rows import label_batch
from hlat.errors import UserError
from hlat.evaluate.text import TextCodec
from hlat.recipe import load

sys.path.insert(0, str(Path(__file__).parent))
from chat_templates import write_tokenizer

RECIPE = """
run: {name: test, steps: 1}
model: {layers: 1, hidden: 16, heads: 2, ffn: 32, vocab: 400, max_seq_len: 64}
data:
  examples: {path: DIR/rows.jsonl, WHAT}
  tokenizer: DIR/TOKENIZER
  seq_len: 64
  micro_batch: 2
  global_batch: 2
  holdout: 0
"""
LABELS = 'prompt: "{q}", label_field: n, labels: {"0": " good", "1": " bad"}'
BY = "objective.name=classification"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A SentencePiece model that puts a space before texts; a byte-level tokenizer with special tokens."""
    import sentencepiece

    made = tmp_path_factory.mktemp("tokenizers")
    words = ["the movie was good", "bad answer was the good movie", "what is good or bad :"]
    (made / "text.txt").write_text("\n".join(words * 60))
    sentencepiece.SentencePieceTrainer.train(
        input=str(made / "text.txt"),
        model_prefix=str(made / "sp"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    write_tokenizer(made / "marks")
    definition = json.loads((write_tokenizer(made / "lower") / "tokenizer.json").read_text())
    definition["normalizer"] = {"type": "Lowercase"}
    (made / "lower" / "tokenizer.json").write_text(json.dumps(definition))
    return made


@pytest.fixture
def examples(folder, tmp_path):
    """A function that opens the examples of rows, with overrides."""

    def opened(rows, *overrides: str, tokenizer: str = "sp.model", what: str = LABELS):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = RECIPE.replace("DIR/rows", f"{tmp_path}/rows").replace("DIR", str(folder))
        (tmp_path / "recipe.yaml").write_text(text.replace("TOKENIZER", tokenizer).replace("WHAT", what))
        return open_data(load(tmp_path / "recipe.yaml", overrides))

    return opened


ROWS = [{"q": "the movie :", "n": 0, "a": " good"}, {"q": "the answer :", "n": 1, "a": "\nbad"}]


def test_completions_are_the_end_of_the_whole_text(examples) -> None:
    data = examples(ROWS, what='prompt: "{q}", completion: "{a}"')
    encode = data.tokenizer.encode
    for number, row in enumerate(ROWS):
        ids = encode(row["q"] + row["a"])
        head = data.train.prompts[number].tolist()
        assert [*head, *data.train.completions[number].tolist()] == [*ids, data.tokenizer.eos_id]
        assert head == encode(row["q"]) == TextCodec(data.tokenizer).encode(row["q"])
    assert not any("note" in line for line in data.report_lines())


@pytest.mark.parametrize("by", ["words", "tokens"])
def test_labels_are_spelled_as_they_follow_the_prompt(examples, by: str) -> None:
    data = examples(ROWS, BY, f"objective.by={by}")
    encode = data.tokenizer.encode
    for number, row in enumerate(ROWS):
        for label, word in enumerate((" good", " bad")):
            whole = encode(row["q"] + word)
            assert [*data.train.prompts[number], *data.train.spelled[number][label]] == whole
    assert data.rows_per_example == 1  # each is one token there


def test_labels_whose_tokens_depend_on_the_prompt(examples) -> None:
    """A text that begins with them has a space more: the rows hold the tokens of each example."""
    rows = [*ROWS, {"q": "", "n": 1}]
    data = examples(rows, BY)
    lengths = [[len(word) for word in data.train.spelled[n]] for n in range(3)]
    assert lengths == [[1, 1], [1, 1], [2, 2]] and data.rows_per_example == 2
    batch = data.batch(range(3))
    assert batch.ids.shape[0] == 6 and batch.places.shape == batch.tokens.shape
    for number, row in enumerate(rows):
        for label, word in enumerate((" good", " bad")):
            at, ids = 2 * number + label, data.train.spelled[number][label].tolist()
            prompt = data.train.prompts[number].tolist()
            assert [i for i in batch.tokens[at].tolist() if i != -100] == ids
            assert batch.ids[at].tolist()[: len(prompt) + len(ids) - 1] == [*prompt, *ids[:-1]]
            first = len(prompt) - 1
            assert batch.places[at, : len(ids)].tolist() == list(range(first, first + len(ids)))
            assert data.tokenizer.decode([*prompt, *ids]) == row["q"] + word
    changed = examples([*rows[:2], {"q": "the movie :", "n": 1}], BY)
    assert changed.rows_per_example == 1 and changed.fingerprint != data.fingerprint


def test_a_prompt_that_ends_with_a_space_is_said(examples) -> None:
    rows = [{"q": "the movie : ", "a": "good"}, *ROWS]
    data = examples(rows, what='prompt: "{q}", completion: "{a}"')
    assert any("note: 1 prompts end where no token ends" in line for line in data.report_lines())
    assert data.train.prompts[0].tolist() == data.tokenizer.encode("the movie : ")
    ids = [*data.train.prompts[0], *data.train.completions[0]]
    assert data.tokenizer.decode(ids) == "the movie : good"


def test_own_spellings_of_equal_labels_change_nothing() -> None:
    prompts, words = [torch.tensor([5, 6]).numpy()] * 2, [torch.tensor(w).numpy() for w in ([7, 8], [9])]
    shared = label_batch(prompts, [0, 1], words, 3, 9, 0, count_tokens=True)
    own = label_batch(prompts, [0, 1], words, 3, 9, 0, count_tokens=True, own=[words, words])
    assert all(
        torch.equal(getattr(shared, name), getattr(own, name))
        for name in vars(shared)
        if name not in ("positions", "documents")
    )


def test_labels_that_are_the_same_after_a_prompt(examples) -> None:
    with pytest.raises(UserError, match="has the same tokens as label '0'"):
        examples(ROWS, BY, 'data.examples.labels={"0": " good", "1": " Good"}', tokenizer="lower")


def test_special_tokens_of_templates_alone(examples) -> None:
    rows = [{"q": "hi", "a": "you"}, {"q": "<|im_end|>hi", "a": "<|im_"}]
    templates = 'prompt: "<|user|>{q}<|im_end|>", completion: "{a}</s>"'
    data = examples(rows, tokenizer="marks", what=templates)
    encode, known = data.tokenizer.encode, {text: i for text, i, _ in data.tokenizer.added_tokens()}
    user, end, eos = known["<|user|>"], known["<|im_end|>"], data.tokenizer.eos_id
    assert data.train.prompts[0].tolist() == [user, *encode("hi"), end]
    assert data.train.completions[0].tolist() == [*encode("you"), eos]  # not two
    assert data.train.prompts[1].tolist() == [user, *encode("<|im_end|>hi"), end]
    assert data.train.completions[1].tolist() == [*encode("<|im_"), eos]
    assert data.marks and data.train.answers == ["you", "<|im_"]
    assert any("note: 1 records spell special tokens" in line for line in data.report_lines())
    assert not examples(rows, tokenizer="marks", what='prompt: "{q}", completion: "{a}"').marks
    codec = TextCodec(data.tokenizer, convention=Convention(template=True))
    assert codec.encode("<|user|>hi<|im_end|>") == data.train.prompts[0].tolist()
    assert TextCodec(data.tokenizer).encode("<|user|>") == encode("<|user|>")


def test_a_single_held_out_example_is_said(examples) -> None:
    rows = [{"q": f"question {i}", "n": i % 2} for i in range(30)]
    counts = []
    for share in (0.05, 0.1, 0.2, 0.5):
        data = examples(rows[: 30 if share > 0.05 else 12], BY, f"data.holdout={share}")
        counts.append(data.holdout.documents)
        said = any("note: a single example is held out" in line for line in data.report_lines())
        assert said == (counts[-1] == 1)
    assert 1 in counts and max(counts) > 1
