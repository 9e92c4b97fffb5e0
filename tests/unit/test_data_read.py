"""What is made of a source is called by what was read of it, whatever becomes of its files meanwhile."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hlat.data import cache, examples, open_data, pool
from hlat.data import sources as sources_module
from hlat.data.build import build
from hlat.data.packed import TokenFolder
from hlat.data.sources import identity, resolve_source
from hlat.data.tokenizer import load_tokenizer
from hlat.errors import UserError
from hlat.recipe import load
from hlat.storage import blocks, digests
from hlat.storage.blocks import BLOCK, Reading, content, open_file, tree_of, watching

Change = Callable[[Path], Callable[[], None]]
"""Makes a file another one; what it returns makes it what it was."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path: Path, texts: list[str]) -> None:
    kind = path.name.partition(".")[2]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if kind in ("parquet", "arrow"):
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        table = pyarrow.table({"text": texts, "n": list(range(len(texts)))})
        if kind == "parquet":
            parquet.write_table(table, path, row_group_size=40)
        else:
            with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as out:
                out.write_table(table, max_chunksize=40)
    elif kind == "txt":
        path.write_text("\n".join(texts))
    else:
        path.write_bytes(gzip.compress(lines) if kind == "jsonl.gz" else lines)


def other(path: Path) -> bytes:
    """Content of the same kind, and as long where that goes by the texts."""
    beside = path.with_name(f".other.{path.name.partition('.')[2]}")
    write(beside, [f"DOCUMENT number {n}" for n in range(100)])
    data = beside.read_bytes()
    beside.unlink()
    return data


def in_place(path: Path) -> Callable[[], None]:
    """Times of modification stay what they were."""
    stamp, first = path.stat().st_mtime_ns, path.read_bytes()

    def put(data: bytes) -> None:
        with path.open("r+b") as file:
            file.write(data)
            file.truncate()
        os.utime(path, ns=(stamp, stamp))

    put(other(path))
    return lambda: put(first)


def by_rename(path: Path) -> Callable[[], None]:
    kept = path.with_name(".kept")
    path.rename(kept)
    path.write_bytes(other(path))
    os.utime(path, ns=(kept.stat().st_mtime_ns,) * 2)
    return lambda: os.replace(kept, path) or None


def appended(path: Path) -> Callable[[], None]:
    size, data = path.stat().st_size, path.read_bytes()
    path.write_bytes(data + data)
    return lambda: os.truncate(path, size)


def truncated(path: Path) -> Callable[[], None]:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return lambda: path.write_bytes(data) and None


def make(path: Path, out: Path, workers: int = 1) -> TokenFolder:
    source = resolve_source(path=path)
    return TokenFolder(build([source], load_tokenizer("bytes"), out, holdout=0.1, workers=workers).folder)


def while_reading(monkeypatch: pytest.MonkeyPatch, path: Path, change: Change) -> None:
    """The file is another one for as long as units are tokenized."""
    run = pool.run

    def changed(*arguments: Any) -> Any:
        back = change(path)
        try:
            return run(*arguments)
        finally:
            back()

    monkeypatch.setattr(pool, "run", changed)


KINDS = ("txt", "jsonl", "jsonl.gz", "parquet", "arrow")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [in_place, by_rename, appended, truncated])
def test_a_file_that_changes_and_changes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, change: Change
) -> None:
    path = tmp_path / f"x.{kind}"
    write(path, [f"document number {n}" for n in range(100)])
    monkeypatch.setattr(sources_module, "UNIT_BYTES_MIN", 1000)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        while_reading(patch, path, change)
        with pytest.raises(UserError, match="changed while it was|cannot be read|not a readable"):
            make(path, tmp_path / "out")
    assert path.read_bytes() == before
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))
    folder = make(path, tmp_path / "out")
    total = folder.count("train", "documents") + folder.count("holdout", "documents")
    assert total == (1 if kind == "txt" else 100)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("change", [in_place, by_rename])
def test_files_that_are_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, change: Change
) -> None:
    monkeypatch.setattr(blocks, "MAPPED_ABOVE", 0)
    test_a_file_that_changes_and_changes_back(tmp_path, monkeypatch, kind, change)


@pytest.mark.slow
def test_by_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    write(path, [f"document number {n}" for n in range(100)])
    monkeypatch.setattr(sources_module, "UNIT_BYTES_MIN", 1000)
    while_reading(monkeypatch, path, in_place)
    with pytest.raises(UserError, match=r"x\.jsonl: changed while it was"):
        make(path, tmp_path / "out", workers=2)


def test_what_does_not_change_the_bytes_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    write(path, [f"document number {n}" for n in range(100)])

    def touched(path: Path) -> Callable[[], None]:
        path.chmod(0o600)
        os.utime(path, ns=(1, 1))
        return path.touch

    while_reading(monkeypatch, path, touched)
    assert make(path, tmp_path / "out").count("train", "documents") > 50


def interrupted(patch: pytest.MonkeyPatch, path: Path, out: Path) -> None:
    """A build that is ended when all its units are written, and the folder is not yet complete."""
    run = pool.run

    def killed(*arguments: Any) -> Any:
        run(*arguments)
        raise KeyboardInterrupt

    patch.setattr(pool, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        make(path, out)


def test_units_that_an_interrupted_build_left_are_compared_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.jsonl"
    write(path, [f"document number {n}" for n in range(100)])

    with monkeypatch.context() as patch:
        while_reading(patch, path, in_place)
        interrupted(patch, path, tmp_path / "out")
    assert list(tmp_path.glob("out.partial/unit-*.json"))
    with pytest.raises(UserError, match="changed while it was"):
        make(path, tmp_path / "out")
    ids = make(path, tmp_path / "out").shards["train"][0].tokens[:].tolist()
    assert b"document" in bytes(i for i in ids if i < 256)


@pytest.mark.parametrize("damage", [b"", b'{"key": ', b"[]", b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("name", ["job.json", "unit-00000.json"])
def test_what_an_interrupted_build_left_damaged_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: bytes
) -> None:
    path = tmp_path / "x.jsonl"
    write(path, [f"document number {n}" for n in range(100)])

    with monkeypatch.context() as patch:
        interrupted(patch, path, tmp_path / "out")
    (tmp_path / "out.partial" / name).write_bytes(damage)
    found = make(path, tmp_path / "out").shards["train"][0].tokens[:].tolist()
    assert found == make(path, tmp_path / "other").shards["train"][0].tokens[:].tolist()


def test_a_remembered_digest_that_is_wrong_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a write through a memory map, which leaves its time behind later."""
    path = tmp_path / "x.jsonl"
    write(path, [f"document number {n}" for n in range(100)])
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -1e9)
    monkeypatch.setattr(digests, "mark_of", lambda found: (found.st_ino, 0, 0, 0))
    first = identity(resolve_source(path=path))
    in_place(path)
    assert identity(resolve_source(path=path)) == first  # the memory is wrong
    with pytest.raises(UserError, match="changed while it was"):
        make(path, tmp_path / "out")
    assert identity(resolve_source(path=path)) != first
    assert make(path, tmp_path / "out").count("train", "documents") > 50


def test_a_tokenizer_that_is_trained_of_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, train = tmp_path / "x.jsonl", cache.train_bpe
    write(path, [f"document number {n}" for n in range(100)])

    def of_another(texts: Any, *rest: Any) -> Any:
        back = in_place(path)
        made = train(iter(list(texts)), *rest)
        back()
        return made

    with monkeypatch.context() as patch:
        patch.setattr(cache, "train_bpe", of_another)
        with pytest.raises(UserError, match=r"x\.jsonl: changed while it was read for a tokenizer"):
            cache.trained_tokenizer([resolve_source(path=path)], 300, 0.1, quiet=True)
    assert not list((tmp_path / "cache/hlat/tokenizers").iterdir())
    assert cache.trained_tokenizer([resolve_source(path=path)], 300, 0.1, quiet=True).vocab_size <= 300


PAIRS = """
run: {name: pairs, steps: 2, dir: run}
model: {preset: tiny, vocab: 400, max_seq_len: 64}
data:
  examples: {path: x.jsonl, eval_path: y.jsonl, prompt: "{text}", completion: "{text}"}
  tokenizer: bytes
  micro_batch: 2
  global_batch: 2
"""


@pytest.mark.parametrize("name", ["x.jsonl", "y.jsonl"])
def test_examples_that_change_while_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("x.jsonl", "y.jsonl"):
        write(tmp_path / file, [f"document number {n} of {file}" for n in range(20)])
    (tmp_path / "pairs.yaml").write_text(PAIRS)
    recipe, read = load("pairs.yaml"), examples.read_examples

    def changed(*arguments: Any) -> Any:
        back = in_place(tmp_path / name)
        found = read(*arguments)
        back()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(examples, "read_examples", changed)
        with pytest.raises(UserError, match=f"{name}: changed while it was read"):
            open_data(recipe, quiet=True)
    opened = open_data(recipe, quiet=True)
    from hlat.data.content import data_content

    assert opened.content == data_content(recipe.data)


def test_the_content_of_opened_text_is_what_its_sources_were(tmp_path: Path, monkeypatch: Any) -> None:
    from hlat.data.content import data_content

    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.jsonl", [f"document number {n}" for n in range(100)])
    make(tmp_path / "x.jsonl", tmp_path / "tokens")
    sources = "  sources: [{path: x.jsonl}, {path: tokens}]\n  holdout: 0.1\n"
    head, _, rest = PAIRS.partition("  examples")
    (tmp_path / "r.yaml").write_text(head + sources + rest.partition("\n")[2])
    recipe = load("r.yaml")
    opened = open_data(recipe, quiet=True)
    before = data_content(recipe.data)
    assert opened.content == before and len(before) == 2
    write(tmp_path / "x.jsonl", ["else"])  # after it was opened
    assert opened.content == before != data_content(recipe.data)


@given(
    st.integers(0, 3 * BLOCK + 5),
    st.lists(st.tuples(st.integers(0, 3 * BLOCK), st.integers(0, BLOCK + 9)), max_size=6),
)
@settings(max_examples=15, deadline=None)
def test_reads_are_those_of_the_file(tmp_path_factory: Any, size: int, reads: list[tuple[int, int]]) -> None:
    path = tmp_path_factory.mktemp("blocks") / "x"
    data = os.urandom(1 << 10) * (size >> 10) + b"x" * (size & 1023)
    path.write_bytes(data)
    (known,) = digests.looked_at([path])
    with watching(Reading()) as reading, open_file(str(path)) as file:
        for start, count in reads:
            assert file.seek(start) == start
            assert file.read(count) == data[start : start + count]
        assert file.seek(0, os.SEEK_END) == size
    taken, merged = json.loads(json.dumps(reading.take())), Reading()
    merged.merge(taken)
    assert merged.tree(str(path), size) == known.tree
    assert known.size == size and (size > BLOCK or known.tree == known.whole)
    if size:
        with watching(Reading()) as reading:
            assert bytes(content(str(path))) == data
        path.write_bytes(bytes(size))
        assert reading.tree(str(path), size) == known.tree  # nothing is read again


def test_readers_that_disagree(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"A" * 100)
    first, second = Reading(), Reading()
    with first.opened(str(path)) as file:
        file.read()
    path.write_bytes(b"B" * 100)
    with second.opened(str(path)) as file:
        file.read()
    with pytest.raises(UserError, match="x: changed while it was read"):
        first.merge(second.take())
    with pytest.raises(UserError, match="x: changed while it was read"), first.opened(str(path)) as file:
        file.read()
    assert tree_of([]) == digests.hashlib.sha256(b"").hexdigest()
