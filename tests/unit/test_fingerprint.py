"""What a result stands for: what makes it another and what does not, and which rows of a run are which."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from hlat import cli
from hlat.backend.cluster import Cluster
from hlat.checkpoint.hf import to_hf
from hlat.checkpoint.hf_tokenizer import add_bos
from hlat.observe.report import render
from hlat.observe.runs import load_runs
from hlat.observe.standing import standing_notes
from hlat.recipe import load
from hlat.storage.fingerprint import (
    FILE,
    Fingerprint,
    noted,
    read_stretches,
    stretches_text,
    with_steps,
)
from hlat.train import fingerprint as module
from hlat.train.fingerprint import Contents, differences
from hlat.train.initial import one_checkpoint, open_source

RECIPE = """
run: {name: small, steps: 4}
model: {layers: 1, hidden: 16, heads: 2, kv_heads: 2, ffn: 32, vocab: 257, max_seq_len: 16}
data:
  sources: [{path: text}, {path: more.jsonl, weight: 2}]
  tokenizer: bytes
  seq_len: 16
  micro_batch: 2
  global_batch: 4
  holdout: 0.3
schedule: {name: constant}
checkpoint: {every: 2}
eval: {rows: 4}
compile: false
"""


def write_text(folder: Path, word: str) -> None:
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"document {i}: " + f"the quick {word} fox. " * 20)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Texts, a recipe, and two models trained with other rates: `a` in two layouts of one run, and `b`."""
    folder = tmp_path_factory.mktemp("fingerprint")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("hlat.train.describe.sample", lambda *arguments: "")
        write_text(folder / "text", "brown")
        write_text(folder / "other", "green")
        lines = [json.dumps({"text": f"line {i} " * 9}) for i in range(20)]
        (folder / "more.jsonl").write_text("\n".join(lines))
        (folder / "r.yaml").write_text(RECIPE)
        assert cli.main(["train", "r.yaml", "run.dir=a"]) == 0
        assert cli.main(["train", "r.yaml", "run.dir=b", "optim.lr=1e-2", "run.steps=2"]) == 0
    return folder


@pytest.fixture
def here(place, tmp_path, monkeypatch) -> Path:
    """A copy of it, as working directory."""
    folder = tmp_path / "here"
    shutil.copytree(place, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("hlat.train.describe.sample", lambda *arguments: "")
    return folder


def made(*overrides: str) -> Fingerprint:
    return Contents().fingerprint(load("r.yaml", ["init.from=a", *overrides]))


def other_bytes(path: str) -> None:
    content = bytearray(Path(path).read_bytes())
    content[20] ^= 1
    Path(path).write_bytes(content)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optim.lr=1e-2"], "optim.lr was 0.0003 and is 0.01"),
        (["eval.rows=8"], "eval.rows was 4 and is 8"),
        (["eval.rows=null"], "eval.rows was 4 and is None"),
        (["eval.limit=3"], "eval.limit was None and is 3"),
        (["data.skip=[[2, 3]]"], "data.skip leaves out other data"),
        (["init.from=b"], "init.from: the weights differ"),
        (["init.from=null", "data.tokenizer=bytes"], "init.from was given"),
        (
            ["data.sources=[{path: other}, {path: more.jsonl, weight: 2}]"],
            "data.sources[0]: the content differs",
        ),
        (
            ["data.sources=[{path: more.jsonl}, {path: text, weight: 2}]"],
            "data.sources[1]: the content differs",
        ),
        (["data.tokenizer=train:bpe-300", "model.vocab=300"], "data.tokenizer: the tokenizer differs"),
    ],
)
def test_what_makes_another_result(here, overrides, said) -> None:
    if "model.vocab=300" in overrides:
        overrides = [*overrides, "init.from=null"]
        then = made("init.from=null", "data.tokenizer=bytes", "model.vocab=300")
    else:
        then = made()
    assert differences(then, then, 4) == []
    assert said in differences(then, made(*overrides), 4)


def test_changed_contents_are_noticed_and_moved_ones_are_not(here) -> None:
    then = made()
    shutil.move("text", "elsewhere")
    shutil.move("more.jsonl", "lines.jsonl")
    shutil.move("a", "trained")
    moved = ["init.from=trained", "data.sources=[{path: elsewhere}, {path: lines.jsonl, weight: 2}]"]
    assert differences(then, made(*moved), 4) == []
    step = "init.from=trained/checkpoints/step-00000004"  # what the run stands for now
    assert differences(then, made(*moved, step), 4) == []

    other_bytes("elsewhere/3.txt")
    assert differences(then, made(*moved), 4) == ["data.sources[0]: the content differs"]
    shutil.rmtree("trained/checkpoints/step-00000004")  # as if its newest one were another
    assert "init.from: the weights differ" in differences(then, made(*moved), 4)


@pytest.mark.parametrize(
    "overrides",
    [
        ["run.name=x", "run.dir=elsewhere", "run.max_hours=1", "run.resume=never"],
        ["checkpoint.every=1", "checkpoint.keep=9", "log.every=1", "eval.every=2", "compile=true"],
        ["data.micro_batch=1", "parallel.zero1=true", "parallel.dp=2"],
        ["data.skip=[[9, 12]]"],
    ],
)
def test_what_does_not(here, overrides) -> None:
    assert differences(made(), made(*overrides), 4) == []


@pytest.mark.parametrize(
    ("base", "overrides"),
    [
        ("precision.accumulate=bf16", "data.micro_batch=1"),
        ("reduce.name=conef", "parallel.dp=2"),
        ("guard.name=rewind", "checkpoint.every=1"),
    ],
)
def test_what_does_only_with_something_else(here, base, overrides) -> None:
    (line,) = differences(made(base), made(base, overrides), 4)
    assert line.startswith(overrides.partition("=")[0] + " was ")


def test_stretches_that_are_left_out_count_by_what_they_leave_out(here) -> None:
    assert differences(made("data.skip=[[2, 2], [3, 3]]"), made("data.skip=[[2, 3]]"), 4) == []
    assert differences(made("data.skip=[[2, 3], [6, 9]]"), made("data.skip=[[2, 3], [7, 7]]"), 3) == []
    assert differences(made("data.skip=[[2, 3], [6, 9]]"), made("data.skip=[[2, 3], [7, 7]]"), 4) != []


def test_weights_in_another_format(here) -> None:
    to_hf("a", "hf-a", dtype="fp32")
    to_hf("a", "hf-again", dtype="fp32")
    to_hf("b", "hf-b", dtype="fp32")
    common = ["data.tokenizer=bytes"]
    then = made("init.from=hf-a", *common)
    assert differences(then, made("init.from=hf-again", *common), 4) == []
    assert differences(then, made("init.from=hf-b", *common), 4) == ["init.from: the weights differ"]
    file = Path("hf-a/tokenizer.json")
    backend = Tokenizer.from_file(str(file))
    add_bos(backend, 256)
    backend.save(str(file))
    (line,) = differences(then, made("init.from=hf-a", *common), 4)
    assert line == "init.from: what its files say of BOS and special tokens differs"
    other_bytes("hf-a/config.json")  # whatever else lies beside the weights
    own = then.content.keys() - {"init.from", "init.texts"}
    assert Contents().fingerprint(load("r.yaml")).content.keys() == own


def test_a_thing_is_looked_at_once_for_a_sweep(here) -> None:
    contents = Contents()
    first = contents.fingerprint(load("r.yaml", ["init.from=a"]))
    shutil.rmtree("a/checkpoints/step-00000004")
    later = contents.fingerprint(load("r.yaml", ["init.from=a", "optim.lr=1e-2"]))
    assert later.content == first.content


def test_an_unknown_content_is_never_equal(here) -> None:
    now = made()
    unknown = Fingerprint(now.recipe, {**now.content, "init.from": ""})
    assert differences(unknown, now, 4) == differences(unknown, unknown, 4)
    assert differences(unknown, now, 4) == ["init.from: what it was is not known"]
    assert differences(Fingerprint({}, {}), now, 4)  # of a recipe without any section


def test_tasks_made_of_the_standard_library(monkeypatch) -> None:
    first = module.tasks_content(("hlat-cloze",))
    assert first and module.tasks_content(("hellaswag",)) == ""
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    assert module.tasks_content(("hlat-cloze",)) != first


SEVERAL = [Fingerprint({"eval": {"rows": rows}}, {"data": "x"}, {"hlat": "1"}) for rows in (1, 2, 3)]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 9), st.sampled_from(range(3))), min_size=1, max_size=12
    )
)
def test_every_row_stands_for_what_made_it(starts) -> None:
    """A run that starts again and again, from any of its steps: against a list with an entry for each row."""
    rows: list[int] = []
    stretches: list = []
    for wanted, steps, which in starts:
        after = min(wanted, len(rows))
        stretches = noted(stretches, after, SEVERAL[which])
        rows = rows[:after] + [which] * steps
    begins = [stretch.after for stretch in stretches]
    assert begins == sorted(set(begins))  # so that a run that starts often in one place has few of them
    with_rows = with_steps(stretches, len(rows))
    for number, which in enumerate(rows):
        (*_, own) = [stretch for stretch in with_rows if stretch.after <= number]
        assert own.fingerprint == SEVERAL[which]


def test_what_is_written_is_read(tmp_path) -> None:
    stretches = noted(noted([], 0, SEVERAL[0]), 7, SEVERAL[1])
    (tmp_path / FILE).write_bytes(stretches_text(stretches))
    assert read_stretches(tmp_path) == stretches
    other = [{"recipe": {"data": 3}, "content": {}}, {"recipe": {}, "content": {"data": 1}}]
    wrong = [json.dumps({"rows": [{"after": 0, **values}]}).encode() for values in other]
    wrong.append(b'{"rows": [{"after": Infinity, "recipe": {}, "content": {}}]}')
    for damaged in (b"", b"[]", b'{"rows": [{"after": 0}]}', b'{"rows": 3}', b"\xff", *wrong):
        (tmp_path / FILE).write_bytes(damaged)
        assert read_stretches(tmp_path) == []


def train(capsys, *words: str) -> str:
    assert cli.main(["train", "r.yaml", *words]) == 0
    said = capsys.readouterr()
    return said.out + said.err


def test_a_run_that_continues_says_what_its_weights_were(here, capsys, monkeypatch) -> None:
    common = ["run.dir=tuned", "data.tokenizer=bytes", "log.every=1"]
    assert "init.from" not in train(capsys, *common, "init.from=a", "run.stop_at_step=1")
    shutil.move("a", "moved")
    shutil.move("text", "elsewhere")
    moved = "data.sources=[{path: elsewhere}, {path: more.jsonl, weight: 2}]"
    assert "init.from:" not in train(capsys, *common, moved, "init.from=moved", "run.stop_at_step=2")
    said = train(capsys, *common, moved, "init.from=b", "eval.rows=8", "run.stop_at_step=3")
    assert said.count("init.from: this run began from other weights; it continues from its own") == 1
    assert "init.from" not in train(capsys, *common, moved, "init.from=null")  # a resume needs none
    stretches = read_stretches(Path("tuned"))
    assert [(s.after, s.fingerprint.recipe["eval"]["rows"]) for s in stretches][-2:] == [(2, 8), (3, 4)]
    assert len({s.fingerprint.content["init.from"] for s in stretches}) == 1  # whatever the recipe says now
    (run,) = load_runs([Path("tuned")])
    assert standing_notes([run]) == [
        "tuned: from step 3 on with another eval.rows",
        "tuned: from step 4 on with another eval.rows",
    ]

    (Path("tuned") / FILE).unlink()
    train(capsys, *common, moved, "init.from=null")
    assert read_stretches(Path("tuned"))[0].after == 4  # who made the rows is not known
    (Path("tuned") / "metrics.jsonl").unlink()
    (Path("tuned") / FILE).unlink()
    train(capsys, *common, moved, "init.from=null", "eval.rows=9")
    assert [s.after for s in read_stretches(Path("tuned"))] == [0, 4]  # a checkpoint alone says what it is

    with monkeypatch.context() as older:
        older.setattr(module, "note_start", lambda *arguments: None)
        train(capsys, "run.dir=old", moved, "init.from=b", "data.tokenizer=bytes", "run.stop_at_step=2")
    said = train(capsys, "run.dir=old", moved, "init.from=b", "data.tokenizer=bytes")
    assert "did not note with which weights this run began" in said
    assert standing_notes(load_runs([Path("old")])) == [
        "old: what the rows up to step 2 stand for is not known"
    ]


def like_a(name: str, old: str, new: str, file: str = "metrics.jsonl") -> None:
    """A run folder that differs from `a` in one thing."""
    shutil.copytree("a", name)
    path = Path(name) / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_a_report_says_what_cannot_be_compared(here, capsys) -> None:
    (alone,) = runs = load_runs([Path("a")])
    content = alone.stretches[0].fingerprint.content
    amount = int(alone.held_out["held_out_bytes"][-1])
    like_a("rows", f'"held_out_bytes":{amount}', '"held_out_bytes":12345')
    like_a("text2", content["held_out"], "f" * 64, FILE)
    like_a("data2", content["data.sources.0"], "f" * 64, FILE)
    like_a("same", '"run"', '"run"', FILE)
    assert standing_notes(runs) == []
    assert "held-out text" in render(runs) and content["held_out"][:12] in render(runs)
    assert standing_notes(load_runs([Path("a"), Path("same")])) == []
    amounts = "the held-out figures are not over equally much of the same text and cannot be compared"
    assert standing_notes(load_runs([Path("a"), Path("rows")])) == [
        f"{amounts} (a: {amount} bytes; rows: 12,345 bytes)"
    ]
    texts = "the held-out figures are over different texts and cannot be compared"
    assert standing_notes(load_runs([Path("a"), Path("text2")])) == [
        f"{texts} (a: {amount} bytes of text {content['held_out'][:12]}; "
        f"text2: {amount} bytes of text ffffffffffff)"
    ]
    assert standing_notes(load_runs([Path("a"), Path("data2")])) == [
        "the runs do not have the same content of data.sources[0]"
    ]
    (Path("same") / FILE).unlink()
    (line,) = standing_notes(load_runs([Path("a"), Path("same")]))
    assert line.startswith("what the figures of same stand for is not known")
    assert cli.main(["report", "a", "rows", "same", "--out", "report.html"]) == 0
    said = capsys.readouterr().out
    assert said.count("note: ") == 2 and amounts in Path("report.html").read_text()


def test_a_start_reads_one_checkpoint_of_a_run_that_goes_on(here) -> None:
    recipe, newest = load("r.yaml", ["init.from=a"]), Path("a/checkpoints/step-00000004")

    def read() -> str:
        return open_source("a")[0].path.name

    shutil.move(newest, "later")
    with one_checkpoint(recipe, Cluster(), 1.0):
        shutil.move("later", newest)
        assert read() == "step-00000002"
    assert read() == "step-00000004"
    other = SimpleNamespace(rank=1, from_first=lambda name, own, seconds: "a/checkpoints/step-00000002")
    with one_checkpoint(recipe, other, 1.0):  # type: ignore[arg-type]
        assert read() == "step-00000002"
    shutil.rmtree("a")
    with one_checkpoint(recipe, Cluster(), 1.0):  # a run that continues needs nothing
        assert Path("r.yaml").exists()
