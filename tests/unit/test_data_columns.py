"""Columns of parquet and arrow files: types of text, fields of structs, damage, columns nobody asked for."""

import io
import json
import subprocess
import sys

import pytest

from hlat.data.readers import read_pieces
from hlat.data.records import Records
from hlat.data.sources import resolve_source, units
from hlat.errors import UserError

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

WORDS = ["one", None, "zwei ü", "", "one"]
READ = ["one", "no text under 'text'", "zwei ü", "empty", "one"]
FORMS = ("parquet", "file", "stream", "feather")


def content(table, form):
    sink = io.BytesIO()
    if form == "parquet":
        parquet.write_table(table, sink, row_group_size=2)
        return sink.getvalue()
    compression = "lz4" if form == "feather" else None
    make = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
    with make(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


def write(folder, columns, form, name="x"):
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    suffix = {"file": "arrow", "stream": "arrow"}.get(form, form)
    path = folder / f"{name}-{form}.{suffix}"
    path.write_bytes(content(table, form))
    return path


def found(path, text_field="text"):
    source = resolve_source(path=path, text_field=text_field)
    documents = [d for unit in units(source) for d in read_pieces(source.files, unit, text_field)]
    return [document.reason if document.text is None else document.text for document in documents]


def spoilt(*rows, kind=None):
    """A column of text in which a row is not UTF-8, which Arrow does not notice."""
    binary = pa.array([row.encode("latin-1") if row is not None else None for row in rows], pa.binary())
    return binary.view(pa.string()) if kind is None else kind(binary)


def dictionary(binary):
    encoded = binary.dictionary_encode()
    return pa.DictionaryArray.from_arrays(encoded.indices, encoded.dictionary.view(pa.string()))


TYPES = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "binary_view": pa.binary_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "dictionary of binary": pa.dictionary(pa.int8(), pa.large_binary()),
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("form", FORMS)
def test_every_type_of_text_is_read(tmp_path, form, kind):
    words = pa.array([None if word is None else word.encode() for word in WORDS], pa.binary())
    typed = words.cast(pa.string()) if "binary" not in kind else words
    typed = typed.dictionary_encode().cast(TYPES[kind]) if "dictionary" in kind else typed.cast(TYPES[kind])
    path = write(tmp_path, {"n": range(5), "text": typed}, form)
    if form == "parquet":
        assert parquet.read_table(path)["text"].cast(pa.binary()).to_pylist() == words.to_pylist()
    assert found(path) == READ
    record = {"n": 0, "text": "one"}
    assert next(Records(str(path), None, "data.examples").read(["text", "n"])).values == record


def test_fixed_binary_is_text_too(tmp_path):
    path = write(tmp_path, {"text": pa.array([b"ab", b"\xff\xff", None], pa.binary(2))}, "parquet")
    assert found(path) == ["ab", "not UTF-8", "no text under 'text'"]


@pytest.mark.slow
def test_the_same_rows_as_datasets_and_pandas(tmp_path):
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    texts = [f"document {n} ü" for n in range(7)]
    path = write(tmp_path, {"text": texts, "n": range(7)}, "parquet")
    loaded = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert found(path) == list(loaded["text"]) == pandas.read_parquet(path)["text"].tolist() == texts


@pytest.mark.parametrize("form", FORMS)
def test_a_field_of_a_struct(tmp_path, form):
    rows = [{"b": "one", "c.d": "x", "e": {"f": "y"}}, None, {"b": None, "c.d": "z", "e": None}]
    path = write(tmp_path, {"n": [1, 2, 3], "a": pa.array(rows)}, form)
    missing = "no text under '{}'".format
    assert found(path, "a.b") == ["one", missing("a.b"), missing("a.b")]
    assert found(path, "a.c.d") == ["x", missing("a.c.d"), "z"]
    assert found(path, "a.e.f") == ["y", missing("a.e.f"), missing("a.e.f")]
    lines = tmp_path / "x.jsonl"
    lines.write_text("\n".join(json.dumps({"a": row}) for row in rows))
    for field in ("a.b", "a.c.d", "a.e.f"):
        assert found(lines, field) == found(path, field)
    both = {"a.b": ["column"], "a": pa.array([{"b": "field"}])}
    assert found(write(tmp_path, both, form, "both"), "a.b") == ["column"]
    lines.write_text(json.dumps({"a.b": "column", "a": {"b": "field"}}))
    assert found(lines, "a.b") == ["column"]


@pytest.mark.parametrize("form", ["parquet", "stream"])
@pytest.mark.parametrize(
    ("field", "what"),
    [
        ("l", r"column 'l' holds list<.*string>, not text"),
        ("m", r"column 'm' holds map<string, string.*>, not text"),
        ("n", "column 'n' holds int64, not text"),
        ("s", r"column 's' holds struct<b: string, c: .*>, not text"),
        ("s.c", r"column 's.c' holds list<.*>, not text"),
        ("s.x", "no column 's.x'"),
        ("n.x", "no column 'n.x'"),
        ("x", "no column 'x'"),
        ("z", "column 'z' holds null, not text"),
    ],
)
def test_what_holds_no_text_is_refused_by_name(tmp_path, form, field, what):
    columns = {
        "text": ["a"],
        "l": [["a", "b"]],
        "m": pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string())),
        "n": [1],
        "s": pa.array([{"b": "x", "c": ["y"]}]),
        "z": pa.nulls(1),
    }
    with pytest.raises(UserError, match=what) as caught:
        found(write(tmp_path, columns, form), field)
    assert caught.value.fix == "set text_field to one of: text, s.b"
    assert "n (int64)" in caught.value.what and str(tmp_path) in caught.value.where
    with pytest.raises(
        UserError, match=r"no column 'text'; the columns are: n \(int64\); no column holds text"
    ):
        found(write(tmp_path, {"n": [1]}, form, "none"))


@pytest.mark.parametrize("form", ["parquet", "stream", "file"])
@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "dictionary", "struct"])
def test_rows_that_are_not_utf8_are_counted(tmp_path, form, kind):
    makers = {
        "string": None,
        "large_string": lambda binary: binary.cast(pa.large_binary()).view(pa.large_string()),
        "string_view": lambda binary: binary.cast(pa.binary_view()).view(pa.string_view()),
        "binary": lambda binary: binary,
        "dictionary": dictionary,
        "struct": lambda binary: pa.StructArray.from_arrays([binary.view(pa.string())], ["b"]),
    }
    words = ["one", "caf\xe9", None, "two"]
    column = spoilt(*words, kind=makers[kind])
    field = "text.b" if kind == "struct" else "text"
    path = write(tmp_path, {"n": range(4), "text": column}, form)
    assert found(path, field) == ["one", "not UTF-8", f"no text under '{field}'", "two"]
    if kind == "struct":
        return
    records = list(Records(str(path), None, "data.examples").read(["text"]))
    assert [(record.values, record.reason) for record in records] == [
        ({"text": "one"}, ""), (None, "'text' is not UTF-8"), ({"text": None}, ""), ({"text": "two"}, ""),
    ]  # fmt: skip
    others = [record.values for record in Records(str(path), None, "w").read(["n"])]
    assert others == [{"n": n} for n in range(4)]
    assert len([record for record in Records(str(path), None, "w").read() if record.values]) == 4


@pytest.mark.parametrize("form", ["parquet", "stream"])
def test_lists_of_messages_that_are_not_utf8_leave_one_record_out(tmp_path, form):
    inner = pa.StructArray.from_arrays([spoilt("hi", "caf\xe9", "yo")], ["content"])
    column = pa.ListArray.from_arrays([0, 1, 2, 3], inner)
    records = list(Records(str(write(tmp_path, {"messages": column}, form)), None, "w").read(["messages"]))
    said = [record.values and record.values["messages"][0]["content"] for record in records]
    assert said == ["hi", None, "yo"] and records[1].reason == "'messages' is not UTF-8"


@pytest.mark.parametrize("form", ["parquet", "stream", "file"])
def test_columns_nobody_asks_for_are_not_converted(tmp_path, form):
    late = pa.array([2**62, 0, 1], pa.timestamp("us"))
    zoned = pa.array([0, 0, 0], pa.timestamp("us", "No/Where"))
    path = write(tmp_path, {"late": late, "prompt": ["a", "b", "c"], "zone": zoned}, form)
    wanted = list(Records(str(path), None, "w").read(["prompt"]))
    assert [record.values for record in wanted] == [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
    assert wanted[0].fields == ("late", "prompt", "zone")
    whole = [record.values for record in Records(str(path), None, "w").read()]
    assert [row["prompt"] for row in whole] == ["a", "b", "c"]
    assert whole[0]["late"] is None and whole[1]["late"].year == 1970 and whole[2]["zone"] is None
    asked = list(Records(str(path), None, "w").read(["prompt", "late"]))
    assert asked[0].values is None and asked[0].reason.startswith("'late' cannot be read")
    assert [record.values["prompt"] for record in asked[1:]] == ["b", "c"]
    absent = list(Records(str(path), None, "w").read(["other"]))
    assert len(absent) == 3 and absent[0].values == {} and absent[0].fields == wanted[0].fields


@pytest.mark.parametrize("form", FORMS)
def test_column_names_that_are_not_utf8(tmp_path, form):
    table = pa.table({"text": ["a", "b"], "xqqx": [1, 2]})
    sink = io.BytesIO()
    if form == "parquet":
        parquet.write_table(table, sink, store_schema=False)
    raw = (sink.getvalue() or content(table, form)).replace(b"xqqx", b"x\xe9\xe9x")
    path = tmp_path / f"x.{'parquet' if form == 'parquet' else 'arrow'}"
    path.write_bytes(raw)
    if form == "parquet":
        with pytest.raises(UserError, match=r"x\.parquet: the name of a column is not UTF-8; rename"):
            found(path)
        return
    assert found(path) == ["a", "b"]
    assert [record.values for record in Records(str(path), None, "w").read()] == [
        {"text": "a"},
        {"text": "b"},
    ]
    with pytest.raises(UserError, match=r"the columns are: text \(string\), \(not UTF-8\) \(int64\)"):
        found(path, "other")


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array([1])], ["text", "text", "n"])
    path = write(tmp_path, table, "stream")
    with pytest.raises(UserError, match="there are 2 columns 'text'; rename all but one"):
        found(path)
    assert next(Records(str(path), None, "w").read(["n"])).values == {"n": 1}


def test_damaged_files_are_one_line_or_counted_and_never_a_crash(tmp_path):
    """In a process of its own: what points outside a buffer would end it, not raise."""
    script = f"""
import random
from pathlib import Path
from hlat.data.readers import read_pieces
from hlat.data.records import Records
from hlat.data.sources import resolve_source, units
from hlat.errors import UserError
outcomes = set()
for path in sorted(Path({str(tmp_path)!r}).glob("x*")):
    whole = path.read_bytes()
    for seed in range(30):
        rng, damaged = random.Random(seed), bytearray(whole)
        for _ in range(3):
            damaged[rng.randrange(8, len(damaged))] = rng.randrange(256)
        path.write_bytes(bytes(damaged if seed % 5 else damaged[: rng.randrange(9, len(damaged))]))
        for field in ("text", "d", "v", "s.b"):
            try:
                source = resolve_source(path=path, text_field=field)
                for unit in units(source):
                    for document in read_pieces(source.files, unit, field):
                        assert (document.text is None) == bool(document.reason)
                        outcomes.add(bool(document.reason))
            except UserError as error:
                outcomes.add("refused")
        try:
            for record in Records(str(path), None, "w").read():
                assert record.values is not None
        except UserError:
            pass
print(len(outcomes))
"""
    columns = {
        "text": ["abc", None, "de", "f" * 40],
        "d": pa.array(["u", "v", "u", None]).dictionary_encode(),
        "v": pa.array(["u", "v" * 30, None, "x"], pa.string_view()),
        "s": pa.array([{"b": "x"}, None, {"b": "y"}, {"b": None}]),
        "l": [["a"], [], None, ["b", "c"]],
    }
    for form in FORMS:
        write(tmp_path, columns, form)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")
