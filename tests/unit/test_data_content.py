"""What the data keys of a recipe stand for: contents, and what is made while they change."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hlat.data import cache, pool
from hlat.data.build import build
from hlat.data.content import data_content, tokenizer_content
from hlat.data.packed import TokenFolder
from hlat.data.sources import resolve_source
from hlat.data.tokenizer import load_tokenizer
from hlat.errors import UserError
from hlat.recipe_sections import DataSection


def write_texts(folder: Path) -> Path:
    folder.mkdir()
    for number in range(30):
        (folder / f"{number:04}.txt").write_text(f"document number {number}\n" * 9)
    return folder


def tokenize(source: Path, out: Path) -> Path:
    tokenizer = load_tokenizer("bytes")
    return build([resolve_source(path=source)], tokenizer, out, holdout=0.25, workers=1).folder


def content_of(**keys: object) -> dict[str, str]:
    return data_content(DataSection.model_validate(keys))


def test_a_tokenized_folder_is_what_its_manifest_says(tmp_path) -> None:
    texts = write_texts(tmp_path / "in")
    first = tokenize(texts, tmp_path / "first")
    known = content_of(sources=[{"path": str(first)}])
    assert known == content_of(sources=[{"path": str(shutil.move(first, tmp_path / "moved"))}])
    (texts / "0003.txt").write_text("other")
    assert known != content_of(sources=[{"path": str(tokenize(texts, tmp_path / "other"))}])
    moved = f"file://{tmp_path}/moved"
    assert known == content_of(sources=[{"path": moved}])  # and in a store


def test_a_data_set_of_the_hub_is_its_rows(tmp_path, monkeypatch) -> None:
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    arrow = tmp_path / "hub.arrow"

    def write(*texts: str) -> None:
        table = pyarrow.table({"text": list(texts)})
        with pyarrow.OSFile(str(arrow), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_file(str(arrow)))
    write("one", "two")
    text, records = (
        {"sources": [{"dataset": "a/b"}]},
        {"examples": {"dataset": "a/b", "eval_dataset": "a/b@test"}},
    )
    first = content_of(**text), content_of(**records)
    assert first == (content_of(**text), content_of(**records))
    assert first[1].keys() == {"data.examples", "data.examples.eval"}
    write("one", "owt")  # a new revision under the same name
    now = content_of(**text), content_of(**records)
    assert all(old[key] != new[key] for old, new in zip(first, now, strict=True) for key in old)


def test_what_is_made_of_the_standard_library(monkeypatch) -> None:
    keys = {"examples": {"dataset": "stdlib-docstrings", "prompt": "{signature}", "completion": "{summary}"}}
    first = content_of(**keys)
    assert first == content_of(**keys)
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    assert content_of(**keys) != first


def test_a_tokenizer_to_be_trained_follows_from_the_sources(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert tokenizer_content("train:bpe-300") == "train:bpe-300"
    assert tokenizer_content("bytes") == load_tokenizer("bytes").identity
    source = resolve_source(path=write_texts(tmp_path / "in"))
    made = cache.trained_tokenizer([source], 300, 0.1, quiet=True)
    (key,) = (tmp_path / "cache/hlat/tokenizers").iterdir()
    renamed = resolve_source(path=shutil.move(tmp_path / "in", tmp_path / "moved"))
    assert cache.tokenizer_key([renamed], 300, 0.1)[:32] == key.name
    assert len({cache.tokenizer_key([renamed], *rest) for rest in ((300, 0.1), (301, 0.1), (300, 0.2))}) == 3
    assert tokenizer_content(str(made.files()[0])) == made.identity
    with pytest.raises(UserError, match="no tokenizer"):
        tokenizer_content(str(tmp_path / "nothing"))


def test_a_source_that_changes_while_it_is_tokenized_leaves_nothing(tmp_path, monkeypatch):
    source, run = write_texts(tmp_path / "in"), pool.run

    def change_then_run(*arguments):
        done = run(*arguments)
        (source / "0000.txt").write_text("something else of its own")
        return done

    monkeypatch.setattr(pool, "run", change_then_run)
    with pytest.raises(UserError, match="changed while it was tokenized"):
        tokenize(source, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))
    monkeypatch.undo()
    folder = TokenFolder(tokenize(source, tmp_path / "out"))
    assert folder.count("train", "documents") + folder.count("holdout", "documents") == 30


def test_a_source_that_changes_while_a_tokenizer_is_made_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, train = write_texts(tmp_path / "in"), cache.train_bpe

    def train_then_change(*arguments):
        train(*arguments)
        (source / "0000.txt").write_text("something else of its own")

    monkeypatch.setattr(cache, "train_bpe", train_then_change)
    with pytest.raises(UserError, match="changed while it was read for a tokenizer"):
        cache.trained_tokenizer([resolve_source(path=source)], 300, 0.1, quiet=True)
    assert not list((tmp_path / "cache/hlat/tokenizers").iterdir())


def test_the_cache_has_one_entry_for_one_content(tmp_path, monkeypatch):
    """Whatever it is called and wherever it lies; another for all that changes the tokens."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = write_texts(tmp_path / "in")
    lines = [json.dumps({"text": f"text {i}", "other": f"other {i}"}) for i in range(30)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))

    def made(path, tokenizer="bytes", holdout=0.2, **rest):
        found = resolve_source(path=path, **rest)
        return cache.tokenized(found, load_tokenizer(tokenizer), holdout, workers=1, quiet=True)

    first = made(source)
    assert first.parent == tmp_path / "cache/hlat/tokens"
    stamp = (first / "manifest.json").stat().st_mtime_ns
    moved = shutil.move(source, tmp_path / "moved")
    for number, file in enumerate(sorted(moved.iterdir())):
        file.rename(moved / f"{number:02} renamed.text")
    assert made(moved) == first and (first / "manifest.json").stat().st_mtime_ns == stamp
    trained = cache.trained_tokenizer([resolve_source(path=moved)], 300, 0.2, quiet=True)
    others = [
        made(moved, holdout=0.3),
        made(moved, tokenizer=str(trained.files()[0])),
        made(tmp_path / "lines.jsonl"),
        made(tmp_path / "lines.jsonl", text_field="other"),
    ]
    (moved / "00 renamed.text").write_text("another text")
    others.append(made(moved))
    assert len({first, *others}) == 6 == len(list((tmp_path / "cache/hlat/tokens").iterdir()))


TRAINER = """
    import sys, time
    from hlat.data import cache
    from hlat.data.sources import resolve_source
    train = cache.train_bpe

    def slow(texts, vocab, folder):
        (folder / "tokenizer.json").write_text("half of it")
        print("begun", flush=True)
        time.sleep(600)

    cache.train_bpe = slow if sys.argv[2] == "slow" else train
    made = cache.trained_tokenizer([resolve_source(path=sys.argv[1])], 300, 0.1, quiet=True)
    print(made.identity)
"""


@pytest.mark.slow
def test_a_tokenizer_is_trained_by_who_waits_when_the_trainer_is_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = write_texts(tmp_path / "in")

    def start(how):
        command = [sys.executable, "-c", textwrap.dedent(TRAINER), str(source), how]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    first = start("slow")
    assert first.stdout.readline() == "begun\n", first.communicate()
    waiting = [start("as ever") for _ in range(2)]
    with pytest.raises(subprocess.TimeoutExpired):
        waiting[0].wait(4)
    first.kill()
    first.communicate()
    results = [process.communicate(timeout=120) for process in waiting]
    assert [process.returncode for process in waiting] == [0, 0], results
    (folder,) = (tmp_path / "cache/hlat/tokenizers").iterdir()
    assert {printed.strip() for printed, _ in results} == {load_tokenizer(folder).identity}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    again = cache.trained_tokenizer([resolve_source(path=source)], 300, 0.1, quiet=True)
    assert again.identity == load_tokenizer(folder).identity
