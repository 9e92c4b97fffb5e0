"""Finetuning examples: the held-out split, order, rows, and what is wrong with an input."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hlat.data import open_data
from hlat.data.example_rows import fit_prompt, label_batch, pair_batch
from hlat.errors import UserError
from hlat.recipe import load

RECIPE = """
run: {name: test, steps: 5, seed: 7}
model: {layers: 2, hidden: 32, heads: 4, ffn: 64, vocab: 257, max_seq_len: 32}
data:
  examples: {path: PATH, prompt: "{q}", completion: " {a}"}
  tokenizer: bytes
  seq_len: 32
  micro_batch: 4
  global_batch: 8
  holdout: 0.25
"""
ROWS = [{"q": f"question {i}?", "a": f"answer {i * i}", "n": i % 3} for i in range(40)]
LABELLED = [
    "data.examples.completion='{completion}'",  # the default: with labels there is no other
    "data.examples.label_field=n",
    'data.examples.labels={"0": " a", "1": " b", "2": " cd"}',
]
CLASSIFY = [*LABELLED, "objective.name=classification"]


def jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe(tmp_path):
    """A function that loads the recipe above for rows in a file, with overrides."""

    def make(*overrides: str, rows=ROWS, path: Path | None = None):
        file = tmp_path / "recipe.yaml"
        file.write_text(RECIPE.replace("PATH", str(path or jsonl(tmp_path / "rows.jsonl", rows))))
        return load(file, overrides)

    return make


@pytest.fixture
def examples(recipe):
    """A function that opens the examples of that recipe."""
    return lambda *overrides, **more: open_data(recipe(*overrides, **more))


def text_of(ids) -> str:
    return bytes(int(i) for i in ids if i < 256).decode()


def line_of(call, *args, **more) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **more)
    assert "\n" not in caught.value.line()
    return caught.value.line()


# Pairs


def test_pairs_have_targets_on_the_completion_and_the_end(examples) -> None:
    data = examples()
    batch = data.batch(range(data.train.documents))
    assert batch.ids.shape == batch.targets.shape == (data.train.documents, 32)
    by_prompt = {row["q"]: f" {row['a']}" for row in ROWS}
    for ids, targets in zip(batch.ids, batch.targets, strict=True):
        learned = targets != -100
        first = int(learned.nonzero()[0])
        prompt, answer = text_of(ids[: first + 1]), text_of(targets[learned])
        assert by_prompt[prompt] == answer
        assert int(targets[learned][-1]) == 256
        assert torch.equal(ids[1:][learned[:-1]], targets[:-1][learned[:-1]][: len(ids[1:][learned[:-1]])])
        assert int(learned.sum()) == len(answer) + 1
        assert learned[first : first + len(answer) + 1].all()
        assert (ids[first + len(answer) + 1 :] == 256).all()


def test_split_is_by_content_whatever_else_is_there(examples) -> None:
    whole, part = examples(), examples(rows=ROWS[:20])
    held = {prompt for prompt, _ in whole.holdout.texts}
    assert 4 <= len(held) <= 16
    assert {p for p, _ in part.holdout.texts} == held & {row["q"] for row in ROWS[:20]}
    assert whole.train.documents + whole.holdout.documents == 40
    assert not held & {prompt for prompt, _ in whole.train.texts}
    twice = examples(rows=[*ROWS, *ROWS])
    assert not {p for p, _ in twice.holdout.texts} & {p for p, _ in twice.train.texts}


def test_groups_are_on_one_side(examples) -> None:
    rows = [{**row, "file": f"file {i % 8}"} for i, row in enumerate(ROWS)]
    data = examples("data.examples.group_field=file", rows=rows)
    file_of = {row["q"]: row["file"] for row in rows}
    held, trained = ({file_of[q] for q, _ in side.texts} for side in (data.holdout, data.train))
    assert held
    assert not held & trained
    assert data.holdout.documents == 5 * len(held)
    other = examples("data.examples.group_field=file", "data.examples.prompt='{q}!'", rows=rows)
    assert {q for q, _ in other.holdout.texts} == {f"{q}!" for q, _ in data.holdout.texts}


def test_held_out_records_of_their_own(examples, tmp_path) -> None:
    other = jsonl(tmp_path / "other.jsonl", [{"q": "new", "a": "x"}, ROWS[0]])
    data = examples(f"data.examples.eval_path={other}")
    assert data.train.documents == 40
    assert {prompt for prompt, _ in data.holdout.texts} == {"new", "question 0?"}
    assert any("1 held-out prompts are also prompts of training" in line for line in data.report_lines())


def test_limit_takes_the_first_by_hash(examples) -> None:
    some, more = (examples(f"data.examples.limit={n}") for n in (5, 9))
    assert some.train.documents == 5
    assert set(some.train.texts) < set(more.train.texts)
    assert some.holdout.texts == examples().holdout.texts


@pytest.mark.parametrize(
    "kind", [[], CLASSIFY, [*CLASSIFY, "objective.by=tokens"]], ids=["pairs", "words", "tokens"]
)
def test_order_depends_on_seed_and_row_alone(examples, kind) -> None:
    data = examples(*kind)
    count = data.train.documents
    for epoch in range(3):
        assert sorted(data.index(epoch * count + i) for i in range(count)) == list(range(count))
    assert [data.index(i) for i in range(count)] != [data.index(count + i) for i in range(count)]
    whole = data.batches(3, 8, 1)[0]
    parts = [batch for rank in range(2) for batch in data.batches(3, 2, 2, rank, 2)]
    assert torch.equal(whole.ids, torch.cat([batch.ids for batch in parts]))
    assert torch.equal(whole.targets, torch.cat([batch.targets for batch in parts]))
    assert [data.index(i) for i in range(count)] != [
        examples(*kind, "run.seed=8").index(i) for i in range(count)
    ]
    with pytest.raises(ValueError, match="global batch"):
        data.batches(0, 3, 1)


def test_held_out_batches_end_with_filled_rows(examples) -> None:
    for overrides in ([], CLASSIFY):
        data = examples(*overrides)
        batches = list(data.holdout_batches(4))
        assert len({batch.ids.shape for batch in batches}) == 1
        assert len(batches) == -(-data.holdout.documents // 4)
        assert len(list(data.holdout_batches(4, 4))) == 1
        sizes = [[int(b.targets_count()) for b in data.holdout_batches(size, 5)] for size in (1, 2, 5)]
        assert sum(sizes[0]) == sum(sizes[1]) == sum(sizes[2])
        if overrides:
            assert sum(int(batch.targets_count()) for batch in batches) == data.holdout.documents
            assert sum(data.holdout_labels().values()) == data.holdout.documents
        else:
            total = sum(int(batch.targets_count()) for batch in batches)
            assert total == data.holdout_bytes() + data.holdout.documents  # bytes, and an EOS each


def test_fingerprint_follows_content(examples, recipe) -> None:
    one = examples().fingerprint
    assert one == examples("run.seed=3", "data.micro_batch=8").fingerprint
    changed = [{**ROWS[0], "a": "other"}, *ROWS[1:]]
    others = [examples(rows=changed), examples("data.seq_len=30"), examples(*CLASSIFY), examples(*LABELLED)]
    assert len({one, *(data.fingerprint for data in others)}) == 5


def test_labelled_text_can_be_learned_as_pairs(examples) -> None:
    data = examples(*LABELLED)
    assert data.kind == "pairs"
    assert {completion for _, completion in data.train.texts} == {" a", " b", " cd"}


# Cutting and dropping


def test_prompts_lose_their_beginning_and_completions_nothing(examples) -> None:
    rows = [{"q": f"{i}" * 50 + "END", "a": "yes"} for i in range(10, 30)]
    data = examples(rows=rows)
    batch = data.batch(range(4))
    for ids, targets in zip(batch.ids, batch.targets, strict=True):
        learned = targets != -100
        assert text_of(targets[learned]) == " yes"
        assert bool(learned[-1])
        assert text_of(ids[: int(learned.nonzero()[0]) + 1]).endswith("END")
    assert any("cut: 20 prompts" in line for line in data.report_lines())


def test_too_long_completions_are_dropped_and_counted(examples) -> None:
    long = [{"q": f"long {i}", "a": "x" * 40} for i in range(3)]
    data = examples(rows=[*ROWS, *long])
    assert data.train.documents + data.holdout.documents == 40
    assert sum("completion longer than seq_len" in line for line in data.report_lines()) >= 1
    line = line_of(examples, rows=[{"q": f"long {i}", "a": "x" * 40} for i in range(20)])
    assert re.search(r"data.seq_len: none of \d+ completions fits into 32 tokens; raise it", line)


def test_records_that_cannot_be_used_are_counted(examples, tmp_path) -> None:
    path = tmp_path / "mixed.jsonl.gz"
    lines = [json.dumps(row) for row in ROWS] + [
        "{",
        "[1]",
        '{"q": "no a"}',
        '{"q": "\\ud800", "a": "x"}',
        '{"q": "x", "a": ""}',
        '{"q": "y", "a": " "}',
        "",
    ]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    report = "\n".join(examples(path=path).report_lines())
    for reason in (
        "1 records: not JSON",
        "1 records: not a JSON object",
        "field 'a'",
        "1 records: not Unicode",
        "2 records: empty completion",
    ):
        assert reason.replace("field 'a'", "under 'a'") in report


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(1, 9), max_size=20), st.lists(st.integers(1, 9), min_size=1, max_size=8)
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(8, 12),
)
@settings(deadline=None, max_examples=60)
def test_rows_hold_every_completion_whole(pairs, seq_len) -> None:
    completions = [np.array(c) for _, c in pairs]
    prompts = [fit_prompt(np.array(p, dtype=np.int64), seq_len + 1 - len(c), 0) for p, c in pairs]
    batch = pair_batch(prompts, completions, len(pairs) + 1, seq_len, 0)
    for row, (prompt, completion) in enumerate(pairs):
        learned = batch.targets[row] != -100
        assert batch.targets[row][learned].tolist() == completion
        kept = batch.ids[row][: int(learned.nonzero()[0]) + 1].tolist()
        assert kept == (prompt[-len(kept) :] if prompt else [0])
        assert len(kept) == min(max(len(prompt), 1), seq_len + 1 - len(completion))
    assert (batch.targets[-1] == -100).all()


@given(
    st.integers(1, 3), st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=2, max_size=4)
)
@settings(deadline=None, max_examples=60)
def test_places_are_where_labels_are_predicted(count, words) -> None:
    spelled, seq_len = [np.array(word) for word in words], 9
    longest = max(map(len, words))
    prompts = [np.arange(1, 2 + i + (9 - longest - i)) for i in range(count)][:count]
    batch = label_batch(prompts, [0] * count, spelled, count, seq_len, 0)
    per_row = batch.places.shape[0] // batch.ids.shape[0]
    for n in range(count * len(words)):
        prompt, word, row = prompts[n // len(words)], words[n % len(words)], batch.ids[n // per_row].tolist()
        assert batch.tokens[n].tolist() == word + [-100] * (longest - len(word))
        for k, place in enumerate(batch.places[n].tolist()[: len(word)]):
            assert row[: place + 1] == [*prompt.tolist(), *word[:k]]


# Files of other kinds


def test_parquet_and_arrow_give_the_same_examples(examples, tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=7)
    with (
        pyarrow.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink,
        pyarrow.ipc.new_file(sink, table.schema) as out,
    ):
        out.write_table(table)
    wanted = examples(*CLASSIFY).fingerprint
    for name in ("rows.parquet", "rows.arrow"):
        assert examples(*CLASSIFY, path=tmp_path / name).fingerprint == wanted


def test_a_saved_data_set_without_the_hub(examples, tmp_path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    features = datasets.Features(
        {
            "q": datasets.Value("string"),
            "a": datasets.Value("string"),
            "n": datasets.ClassLabel(num_classes=3),
        }
    )
    datasets.Dataset.from_list(ROWS, features=features).save_to_disk(str(tmp_path / "saved"))
    wanted = examples(*CLASSIFY)
    assert examples(*CLASSIFY, path=tmp_path / "saved").fingerprint == wanted.fingerprint


# Wrong input


@pytest.mark.parametrize(
    ("overrides", "rows", "wanted"),
    [
        (
            ['data.examples.prompt="{question}"'],
            ROWS,
            "has a text or number in the field 'question'; the fields of",
        ),
        (
            ['data.examples.completion="{b}"'],
            ROWS,
            "in the field 'b'; the fields of its first record are: q, a, n",
        ),
        ([*LABELLED, "data.examples.label_field=kind"], ROWS, "in the field 'kind'"),
        ([], [], "no text in"),
        (
            CLASSIFY,
            [{"q": "x", "n": 7}],
            "label '7' in rows.jsonl:1 is not among the labels '0', '1', '2'; add it",
        ),
        ([*CLASSIFY, "data.examples.labels.2=" + "x" * 40], ROWS, "has 40 tokens, and a row 32"),
        ([], ROWS[:1], "1 examples, and none is "),
        (["model.vocab=100"], ROWS, "model.vocab: the tokenizer 'bytes' has 257 ids"),
    ],
)
def test_wrong_data_is_one_line(examples, overrides, rows, wanted) -> None:
    assert wanted in line_of(examples, *overrides, rows=rows)


def test_text_is_no_record(examples, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    assert "holds no records; give a .jsonl" in line_of(examples, path=tmp_path / "a.txt")
    assert "no such file or folder" in line_of(examples, path=tmp_path / "gone.jsonl")


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (
            ['data.examples.prompt="{q.__class__}"'],
            "data.examples.prompt: {q.__class__} is not a plain field name",
        ),
        (
            ["data.examples.prompt={q}"],
            'expected a text, got {"q": null}; put a text that begins with { in quotes',
        ),
        (
            ["data.examples.dataset=x"],
            "command line: data.examples.dataset: examples have both path and dataset; give exactly one",
        ),
        (["data.examples.eval_dataset=x", "data.examples.eval_path=y"], "both eval_path and eval_dataset"),
        (
            ["data.examples.label_field=n"],
            "command line: data.examples.label_field: label_field needs at least two labels",
        ),
        (LABELLED[1:], "data.examples.completion: the completion of a labelled example is its label's word"),
        (['data.examples.labels={"0": a, "1": b}'], "there are labels but no label_field"),
        ([*LABELLED[:2], 'data.examples.labels={"0": a, "1": a}'], "two labels have the same word"),
        (["data.examples.lable_field=n"], "did you mean 'label_field'?"),
        (
            [*LABELLED[:2], 'data.examples.labels={"0": 3, "1": b}'],
            "data.examples.labels[0]: expected a text, got 3",
        ),
        (["data.document_mask=true"], "data.document_mask: each example has a row of its own"),
        (["data.tokenizer=train:bpe-300"], "data.tokenizer: a tokenizer is not trained on examples"),
        (["data.tokenizer=init"], "data.tokenizer: init is the tokenizer of init.from, which is not given"),
        (["objective.name=classification"], "objective.name: classification needs labelled examples"),
        ([*CLASSIFY, "objective.by=word"], "objective.by: expected words, tokens or head, got"),
        ([*CLASSIFY, "model.classes=3"], "model.classes: the model has 3 classes, the objective needs 0"),
        (["model.classes=3"], "model.classes: the model has 3 classes, the objective needs 0"),
    ],
)
def test_wrong_recipe_is_one_line(recipe, overrides, wanted) -> None:
    assert wanted in line_of(recipe, *overrides)


def test_head_has_a_class_for_each_label(recipe) -> None:
    assert recipe(*CLASSIFY, "objective.by=head").model.classes == 3


def test_examples_replace_the_sources_of_a_base(tmp_path) -> None:
    file = tmp_path / "child.yaml"
    file.write_text("base: tiny\ndata: {examples: {dataset: stdlib-docstrings}, tokenizer: bytes}\n")
    child = load(file)
    assert child.data.sources == ()
    assert load(file, ["data.sources=[{path: x}]"]).data.examples is None
