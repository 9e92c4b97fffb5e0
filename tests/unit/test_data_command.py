"""`open_data` of a recipe and the `hlat data` command."""

import statistics
import subprocess
import sys
import time

import numpy as np
import pytest

from hlat.cli import main
from hlat.commands.data import configure
from hlat.data import open_data
from hlat.data.loader import Data, SourceSpec, prepare
from hlat.data.packed import TokenFolder
from hlat.errors import UserError
from hlat.recipe import load

RECIPE = """
run: {{name: test, seed: 3, steps: 10}}
model: {{preset: tiny, vocab: 400, max_seq_len: 32}}
data:
  sources: [{sources}]
  tokenizer: {tokenizer}
  seq_len: 32
  micro_batch: 2
  global_batch: 8
  holdout: 0.2
  document_mask: true
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hlat"


@pytest.fixture
def text(tmp_path):
    for name, words in (("a", "alpha beta"), ("b", "gamma, delta")):
        (tmp_path / name).mkdir()
        for i in range(40):
            (tmp_path / name / f"{i}.txt").write_text(f"{words} {i}\n" * 10)
    return tmp_path


def recipe(tmp_path, sources, tokenizer="bytes", *overrides):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(sources=sources, tokenizer=tokenizer))
    return load(path, overrides)


def two(text):
    return f"{{path: {text / 'a'}, weight: 3}}, {{path: {text / 'b'}, weight: 1}}"


def test_open_data_builds_once_and_is_the_same_again(text, cache):
    opened = recipe(text, two(text), "train:bpe-300")
    first = open_data(opened)
    made = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    second = open_data(opened)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == made
    assert first.fingerprint == second.fingerprint and first.vocab_size == 300
    assert len(list(cache.glob("tokens/*/manifest.json"))) == 2
    assert not [path for path in made if path.name.endswith((".tmp", ".lock", ".partial"))]


def test_fingerprint_covers_what_rows_hold_and_nothing_else(text):
    base = open_data(recipe(text, two(text))).fingerprint
    same = ["run.seed=9", "run.steps=50", "data.micro_batch=4", "data.global_batch=16"]
    for change in same:
        assert open_data(recipe(text, two(text), "bytes", change)).fingerprint == base, change
    for change in (
        "data.seq_len=16",
        "data.document_mask=false",
        "data.holdout=0.3",
        "data.tokenizer=train:bpe-280",
    ):
        assert open_data(recipe(text, two(text), "bytes", change)).fingerprint != base, change
    assert open_data(recipe(text, two(text).replace("weight: 3", "weight: 2"))).fingerprint != base
    (text / "a").rename(text / "moved")
    assert open_data(recipe(text, two(text).replace("/a,", "/moved,"))).fingerprint == base
    (text / "b" / "0.txt").write_text("changed")
    assert open_data(recipe(text, two(text).replace("/a,", "/moved,"))).fingerprint != base


def test_rows_do_not_depend_on_ranks_or_accumulation(text):
    data = open_data(recipe(text, two(text)))

    def step(number, micro_batch, accumulate, world):
        batches = [
            b for rank in range(world) for b in data.batches(number, micro_batch, accumulate, rank, world)
        ]
        assert len(batches) == accumulate * world
        return np.concatenate([b.ids.numpy() for b in batches])

    for number in (0, 1, 7):
        whole = step(number, 8, 1, 1)
        rows = [data.train.row(8 * number + i)[0][:-1] for i in range(8)]
        np.testing.assert_array_equal(whole, rows)
        for layout in ((2, 4, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4), (1, 1, 8)):
            np.testing.assert_array_equal(step(number, *layout), whole)
    with pytest.raises(ValueError, match="global batch"):
        data.batches(0, 3, 1)


def test_training_never_reads_held_out_documents(text):
    data = open_data(recipe(text, two(text)))
    held = [bytes(t[:-1]) for t in (tokens.tolist() for tokens in data.holdout._tokens())]
    assert 8 <= len(held) <= 30
    rows = (data.train.row(i)[0] for i in range(3 * sum(s.windows for s in data.train.sources)))
    seen = b"".join(bytes(row[row < 256].tolist()) + b"|" for row in rows)
    lines = {document.split(b"\n")[0] + b"\n" for document in held}
    assert not [line for line in lines if b"\n" + line in seen]


def test_report_accounts_for_everything(text):
    (text / "a" / "bad.txt").write_bytes(b"\xff")
    data = open_data(recipe(text, two(text)))
    report = data.report()
    first, second = report["sources"]
    assert (
        first["documents"] + first["holdout_documents"]
        == second["documents"] + second["holdout_documents"]
        == 40
    )
    assert first["documents_dropped"] == {"not UTF-8": 1} and second["documents_dropped"] == {}
    assert (first["rows"], second["rows"]) == (60, 20) and report["totals"]["rows"] == 80
    for source in (first, second):
        windows, rest = divmod(source["tokens"], 32)
        assert source["tokens"] == source["bytes"] + source["documents"]
        assert source["tokens_dropped_per_epoch"] == rest
        assert source["epochs"] == source["rows"] / windows
    lines = "\n".join(data.report_lines())
    assert "dropped: 1 document: not UTF-8" in lines and "60 rows" in lines and "75.0%" in lines


def test_tokenized_folder_as_source_and_tokenizer(text, capsys):
    out = text / "out"
    arguments = ["--tokenizer", "train:bpe-290", "--holdout", "0.2"]
    assert main(["data", "tokenize", str(text / "a"), *arguments, "--out", str(out)]) == 0
    data = open_data(recipe(text, f"{{path: {out}}}", str(out)))
    assert data.vocab_size == 290 and data.folders[0].folder == out
    out.rename(text / "moved")
    assert (
        open_data(recipe(text, f"{{path: {text / 'moved'}}}", text / "moved")).fingerprint == data.fingerprint
    )
    for change, message in (
        ("data.tokenizer=bytes", "another tokenizer"),
        ("data.tokenizer=train:bpe-290", "a source is tokenized already"),
        ("data.holdout=0.1", r"tokenized with holdout 0\.2, the recipe says 0\.1"),
    ):
        with pytest.raises(UserError, match=message):
            open_data(recipe(text, f"{{path: {text / 'moved'}}}", text / "moved", change))


def test_bytes_folder_brings_its_tokenizer(text):
    assert (
        main(["data", "tokenize", str(text / "a"), "--tokenizer", "bytes", "--out", str(text / "out")]) == 0
    )
    recipe_of_folder = recipe(text, f"{{path: {text / 'out'}}}", text / "out", "data.holdout=0.01")
    assert open_data(recipe_of_folder).vocab_size == 257


def test_bad_data_is_one_line_and_nothing_is_built(text, cache):
    cases = [
        ("{path: /absent/folder}", "bytes", r"data\.sources\[0\]: no such file or folder"),
        (
            two(text),
            "train:bpe-500",
            r"model\.vocab: .* has 500 ids, model\.vocab is 400; set model\.vocab to 500",
        ),
        (two(text), "absent.json", "no tokenizer at"),
        (f"{{path: {text / 'a' / '0.txt'}}}", "bytes", "one document, which cannot be split"),
    ]
    for sources, tokenizer, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            open_data(recipe(text, sources, tokenizer))
        assert "\n" not in caught.value.line()
    (text / "empty").mkdir()
    with pytest.raises(UserError, match="no text in"):
        open_data(recipe(text, f"{{path: {text / 'empty'}}}"))
    assert not list(cache.glob("tokenizers/*"))


def test_a_source_shorter_than_a_row_is_refused(text):
    with pytest.raises(
        UserError, match=r"data\.sources\[1\]: the source has .* training tokens, one row takes 512"
    ):
        (text / "b2").mkdir()
        for i in range(4):
            (text / "b2" / f"{i}.txt").write_text(f"short {i}")
        folders, tokenizer = prepare(
            [SourceSpec(str(text / "a")), SourceSpec(str(text / "b2"))], "bytes", 0.2
        )
        Data(folders, [1, 1], tokenizer, seq_len=512, document_mask=False, seed=0)


def test_commands_end_to_end(text, capsys):
    assert (
        main(["data", "train-tokenizer", str(text / "a"), "--vocab", "280", "--out", str(text / "tok")]) == 0
    )
    assert "280 entries" in capsys.readouterr().out
    tokenize = ["data", "tokenize", str(text / "a"), str(text / "b"), "--tokenizer", str(text / "tok")]
    assert main([*tokenize, "--out", str(text / "out"), "--workers", "2"]) == 0
    captured = capsys.readouterr()
    assert "MB/s" in captured.err and "MB of text" in captured.out
    assert main([*tokenize, "--out", str(text / "out")]) == 0
    assert "is there already" in capsys.readouterr().out
    recipe(text, two(text))
    assert main(["data", "inspect", str(text / "out"), "--recipe", str(text / "recipe.yaml")]) == 0
    out = capsys.readouterr().out
    assert "80 rows" in out and "alpha beta" in out
    total = TokenFolder(text / "out").manifest["totals"]
    assert total["train"]["documents"] + total["holdout"]["documents"] == 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokenize", "{}/absent", "--tokenizer", "bytes", "--out", "{}/o"], "no such file or folder"),
        (["tokenize", "{}/a", "--tokenizer", "bytes", "--out", "{}/a"], "holds something else"),
        (["tokenize", "{}/a", "--tokenizer", "bytes", "--out", "{}/o", "--holdout", "1"], "holdout is 1.0"),
        (["tokenize", "{}/a", "--tokenizer", "bytes", "--out", "{}/o", "--workers", "0"], "0 processes"),
        (["train-tokenizer", "{}/a", "--vocab", "3", "--out", "{}/o"], "cannot have 3 entries"),
        (["inspect", "{}/a"], "no readable manifest"),
    ],
)
def test_wrong_commands_end_with_one_line_and_status_2(text, capsys, arguments, message):
    before = sorted(path.name for path in text.iterdir())
    assert main(["data", *(argument.format(text) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(path.name for path in text.iterdir()) == before


def test_default_holdout_is_the_recipes(text):
    import argparse

    from hlat.recipe_sections import DataSection

    parser = argparse.ArgumentParser()
    configure(parser)
    parsed = parser.parse_args(["tokenize", "x", "--tokenizer", "bytes", "--out", "y"])
    assert parsed.holdout == DataSection.model_fields["holdout"].default


def test_tokenizing_processes_do_not_load_torch():
    code = "import sys, hlat.data.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_loading_4096_tokens_takes_less_than_a_hundredth_of_a_second(text):
    """A step of 4096 tokens takes about 1 s on two CPU cores; the loader may take 1 % of it."""
    data = open_data(
        recipe(text, two(text), "bytes", "data.seq_len=512", "data.micro_batch=8", "model.max_seq_len=512")
    )
    times = []
    for step in range(30):
        started = time.perf_counter()
        data.batches(step, 8, 1)
        times.append(time.perf_counter() - started)
    assert statistics.median(times) < 0.01
