"""Which file and line each document is from: found again in the user's own files."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hlat.cli import main
from hlat.data import open_data
from hlat.data import sources as sources_module
from hlat.data.build import build
from hlat.data.origins import FILE, FilePlaces, Origins, Place, Writer, shown
from hlat.data.packed import TokenFolder
from hlat.data.presence import missing_paths
from hlat.data.records import Records
from hlat.data.sources import resolve_source
from hlat.data.tokenizer import load_tokenizer
from hlat.recipe import load

RECIPE = """
run: {name: test, seed: 3, steps: 40, dir: run}
model: {preset: tiny, vocab: 400, max_seq_len: 32}
data:
  sources: [SOURCES]
  tokenizer: bytes
  micro_batch: 2
  global_batch: 8
  holdout: 0.2
"""
LATIN = "caf\udce9"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sources_module, "UNIT_BYTES_MIN", 1200)
    return tmp_path


def lines(name: str, count: int = 60) -> list[str]:
    """Lines of jsonl, some of which are no documents; with gaps of blank ones."""
    found = [json.dumps({"text": f"{name} number {n} " + "x" * (n * 7 % 40)}) for n in range(count)]
    found[3], found[20], found[21] = "", "not JSON", json.dumps({"other": 1})
    found[30] = "\n\n" + found[30]
    return "\n".join(found).split("\n")


def write(root: Path) -> None:
    """One file of every kind; names that are not UTF-8."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    root.mkdir()
    for n in range(8):
        (root / f"{n}.txt").write_text(f"text number {n} of its own\nwith two lines")
    (root / LATIN).mkdir()
    (root / LATIN / f"{LATIN}.txt").write_text("its name is latin-1")
    (root / LATIN / f"{LATIN}.jsonl").write_text("\n".join(lines("latin")))
    (root / "c.jsonl").write_text("\n".join(lines("plain")) + "\n")
    (root / "d.jsonl.gz").write_bytes(gzip.compress("\n".join(lines("packed")).encode()))
    table = pyarrow.table({"text": [None if n % 9 == 4 else f"row {n} of columns" for n in range(90)]})
    parquet.write_table(table, root / "e.parquet", row_group_size=20)
    with (
        pyarrow.OSFile(str(root / "f.arrow"), "wb") as sink,
        pyarrow.ipc.new_stream(sink, table.schema) as out,
    ):
        out.write_table(table, max_chunksize=16)


def text_at(entry: dict[str, Any]) -> str:
    """What a person finds where `data locate` says."""
    path = Path(entry["file"])
    if entry["file_row"] is not None:
        import pyarrow
        from pyarrow import parquet

        mapped = pyarrow.memory_map(str(path))
        table = (
            parquet.read_table(path)
            if path.suffix == ".parquet"
            else pyarrow.ipc.open_stream(mapped).read_all()
        )
        return str(table.column("text")[entry["file_row"]].as_py())
    if path.suffix == ".txt":
        assert entry["line"] == 1
        return path.read_text()
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return str(json.loads(data.split(b"\n")[entry["line"] - 1])["text"])


def recipe(*sources: str) -> Any:
    Path("r.yaml").write_text(RECIPE.replace("SOURCES", ", ".join(sources)))
    return load("r.yaml")


def all_found(data: Any) -> list[dict[str, Any]]:
    return [entry for step in range(1, 16) for entry in data.locate(step)]


@pytest.mark.slow
def test_every_kind_of_file_from_the_recipe(place: Path) -> None:
    write(place / "in")
    data = open_data(recipe("{path: in}"), workers=1, quiet=True)
    found = all_found(data)
    for entry in found:
        assert data.document_text(entry) == text_at(entry)
        assert entry["file"].startswith("in/")
    suffixes = {Path(entry["file"]).suffix for entry in found}
    assert suffixes == {".txt", ".jsonl", ".gz", ".parquet", ".arrow"}
    assert len({entry["shard"] for entry in found}) > 4  # files of lines were cut
    shutil.move("in", "moved")  # the same tokens, of files that lie elsewhere now
    again = open_data(recipe("{path: moved}"), workers=1, quiet=True)
    assert again.folders[0].folder == data.folders[0].folder
    assert all(
        e["file"].startswith("moved/") and text_at(e) == again.document_text(e) for e in all_found(again)
    )


@pytest.mark.slow
def test_a_tokenized_folder_of_several_sources(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place / "in")
    (place / "one.jsonl").write_text("\n".join(lines("single")))
    words = ["in", str(place / "one.jsonl"), "--tokenizer", "bytes", "--holdout", "0.2", "--out", "tokens"]
    assert main(["data", "tokenize", *words, "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "shards" not in said and " bytes a token" in said
    data = open_data(recipe("{path: tokens}"), workers=1, quiet=True)
    found = all_found(data)
    assert {entry["file"].partition("/")[0] for entry in found} == {"in", ""}
    for entry in found:
        assert data.document_text(entry) == text_at(entry)


def test_folders_of_earlier_versions(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place / "in")
    source = resolve_source(path="in")
    build([source], load_tokenizer("bytes"), place / "tokens", holdout=0.2, workers=1)
    for file in [*(place / "tokens").glob("*.from"), place / "tokens" / FILE]:
        file.unlink()
    recipe("{path: tokens}")
    assert main(["data", "locate", "r.yaml", "--step", "1"]) == 0
    told = capsys.readouterr()
    assert "tokens/train-000" in told.out and "lines are not known" in told.err
    assert main(["data", "locate", "r.yaml", "--step", "1", "--json"]) == 0
    assert {entry["file"] for entry in json.loads(capsys.readouterr().out)} == {None}


def test_damaged_origins_are_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "in").mkdir()
    (place / "in" / "a.jsonl").write_text("\n".join(lines("a")))
    source = resolve_source(path="in")
    build([source], load_tokenizer("bytes"), place / "tokens", holdout=0.2, workers=1)
    recipe("{path: tokens}")
    whole = json.loads((place / "tokens" / FILE).read_text())
    damaged: list[Any] = [
        [],
        {"version": 2},
        {"version": 1},
        whole | {"sources": 3},
        whole | {"shards": [[0, 5]]},
    ]
    damaged += [whole | {"shards": [[0, [[9, 0]]]] * 9}, whole | {"sources": [{}]}, whole | {"sources": []}]
    for content in ["", *map(json.dumps, damaged)]:
        (place / "tokens" / FILE).write_text(content)
        assert main(["data", "locate", "r.yaml", "--step", "1"]) == 2, content
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "not origins that this version reads" in error, content
    (place / "tokens" / FILE).write_text(json.dumps(whole))
    for table in (place / "tokens").glob("train-*.from"):
        table.write_bytes(b"x" * 32)
    assert main(["data", "locate", "r.yaml", "--step", "1"]) == 2
    assert ".from: " in capsys.readouterr().err
    TokenFolder(place / "tokens")  # training needs none of it


def test_rows_of_a_data_set(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "hub")
    (place / "set").mkdir()
    for name in ("train", "test"):
        (place / "set" / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{name} row number {n}"}) + "\n" for n in range(80))
        )
    split = "test[40:]+train[:50%]"
    loaded = datasets.load_dataset("set", split=split)
    data = open_data(recipe("{dataset: 'set@" + split + "'}"), workers=1, quiet=True)
    for entry in all_found(data):
        assert entry["file"] == f"set@{split}" and entry["line"] is None
        assert loaded[entry["file_row"]]["text"] == data.document_text(entry)


def test_examples_name_file_and_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "pairs").mkdir()
    for name in ("a", "b"):
        (place / "pairs" / f"{name}.jsonl").write_text("\n".join(lines(name)))
    keys = "examples: {path: pairs, prompt: '{text}', completion: '{text}'}"
    Path("r.yaml").write_text(RECIPE.replace("sources: [SOURCES]", keys))
    data: Any = open_data(
        load("r.yaml", ["data.seq_len=400", "model.max_seq_len=400"]), workers=1, quiet=True
    )
    found = all_found(data)
    for entry in found:
        assert data.document_text(entry) == 2 * text_at(entry)
    assert {entry["file"] for entry in found} == {"pairs/a.jsonl", "pairs/b.jsonl"}
    words = ["data.seq_len=400", "model.max_seq_len=400"]
    (place / "run").mkdir()
    (place / "run" / "resolved.yaml").write_text(load("r.yaml", words).to_yaml())
    assert main(["data", "locate", "run", "--step", "3", "--json"]) == 0
    shown_found = json.loads(capsys.readouterr().out)
    assert shown_found == data.locate(3) and {"row", "source", "file", "line"} <= shown_found[0].keys()
    assert main(["data", "locate", "run", "--step", "3"]) == 0
    first = shown_found[0]
    assert f"{first['file']}:{first['line']}" in capsys.readouterr().out


def test_lines_take_little_room() -> None:
    """A run of lines takes one entry, however long; a gap begins another."""
    writer = Writer()
    for number in [*range(1, 5000), *range(5001, 9000)]:
        writer.add((0, number))
    writer.add((1, 1))
    table = np.frombuffer(writer.table(), dtype="<u8").reshape(-1, 3).tolist()
    assert table == [[0, 0, 1], [4999, 0, 5001], [8998, 1, 1]]


def test_a_document_without_a_number(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that numbers nothing leaves the file known, and no line."""
    writer = Writer()
    for number in (0, 0, 7, 8):
        writer.add((0, number))
    (place / "train-00000.from").write_bytes(writer.table())
    described = {
        "version": 1,
        "sources": [{"root": "in", "files": [["a", False]]}],
        "shards": [[0, [[0, 2]]]],
    }
    (place / FILE).write_text(json.dumps(described))
    origins = Origins(place)
    found = [origins.find("train-00000", document) for document in range(4)]
    assert found == [Place("in/a"), Place("in/a"), Place("in/a", line=9), Place("in/a", line=10)]


def test_names_are_shown_escaped() -> None:
    assert shown(f"a/{LATIN}\n\x1b[31m/ü") == "a/caf\\xe9\\n\\x1b[31m/ü"
    assert str(Place(LATIN, line=3)) == "caf\\xe9:3" and str(Place("x", row=0)) == "x row 0"


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_names_that_are_not_utf8(place: Path, capsys: pytest.CaptureFixture[str], workers: str) -> None:
    """The folder, its folders, files, and a file as the source itself; a folder to write into."""
    write(place / "plain")
    shutil.move(place / "plain", place / LATIN)
    (place / LATIN / f"{LATIN}.bin").write_bytes(b"\xff")
    for number, source in enumerate([LATIN, f"{LATIN}/{LATIN}/{LATIN}.jsonl"]):
        out = f"{LATIN}{number}"
        words = ["data", "tokenize", source, "--tokenizer", "bytes", "--holdout", "0.2", "--workers", workers]
        assert main([*words, "--out", out]) == 0
        assert main(["data", "inspect", out]) == 0
        folder = TokenFolder(out)
        assert folder.manifest["sources"][0]["label"] == source
        assert folder.count("train", "documents") > 20
        place_found = folder.origins.find(Path(folder.shards["train"][0].path).stem, 0)
        assert place_found is not None and Path(place_found.file).exists()
        said = capsys.readouterr().out
        assert f"from {shown(source)}: " in said and not any("\udc80" <= c <= "\udcff" for c in said)


def test_places_that_do_not_exist_are_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "there").mkdir()
    given = recipe(
        "{path: there}", "{path: not/here}", "{path: 's3://b/c'}", "{dataset: a/b}", "{dataset: ./x}"
    )
    lines = missing_paths(given)
    assert lines == [
        f"data.sources[1].path: no such file or folder: 'not/here' in {place}",
        f"data.sources[4].dataset: no such file or folder: './x' in {place}",
    ]
    for name in ("~nosuchuser/x", "n" * 300, "/tmp/a\0b"):
        named = given.model_copy(update={"data": given.data.model_copy(update={"tokenizer": name})})
        assert len(missing_paths(named)) == 3
    assert main(["recipes", "check", "r.yaml"]) == 0
    assert lines[0] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "place"),
    [('\n{"text": "a"}\n{"text": "b"}\n', (3, None)), ('[{"text": "a"},\n{"text": "b"}]', (None, 1))],
)
def test_records_of_a_json_file_have_lines_where_there_is_one_a_line(tmp_path, content, place):
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(content.encode()))
    places = FilePlaces(resolve_source(path=tmp_path / "c.json.gz"), 0)
    name = [record.name for record in Records(str(tmp_path / "c.json.gz"), None, "x").read()][1]
    assert places.of(name)[1:] == place
