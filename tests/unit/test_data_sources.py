"""Documents out of folders, jsonl, parquet, arrow, data sets and the standard library."""

import gzip
import json
import logging
import os
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hlat.data import sources as sources_module
from hlat.data.readers import read_pieces
from hlat.data.sources import identity, resolve_source, tokenized_folder, units
from hlat.errors import UserError


def read(source):
    return [
        document for unit in units(source) for document in read_pieces(source.files, unit, source.text_field)
    ]


def texts(source):
    return [document.text for document in read(source) if document.text is not None]


def write_jsonl(path, values, field="text"):
    path.write_text("".join(json.dumps({field: value}) + "\n" for value in values), encoding="utf-8")


def test_folder_is_read_sorted_and_recursively_whatever_the_extension(tmp_path):
    for name, content in {"b.txt": "B", "a/z.md": "Z", "a/y.unknown": "Y", "c": "C\r\n"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content.encode())
    assert texts(resolve_source(path=tmp_path)) == ["Y", "Z", "B", "C\r\n"]


def test_what_is_not_text_is_counted_with_its_reason(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "binary.bin").write_bytes(b"ab\0c")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / ".hidden").write_text("x")
    (tmp_path / ".git").mkdir()
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    source = resolve_source(path=tmp_path)
    reasons = {d.name: d.reason for d in read(source) if d.text is None}
    assert reasons == {"latin.txt": "not UTF-8", "binary.bin": "binary (holds NUL bytes)"}
    assert source.skipped == {
        "empty file": 1,
        "hidden file": 1,
        "hidden or cache folder": 1,
        "link to a folder": 1,
    }
    assert texts(source) == ["good"]


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30), max_size=20),
    st.integers(1, 64),
)
@settings(max_examples=60, deadline=None)
def test_jsonl_cut_anywhere_gives_every_line_once(tmp_path_factory, values, size):
    path = tmp_path_factory.mktemp("jsonl") / "x.jsonl"
    write_jsonl(path, ["first", *values])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources_module, "UNIT_BYTES_MIN", size)
        source = resolve_source(path=path)
        assert len(units(source)) >= 1
        assert texts(source) == ["first", *values]


def test_jsonl_problems_are_counted_not_dropped_silently(tmp_path):
    lines = [
        '{"text": "ok"}',
        "not json",
        '{"other": 1}',
        '{"text": ""}',
        "[1]",
        r'{"text": "\ud800"}',
        "",
        '{"text": "end"}',
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    documents = read(resolve_source(path=tmp_path / "x.jsonl"))
    assert [d.text for d in documents] == ["ok", None, None, None, None, None, "end"]
    assert [d.reason for d in documents if d.text is None] == [
        "not JSON",
        "no text under 'text'",
        "empty",
        "not a JSON object",
        "not Unicode text (lone surrogate)",
    ]


def test_gzipped_jsonl_and_text_field(tmp_path):
    with gzip.open(tmp_path / "x.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write('{"body": "ü"}\n{"body": "b"}\n')
    assert texts(resolve_source(path=tmp_path / "x.jsonl.gz", text_field="body")) == ["ü", "b"]
    damaged = tmp_path / "y.jsonl.gz"
    damaged.write_bytes((tmp_path / "x.jsonl.gz").read_bytes()[:-6])
    with pytest.raises(UserError, match=r"y\.jsonl\.gz: cannot be read"):
        read(resolve_source(path=damaged, text_field="body"))


def test_parquet_and_both_arrow_forms(tmp_path, monkeypatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    values = [f"document {i} ü" for i in range(2500)]
    table = pyarrow.table({"n": list(range(2500)), "content": values})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    with (
        pyarrow.OSFile(str(tmp_path / "b.arrow"), "wb") as sink,
        pyarrow.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=600)
    with (
        pyarrow.OSFile(str(tmp_path / "c.arrow"), "wb") as sink,
        pyarrow.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    monkeypatch.setattr(sources_module, "UNIT_BYTES_MIN", 20_000)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        source = resolve_source(path=tmp_path / name, text_field="content")
        assert len(units(source)) > 1
        assert texts(source) == values, name
        message = (
            r"no column 'text'; the columns are: n \(int64\), content \(string\); "
            "set text_field to one of: content"
        )
        with pytest.raises(UserError, match=message):
            read(resolve_source(path=tmp_path / name))
    (tmp_path / "bad.parquet").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"bad\.parquet: not a readable parquet file"):
        units(resolve_source(path=tmp_path / "bad.parquet"))
    (tmp_path / "bad.arrow").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"bad\.arrow: not a readable arrow file"):
        units(resolve_source(path=tmp_path / "bad.arrow"))


def test_missing_extra_names_the_install_line(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install 'hlat\[data\]'"):
        units(resolve_source(path=tmp_path / "a.parquet"))


def test_saved_data_set_and_local_hugging_face_data_set(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(saved)
    source = resolve_source(path=saved)
    assert texts(source) == ["one", "two"]
    assert source.skipped == {"description of a saved data set": 2}
    arrow = next(saved.glob("*.arrow"))
    loaded = datasets.Dataset.from_file(str(arrow))
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k)) or loaded)
    assert texts(resolve_source(dataset="some/name:config@test")) == ["one", "two"]
    assert calls == [(("some/name", "config"), {"split": "test"})]
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(UserError, match="several splits"):
        resolve_source(path=tmp_path / "dict")


def test_standard_library_is_real_text_without_tests_and_packages():
    source = resolve_source(dataset="python-stdlib")
    names = [file.name for file in source.files]
    assert names == sorted(names) and {"argparse.py", "json/decoder.py"} <= set(names)
    assert source.size > 5_000_000
    parts = {part for name in names for part in name.split("/")[:-1]}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "absent", "no such file or folder"),
        (lambda p: p, "no text in"),
        (lambda p: (p / "e.txt").touch() or p / "e.txt", "no text in .*1 empty file"),
    ],
)
def test_missing_and_empty_sources_are_one_line(tmp_path, make, message):
    with pytest.raises(UserError, match=message) as caught:
        resolve_source(path=make(tmp_path), where="data.sources[0]")
    assert caught.value.line().startswith("data.sources[0]: ") and "\n" not in caught.value.line()


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("python-stdlb", "did you mean 'python-stdlib'?"),
        ("Python_stdlib", "did you mean 'python-stdlib'?"),
        ("stdlib", "did you mean 'python-stdlib'?"),
        ("stdlib-package@train", "did you mean 'stdlib-packages'?"),
        ("stdlib-packages", "write data.examples: {dataset: stdlib-packages}"),
    ],
)
def test_a_name_near_a_built_in_one_asks_no_hub(monkeypatch, name, fix):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError) as caught:
        resolve_source(dataset=name, where="data.sources[0]")
    assert caught.value.fix == fix


def test_a_hub_that_does_not_answer_is_told_once(monkeypatch, caplog):
    asked = []

    def load(name, *rest, **options):
        asked.append(name)
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s")
        raise ConnectionError("no answer\nfrom the hub")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    names = ["openai/gsm8k", "python/stdlib", "squad", "glue:mrpc", "imdb", "wikitext", "the_pile"]
    for name in names:
        with pytest.raises(UserError, match=r"cannot be loaded \(no answer\); check name.*reaches the hub"):
            resolve_source(dataset=name)
    assert asked == [name.partition(":")[0] for name in names] and caplog.text == ""


def test_a_source_needs_one_place():
    for arguments in ({}, {"path": "a", "dataset": "b"}):
        with pytest.raises(UserError, match="exactly one"):
            resolve_source(**arguments)


def test_identity_follows_content_and_order_not_names_and_places(tmp_path):
    def make(root, *contents, names="abc"):
        (tmp_path / root).mkdir()
        for name, content in zip(names, contents, strict=False):
            (tmp_path / root / f"{name}.txt").write_text(content)
        return identity(resolve_source(path=tmp_path / root))

    first = make("one", "same", "more")
    assert make("moved", "same", "more") == first == make("renamed", "same", "more", names="xyz")
    assert make("other", "same", "mare") != first
    assert make("order", "more", "same") != first
    assert make("joined", "samemore") != first
    assert identity(resolve_source(path=tmp_path / "one", text_field="other")) != first
    lines = tmp_path / "one" / "a.jsonl"  # the same bytes are read another way
    (tmp_path / "one" / "a.txt").rename(lines)
    assert identity(resolve_source(path=lines)) != identity(resolve_source(path=tmp_path / "other" / "a.txt"))


def test_times_do_not_make_other_content(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("same")
    stamp, first = path.stat().st_mtime_ns, identity(resolve_source(path=path))
    os.utime(path, ns=(1, 1))
    assert identity(resolve_source(path=path)) == first
    path.write_text("diff")
    os.utime(path, ns=(stamp, stamp))
    assert identity(resolve_source(path=path)) != first


OURS = '{"format": "hlat-tokens", "version": 1}'


@pytest.mark.parametrize(
    ("manifest", "beside", "ours"),
    [
        (OURS, None, True),
        (OURS[:-4], "train-00000.docs", True),
        ("", "holdout-00003.docs", True),
        ("{}", None, False),
        ('{"files": ["a.txt"]}', "train-00000.docs", False),
        ("[1]", None, False),
        ("not JSON", "a.txt", False),
        ("[" * 100_000, None, False),
    ],
)
def test_a_manifest_is_ours_when_it_says_so(tmp_path, manifest, beside, ours):
    assert tokenized_folder(tmp_path) is None and tokenized_folder(None) is None
    (tmp_path / "manifest.json").write_text(manifest)
    if beside:
        (tmp_path / beside).write_text("x")
    assert tokenized_folder(str(tmp_path)) == (tmp_path if ours else None)
