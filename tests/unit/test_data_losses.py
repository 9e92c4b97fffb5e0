"""A source of which nothing was read, or most was dropped, is an error wherever it is read."""

import json

import pytest

from hlat.cli import main
from hlat.data.build import build
from hlat.data.cache import tokenized
from hlat.data.example_text import Example, read_examples
from hlat.data.examples import _notes
from hlat.data.losses import Tally
from hlat.data.packed import TokenFolder
from hlat.data.quoted import Quoted
from hlat.data.sources import resolve_source
from hlat.data.tokenizer import load_tokenizer
from hlat.data.train_tokenizer import training_texts
from hlat.errors import UserError
from hlat.recipe_sections import ExamplesSection


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


GOOD, BAD, EMPTY = {"text": "some words"}, {"body": "other", "meta": {"t": "x"}}, {"text": ""}


def reading(way, source, folder):
    """Read a source in one of the ways there are."""
    if way == "tokenize":
        build([source], load_tokenizer("bytes"), folder / "out", holdout=0, workers=1)
    elif way == "cache":
        tokenized(source, load_tokenizer("bytes"), 0, workers=1, quiet=True)
    else:
        list(training_texts([source], 0))


@pytest.mark.parametrize("way", ["tokenize", "cache", "train-tokenizer"])
def test_most_records_without_text_are_an_error(tmp_path, way):
    path = lines(tmp_path / "x.jsonl", GOOD, BAD, GOOD, BAD, BAD)
    source = resolve_source(path=path)
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            reading(way, source, tmp_path)
        assert caught.value.where == str(path)
        assert caught.value.what == "most of it was dropped: 3 of 5 records (3 no text under 'text')"
        assert caught.value.fix == (
            "set text_field (--text-field) to what holds the text, of: body, meta.t;"
            " or set allow_dropped (--allow-dropped) to 0.6 if the rest is enough"
        )
    assert list(tmp_path.iterdir()) == [path], "nothing is left of it"
    reading(way, resolve_source(path=path, allow_dropped=0.6), tmp_path)
    if way != "train-tokenizer":  # tokens that are there already are asked about again
        with pytest.raises(UserError, match="most of it was dropped"):
            reading(way, source, tmp_path)
    reading(way, resolve_source(path=lines(path, GOOD, BAD, GOOD, BAD)), tmp_path / "half")


@pytest.mark.parametrize("way", ["tokenize", "cache", "train-tokenizer"])
def test_nothing_read_is_an_error_whatever_is_allowed(tmp_path, way):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.bin").write_bytes(b"\0")
    lines(tmp_path / "in" / "b.jsonl", BAD, EMPTY, EMPTY)
    with pytest.raises(UserError, match=r"no document could be read \(2 empty, 1 binary .*, 1 no text under"):
        reading(way, resolve_source(path=tmp_path / "in", allow_dropped=1), tmp_path)


def test_one_source_of_several_is_not_hidden_by_the_others(tmp_path):
    good = resolve_source(path=lines(tmp_path / "a.jsonl", *[GOOD] * 50))
    bad = resolve_source(path=lines(tmp_path / "b.jsonl", BAD))
    with pytest.raises(UserError, match=r"b\.jsonl: no document could be read \(1 no text under 'text'\)"):
        build([good, bad], load_tokenizer("bytes"), tmp_path / "out", holdout=0, workers=1)
    with pytest.raises(UserError, match=r"b\.jsonl: no document could be read"):
        list(training_texts([good, bad], 0))


def test_the_manifest_tells_what_was_read_of_each_source(tmp_path):
    first = resolve_source(path=lines(tmp_path / "a.jsonl", GOOD, GOOD, BAD))
    second = resolve_source(path=lines(tmp_path / "b.jsonl", GOOD))
    build([first, second], load_tokenizer("bytes"), tmp_path / "out", holdout=0, workers=1)
    manifest = TokenFolder(tmp_path / "out").manifest
    reason = "no text under 'text'"
    assert manifest["dropped"] == {reason: {"count": 1, "examples": ["a.jsonl@46"]}}
    read = [Tally(**entry["read"]) for entry in manifest["sources"]]
    assert [(tally.documents, tally.bytes) for tally in read] == [(2, 20), (1, 10)]
    assert read[0].dropped[reason]["fields"] == "body, meta.t" and read[1].dropped == {}


def test_bytes_of_files_count_and_records_of_different_length_do_not(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "readme.txt").write_text("a few words")
    (folder / "readme2.txt").write_text("a few words")
    (folder / "shards.tar").write_bytes(b"\0" * 1000)
    with pytest.raises(UserError, match=r"1,000 of 1,022 bytes \(1 binary \(holds NUL bytes\)\)"):
        reading("tokenize", resolve_source(path=folder), tmp_path)
    long = {"body": "x" * 1000}
    reading("tokenize", resolve_source(path=lines(tmp_path / "y.jsonl", GOOD, GOOD, long)), tmp_path)


def test_empty_texts_are_no_loss(tmp_path):
    reading("tokenize", resolve_source(path=lines(tmp_path / "x.jsonl", GOOD, *[EMPTY] * 9)), tmp_path)


def test_the_rest_of_an_array_that_is_broken_counts_with_its_bytes(tmp_path):
    rest = json.dumps([GOOD] * 100)[1:]
    (tmp_path / "x.json").write_text(f"[{json.dumps(GOOD)}, {{bad: 1}}, {rest}")
    with pytest.raises(UserError, match=r"2,\d+ of 2,\d+ bytes \(1 not JSON\); repair or remove what is no"):
        reading("tokenize", resolve_source(path=tmp_path / "x.json"), tmp_path)


@pytest.mark.parametrize("verb", ["tokenize", "train-tokenizer"])
def test_on_the_command_line(tmp_path, capsys, verb):
    path = lines(tmp_path / "x.jsonl", GOOD, *[BAD] * 3)
    how = ["--tokenizer", "bytes", "--workers", "1"] if verb == "tokenize" else ["--vocab", "257"]
    command = ["data", verb, str(path), "--out", str(tmp_path / "out"), "--holdout", "0", *how]
    assert main(command) == 2 and not (tmp_path / "out").exists()
    assert "most of it was dropped: 3 of 4 records" in capsys.readouterr().err
    for wrong in ("1e3", "1.5", "-1"):
        assert main([*command, "--allow-dropped", wrong]) == 2
        assert "is no share of a source; give a fraction from 0 to 1" in capsys.readouterr().err
    assert main([*command, "--allow-dropped", "0.75"]) == 0 and (tmp_path / "out").is_dir()


def test_examples_of_which_most_are_dropped(tmp_path):
    good, bad = {"prompt": "p", "completion": "c"}, {"prompt": "p"}
    path = str(lines(tmp_path / "x.jsonl", {**good, "prompt": "q"}, good, bad, bad, bad, 5))
    with pytest.raises(UserError) as caught:
        read_examples(ExamplesSection(path=path), 0)
    assert caught.value.where == "data.examples"
    reasons = "3 no text or number under 'completion', 1 not a JSON object"
    assert caught.value.what == f"4 of 6 records of '{path}' were dropped ({reasons})"
    assert "set data.examples.allow_dropped to 0.67" in caught.value.fix
    assert len(read_examples(ExamplesSection(path=path, allow_dropped=0.67), 0).train) == 2
    whole = str(lines(tmp_path / "whole.jsonl", good, {**good, "prompt": "r"}))
    with pytest.raises(UserError, match=r"examples\.eval_path: 4 of 6 records .* were dropped") as caught:
        read_examples(ExamplesSection(path=whole, eval_path=path), 0.1)
    assert "set data.examples.allow_dropped to" in caught.value.fix


@pytest.mark.parametrize("fields", ["templates", "messages"])
def test_files_of_a_folder_that_hold_no_examples_are_counted(tmp_path, fields):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    made = [{"q": f"q{i}", "a": "a", "messages": turns} for i in range(4)]
    for name in ("a.jsonl", "b.ndjson", "c.jsonlines", "sub/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        lines(tmp_path / name, *made)
    for name in ("notes.txt", "table.csv", "sub/README"):
        (tmp_path / name).write_text("some text\n")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / ".hidden.jsonl").write_text("{}\n")
    section = ExamplesSection(path=str(tmp_path), prompt="{q}", completion="{a}")

    def conversations(first):
        def reader(records, source, where, dropped):
            return [Example(Quoted("q"), Quoted("a"), -1, i, i) for i, _ in enumerate(records)]

        return reader if fields == "messages" else None

    texts = read_examples(section, 0.0, conversations)
    assert len(texts.train) == 16 and not texts.dropped
    assert _notes(texts) == [
        "  not read: 1 file: empty file",
        "  not read: 1 file: hidden file",
        "  not read: 3 files: not a .jsonl, .json, .parquet or .arrow file",
    ]
