"""How files are read: by name and by content, compressed or not, whole or damaged, JSON of every layout."""

import bz2
import gzip
import io
import json
import lzma
import sqlite3
import sys
import tarfile
import zipfile
from contextlib import closing

import numpy as np
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hlat.data import json_values
from hlat.data import sources as sources_module
from hlat.data.formats import kind_of
from hlat.data.json_values import lookup, values_of
from hlat.data.readers import read_pieces
from hlat.data.records import Records
from hlat.data.sources import resolve_source, units
from hlat.errors import UserError

pyarrow = pytest.importorskip("pyarrow")

TEXTS = ["one", "zwei ü\nlines", 'quoted " \\ and {"text": "no"}', "日本語 \U0001f600", "x" * 5000]
RECORDS = [{"id": n, "text": text, "meta": {"url": f"u{n}"}} for n, text in enumerate(TEXTS)]
LINES = "".join(
    json.dumps(record, ensure_ascii=n % 2 == 0) + "\n" for n, record in enumerate(RECORDS)
).encode()
ONE_LINE = json.dumps(RECORDS).encode()
ARRAY = json.dumps(RECORDS, indent=2).encode()


def zstd(raw):
    return pyarrow.compress(raw, codec="zstd", asbytes=True)


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}
SKIPPED_FRAME = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"


def documents(path, text_field="text"):
    source = resolve_source(path=path, text_field=text_field)
    return [found for unit in units(source) for found in read_pieces(source.files, unit, text_field)]


def texts(path, text_field="text"):
    found = documents(path, text_field)
    assert [document.reason for document in found if document.text is None] == []
    return [document.text for document in found]


def reasons(path, text_field="text"):
    return [document.text if document.text is not None else document.reason for document in documents(path)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("en/c4-train.00000-of-01024.json.gz", "json.gz"),
        ("dolma/books-0000.json.gz", "json.gz"),
        ("shard_00000000_processed.jsonl.zst", "jsonl.zst"),
        ("RedPajama/arxiv_024de5df.JSONL", "jsonl"),
        ("a.ndjson.bz2", "jsonl.bz2"),
        ("a.jsonl.xz", "jsonl.xz"),
        ("a.json.zstd", "json.zst"),
        ("a.txt.gz", "text.gz"),
        ("a.gz", "text.gz"),
        ("part-0.snappy.parquet", "parquet"),
        ("a.arrow", "arrow"),
        ("a.feather", "arrow"),
        ("json", "text"),
        ("a.json.txt", "text"),
        ("a.geojson", "text"),
    ],
)
def test_a_name_tells_what_is_inside(name, kind):
    assert kind_of(name) == kind


@pytest.mark.parametrize("packing", ["", *PACKERS])
@pytest.mark.parametrize("layout", ["jsonl", "ndjson", "json", "JSON"])
@pytest.mark.parametrize("content", [LINES, ARRAY, ONE_LINE], ids=["lines", "array", "line"])
def test_json_is_read_under_all_its_names(tmp_path, packing, layout, content, monkeypatch):
    monkeypatch.setattr(sources_module, "UNIT_BYTES_MIN", 300)
    packed = PACKERS[packing](content) if packing else content
    path = write(tmp_path / f"x.{layout}{'.' * bool(packing)}{packing}", packed)
    lines = content is LINES
    if packing != "zst":
        how = {"lines": lines, "compression": {"": None, "gz": "gzip"}.get(packing, packing)}
        assert pandas.read_json(io.BytesIO(packed), **how)["text"].tolist() == TEXTS
    assert texts(path) == TEXTS
    assert texts(path, "meta.url") == [record["meta"]["url"] for record in RECORDS]
    found = list(Records(str(path), None, "data.examples").read())
    assert [record.values for record in found] == RECORDS
    assert found[0].fields == ("id", "text", "meta")


@pytest.mark.slow
def test_the_same_documents_as_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    for name, content in {
        "lines.json": LINES,
        "array.json": ARRAY,
        "c4-train.00000-of-01024.json.gz": gzip.compress(LINES),
        "bom.jsonl": b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"),
    }.items():
        path = write(tmp_path / name, content)
        loaded = datasets.Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache"))
        assert texts(path) == list(loaded["text"]) == TEXTS, name


@pytest.mark.parametrize("packing", PACKERS)
def test_compressed_files_in_several_parts_under_wrong_names_and_cut_off(tmp_path, packing):
    half = LINES.index(b"\n", 30) + 1
    pack = PACKERS[packing]
    joined = pack(LINES[:half]) + pack(LINES[half:])
    for number, content in enumerate([joined, pack(LINES) + (SKIPPED_FRAME if packing == "zst" else b"")]):
        assert texts(write(tmp_path / f"parts-{number}.jsonl.{packing}", content)) == TEXTS
    assert texts(write(tmp_path / "packed.jsonl", joined)) == TEXTS
    assert texts(write(tmp_path / f"unpacked.jsonl.{packing}", LINES)) == TEXTS
    assert texts(write(tmp_path / "other.jsonl.gz", joined)) == TEXTS
    whole = write(tmp_path / f"plain.txt.{packing}", pack(LINES))
    assert texts(whole) == texts(write(tmp_path / "no-suffix", pack(LINES))) == [LINES.decode()]
    for cut in (1, 5, len(joined) // 2):
        path = write(tmp_path / f"cut-{cut}.jsonl.{packing}", joined[:-cut])
        with pytest.raises(UserError, match=rf"cut-{cut}\.jsonl\.{packing}: cannot be read \("):
            documents(path)
        with pytest.raises(UserError, match="cannot be read"):
            list(Records(str(path), None, "data.examples").read())
    damaged = bytearray(pack(LINES))
    damaged[len(damaged) // 2] ^= 0xFF
    with pytest.raises(UserError, match="cannot be read"):
        documents(write(tmp_path / f"damaged.txt.{packing}", bytes(damaged)))


def test_zstd_with_leading_skipped_frame_long_window_and_without_its_package(tmp_path, monkeypatch):
    path = write(tmp_path / "x.jsonl.zst", SKIPPED_FRAME + zstd(LINES))
    assert texts(path) == TEXTS
    frame = b"\x28\xb5\x2f\xfd\x00\xa8\x01\x00\x00"  # a window of 2 GiB, and an empty last block
    with pytest.raises(UserError, match=r"window is above 128 MiB\); compress it again without --long"):
        documents(write(tmp_path / "long.jsonl.zst", frame))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        UserError, match=r"x\.jsonl\.zst' needs the package 'pyarrow'; run: pip install 'hlat\["
    ):
        documents(path)


def archives(folder):
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("x.txt", "text")
    with tarfile.open(folder / "b.tar", "w") as archive:
        archive.add(folder / "a.zip", "x.txt")
    with closing(sqlite3.connect(folder / "c.db")) as database:
        database.execute("create table t (x)")
        database.commit()
    np.save(folder / "d.npy", np.arange(9))
    (folder / "e.tar.gz").write_bytes(gzip.compress((folder / "b.tar").read_bytes()))
    (folder / "f.jsonl").write_bytes((folder / "a.zip").read_bytes())
    (folder / "g.json.gz").write_bytes(gzip.compress(gzip.compress(LINES)))
    (folder / "h.txt").write_bytes("text".encode("utf-16"))
    (folder / "i.7z").write_bytes(b"7z\xbc\xaf\x27\x1c\0\4")
    (folder / "j.pdf").write_bytes(b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n")
    (folder / "k.bin").write_bytes(b"ab\0c")


def test_what_is_no_text_is_called_by_its_name(tmp_path):
    archives(tmp_path)
    assert {document.name[0]: document.reason for document in documents(tmp_path)} == {
        "a": "zip archive: unpack it first",
        "b": "tar archive: unpack it first",
        "c": "SQLite database: export its text first",
        "d": "NumPy array: export its text first",
        "e": "tar archive: unpack it first",
        "f": "zip archive: unpack it first",
        "g": "compressed twice: unpack it once",
        "h": "UTF-16: convert it to UTF-8",
        "i": "7z archive: unpack it first",
        "j": "PDF: extract its text first",
        "k": "binary (holds NUL bytes)",
    }


def test_columns_are_known_by_their_first_bytes(tmp_path):
    import pyarrow.parquet as parquet

    table = pyarrow.table({"text": TEXTS})
    parquet.write_table(table, tmp_path / "0a1b2c")
    with (
        pyarrow.OSFile(str(tmp_path / "x.bin"), "wb") as sink,
        pyarrow.ipc.new_file(sink, table.schema) as out,
    ):
        out.write_table(table)
    assert texts(tmp_path) == [*TEXTS, *TEXTS]
    packed = write(tmp_path / "y" / "a.parquet.gz", gzip.compress((tmp_path / "0a1b2c").read_bytes()))
    assert reasons(packed) == ["compressed parquet file: unpack it first"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert texts(write(tmp_path / "a.txt", b"\xef\xbb\xbfab\r\n")) == ["ab\r\n"]
    assert texts(write(tmp_path / "a.txt.gz", gzip.compress(b"\xef\xbb\xbfab"))) == ["ab"]
    marked = b'\xef\xbb\xbf{"text": "a"}\r\n\xef\xbb\xbf{"text": "b"}\r\n'
    for name in ("a.jsonl", "a.json"):
        assert texts(write(tmp_path / name, marked)) == ["a", "b"]
    assert texts(write(tmp_path / "b.json", b'\xef\xbb\xbf[{"text": "a"}]')) == ["a"]


ODD = {
    "object": (b'{"text": "a"}', ["a"]),
    "object of several lines": (b'{\n  "text": "a"\n}\n', ["a"]),
    "objects of several lines": (b'{\n  "text": "a"\n}\n{\n "text": "b"\n}', ["a", "b"]),
    "objects in a row": (b'{\n"text": "a"} {"text": "b"}{"text": "c"}', ["a", "b", "c"]),
    "array of texts": (b'["a", "b"]', ["not a JSON object"] * 2),
    "array of anything": (b'[1, {"text": "a"}, []]', ["not a JSON object", "a", "not a JSON object"]),
    "empty array": (b" [ ] ", []),
    "arrays": (b'[{"text": "a"}]\n[{"text": "b"}]', ["a", "b"]),
    "a lone text": (b'"a"', ["not a JSON object"]),
    "blank": (b" \n\n", []),
    "no JSON": (b"hello", ["not JSON"]),
    "array cut off in a record": (b'[{"text": "a"}, {"text": "b', ["a", "not JSON"]),
    "array cut off after a record": (b'[{"text": "a"}', ["a", "not JSON: an array that is cut off"]),
    "array with a bad record": (b'[{"text": "a"}, {text: 1}, {"text": "c"}]', ["a", "not JSON"]),
    "array without a comma": (b'[{"text": "a"} {"text": "c"}]', ["a", "not JSON"]),
    "object cut off": (b'{\n "text": "a', ["not JSON"]),
    "comments": (b'{\n  // a comment\n  "text": "a",\n  "b": {\n    "text": "no"\n  }\n}', ["not JSON"]),
    "bad first line": (b'{"text": \n{"text": "b"}\n{"text": "c"}\n', ["not JSON", "b", "c"]),
    "bad line": (b'{"text": "a"}\nhello\n{"text": "c"}\n', ["a", "not JSON", "c"]),
    "surrogate": (rb'{"text": "\ud800"}', ["not Unicode text (lone surrogate)"]),
    "surrogate pair": (rb'{"text": "\ud83d\ude00"}', ["\U0001f600"]),
    "not UTF-8": (b'{"text": "a"}\n{"text": "\xff"}\n{"text": "c"}', ["a", "not UTF-8", "c"]),
    "not UTF-8 in an array": (b'[{"text": "a"}, {"text": "\xff"}, {"text": "c"}]', ["a", "not UTF-8", "c"]),
    "NUL": (rb'{"text": "a\u0000b"}', ["a\0b"]),
    "deep": (b'{"text": "a"}\n' + b"[" * 20_000 + b'\n{"text": "c"}', ["a", "nested too deep", "c"]),
    "deep in an array": (b'[{"text": "a"}, ' + b"[" * 20_000 + b"]", ["a", "nested too deep"]),
    "long number": (b'{"n": ' + b"9" * 5000 + b', "text": "a"}', ["a"]),
    "long number in an array": (b'[{"n": -' + b"9" * 5000 + b', "text": "a"}]', ["a"]),
    "NaN": (b'{"n": [NaN, -Infinity, 1e999], "text": "a"}', ["a"]),
    "same key twice": (b'{"text": "a", "text": "b"}', ["b"]),
    "null": (b'{"text": null}', ["no text under 'text'"]),
    "list": (b'{"text": ["a"]}', ["'text' holds a list, not text"]),
    "dict": (b'{"text": {"a": "b"}}', ["'text' holds an object, not text"]),
    "number": (b'{"text": 5}', ["'text' holds a number, not text"]),
    "empty": (b'{"text": ""}', ["empty"]),
    "bare carriage returns": (b'{"text": "a"}\r{"text": "b"}', ["a", "b"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("chunk", [1, 7, 2**20])
def test_odd_json_is_read_or_counted(tmp_path, monkeypatch, name, chunk):
    content, expected = ODD[name]
    monkeypatch.setattr(json_values, "_CHUNK", chunk)
    if chunk < 7 and len(content) > 10_000:
        pytest.skip("one character at a time")
    assert reasons(write(tmp_path / "x.json", content)) == expected
    assert reasons(write(tmp_path / "x.json.gz", gzip.compress(content))) == expected


def test_the_same_lines_are_read_from_jsonl(tmp_path):
    for name in (
        "bad line",
        "not UTF-8",
        "deep",
        "long number",
        "NaN",
        "same key twice",
        "object of several lines",
    ):
        content, expected = ODD[name]
        assert reasons(write(tmp_path / "x.jsonl", content)) == expected, name
        assert reasons(write(tmp_path / "x.jsonl.gz", gzip.compress(content))) == expected, name


def test_an_enormous_line_or_value_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(json_values, "LONGEST", 1000)
    monkeypatch.setattr(json_values, "_CHUNK", 100)
    monkeypatch.setattr("hlat.data.readers.LONGEST", 1000)
    monkeypatch.setattr(sources_module, "UNIT_BYTES_MIN", 400)
    records = [{"text": "a"}, {"text": "b" * 3000}, {"text": "c"}]
    lines = "\n".join(map(json.dumps, records)).encode()
    for name in ("x.jsonl", "x.json"):
        assert reasons(write(tmp_path / name, lines)) == ["a", "too long", "c"]
    assert reasons(write(tmp_path / "y.jsonl.gz", gzip.compress(lines))) == ["a", "too long", "c"]
    assert reasons(write(tmp_path / "y.json", json.dumps(records).encode())) == ["a", "too long"]
    assert reasons(write(tmp_path / "y.txt.gz", gzip.compress(b"x" * 1001))) == ["too long"]
    assert texts(write(tmp_path / "y.txt", b"x" * 3000)) == ["x" * 3000]


JSON = st.recursive(
    st.sampled_from([None, True, -12, 3.5e-7]) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@given(st.lists(JSON, max_size=3), st.integers(1, 40), st.sampled_from([None, 0, 3]), st.booleans())
@settings(max_examples=30, deadline=None)
def test_an_array_is_its_elements_however_it_is_cut(values, chunk, indent, ascii_only):
    content = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode("utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "_CHUNK", chunk)
        patch.setattr(json_values, "_PEEK", chunk)
        found = list(values_of(io.BytesIO(content), "json"))
    assert [value for _, value, _, _ in found] == json.loads(content)
    assert not any(reason for _, _, reason, _ in found)


def test_a_large_array_is_not_held_in_memory(tmp_path):
    import tracemalloc

    record = json.dumps({"text": "x" * 1000}).encode()
    path = write(tmp_path / "x.json.gz", gzip.compress(b"[" + b",".join([record] * 8_000) + b"]", 1))
    source = resolve_source(path=path)
    tracemalloc.start()
    count = sum(
        len(found.text) for unit in units(source) for found in read_pieces(source.files, unit, "text")
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 8_000_000 and peak < 5 << 20


def test_a_field_inside_an_object():
    record = {"a": {"b": {"c": 1}, "b.c": 2}, "d.e": 3, "d": {"e": 4}, "f": "text"}
    assert [lookup(record, field) for field in ("a.b.c", "d.e", "d", "a.x", "f.x", "x", "a.")] == [
        2, 3, {"e": 4}, None, None, None, None
    ]  # fmt: skip
