"""Data sets of the library `datasets`, by name and in folders: the same rows as the library itself gives."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hlat.data import sources as sources_module
from hlat.data.hub import parts_of
from hlat.data.readers import read_pieces
from hlat.data.records import read_records
from hlat.data.sources import identity, resolve_source, units
from hlat.errors import UserError

datasets = pytest.importorskip("datasets")
TRAIN, TEST = 100, 37


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder of jsonl with two splits, of which one is in two files; and the library's own cache."""
    folder = tmp_path_factory.mktemp("set")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("hlat")))
        datasets.disable_progress_bars()
        for name, first, last in (("train-0", 0, 60), ("train-1", 60, TRAIN), ("test", 0, TEST)):
            lines = (json.dumps({"text": f"{name[:5]} {n}", "n": n}) for n in range(first, last))
            (folder / f"{name}.jsonl").write_text("\n".join(lines))
        yield folder
        datasets.enable_progress_bars()


def documents(source: Any) -> list[str | None]:
    return [d.text for unit in units(source) for d in read_pieces(source.files, unit, source.text_field)]


def bounds(rows: int) -> st.SearchStrategy[str]:
    absolute = st.integers(-rows, rows).map(str)
    return st.one_of(st.just(""), absolute)


@st.composite
def slices(draw: st.DrawFn) -> str:
    name, rows = draw(st.sampled_from([("train", TRAIN), ("test", TEST)]))
    if draw(st.booleans()):
        sides = sorted(draw(st.tuples(st.integers(0, 100), st.integers(0, 100))))
        rounding = draw(st.sampled_from(["", "(pct1_dropremainder)", "(closest)"]))
        below = draw(st.sampled_from([f"{sides[0]}%:{sides[1]}%", f":{sides[1]}%", f"-{sides[1]}%:"]))
        return f"{name}[{below}]{rounding}"
    form = draw(st.sampled_from(["{}", "{}[{}:{}]", "{}[{}:]", "{}[:{}]"]))
    return form.format(name, draw(bounds(rows)), draw(bounds(rows)))


@pytest.mark.slow
@given(st.lists(slices(), min_size=1, max_size=3).map("+".join), st.sampled_from([64, 2**20]))
@settings(max_examples=40, deadline=None)
def test_any_slice(place: Path, split: str, unit: int) -> None:
    same_rows(place, split, unit)


@pytest.mark.parametrize(
    ("split", "unit"),
    [
        ("train[:10]+test[5:8]", 64),
        ("train[33%:66%](pct1_dropremainder)", 64),
        ("train[-5:]+train[-7:-2]", 2**20),
        ("test[10%:20%]+test", 64),
        ("train[55:65]", 64),
        ("test[:0]", 64),
        ("train[:101]", 64),
    ],
)
def test_slices_are_what_the_library_gives(place: Path, split: str, unit: int) -> None:
    same_rows(place, split, unit)


def same_rows(place: Path, split: str, unit: int) -> None:
    """By `datasets` itself, as documents in units of so many bytes, and as records."""
    try:
        expected = list(datasets.load_dataset(str(place), split=split)["text"])
    except Exception:
        with pytest.raises(UserError, match="cannot be loaded"):
            resolve_source(dataset=f"{place}@{split}")
        return
    if not expected:
        with pytest.raises(UserError, match="no text in"):
            resolve_source(dataset=f"{place}@{split}")
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources_module, "UNIT_BYTES_MIN", unit)
        assert documents(resolve_source(dataset=f"{place}@{split}")) == expected
    records = [record.values for record in read_records(None, f"{place}@{split}", "here")]
    assert [values and values["text"] for values in records] == expected


def test_rows_enter_the_identity(place: Path) -> None:
    splits = ["train", "train[:10]", "train[1:11]", "train[:10]+train[10:20]", "train[10:20]+train[:10]"]
    found = [identity(resolve_source(dataset=f"{place}@{split}")) for split in splits]
    assert len(set(found)) == len(splits)
    assert identity(resolve_source(dataset=f"{place}@train[:10%]")) == found[1]


def test_sizes_are_those_of_the_rows(place: Path) -> None:
    whole, part = (resolve_source(dataset=f"{place}@{split}").size for split in ("train", "train[:10%]"))
    assert part == whole // 10


def test_nothing_is_kept_in_memory_and_no_script_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 10**9)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_TRUST_REMOTE_CODE", True, raising=False)
    seen, load = [], datasets.load_dataset

    def watched(*names: Any, **options: Any) -> Any:
        seen.append(datasets.config.HF_DATASETS_TRUST_REMOTE_CODE)
        return load(*names, **options)

    monkeypatch.setattr(datasets, "load_dataset", watched)
    assert len(documents(resolve_source(dataset=f"{place}@test"))) == TEST
    assert seen == [False] and datasets.config.HF_DATASETS_TRUST_REMOTE_CODE is True
    assert datasets.config.IN_MEMORY_MAX_SIZE == 10**9


def test_a_folder_with_a_script_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        resolve_source(dataset=str(tmp_path / "set"))
    assert "\n" not in caught.value.line() and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["DatasetDict", "IterableDataset", "shuffled", "mapped"])
def test_what_is_no_table_of_rows_in_files_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    loaded = datasets.load_dataset(str(place), split="train")
    made = {
        "DatasetDict": lambda: datasets.DatasetDict({"train": loaded}),
        "IterableDataset": loaded.to_iterable_dataset,
        "shuffled": lambda: loaded.shuffle(seed=1),
        "mapped": lambda: loaded.cast_column("n", datasets.Value("string")),
    }[kind]()
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: made)
    if kind == "mapped":  # written to a file of its own
        assert [r.values and r.values["n"] for r in read_records(None, "x", "here")][:3] == ["0", "1", "2"]
        return
    with pytest.raises(UserError, match=f"is a {kind}|do not lie in files as they are"):
        resolve_source(dataset="some/name")


def test_names_with_signs_in_them(tmp_path: Path) -> None:
    folder = tmp_path / "me@host" / "a:b"
    folder.mkdir(parents=True)
    assert parts_of(str(folder)) == (str(folder), None, "train")
    assert parts_of(f"{folder}@test[:5]") == (str(folder), None, "test[:5]")
    assert parts_of(f"{folder}:config@test") == (str(folder), "config", "test")
    assert parts_of("owner/name:config") == ("owner/name", "config", "train")
    assert parts_of("owner/name@train[:10]+test") == ("owner/name", None, "train[:10]+test")


def save(tmp_path: Path, **options: Any) -> Any:
    made = datasets.Dataset.from_dict({"text": [f"document {n}" for n in range(50)]})
    made.save_to_disk(tmp_path / "saved", **options)
    return tmp_path / "saved"


def add_stray_files(folder: Path) -> None:
    shutil.copy(next(folder.glob("data-*.arrow")), folder / "cache-1234.arrow")
    shutil.copy(next(folder.glob("data-*.arrow")), folder / "aaa.arrow")
    (folder / "notes.txt").write_text("not a row")
    (folder / "sub").mkdir()
    (folder / "sub" / "more.txt").write_text("not a row")


def another_order(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"].reverse()
    (folder / "state.json").write_text(json.dumps(state))


def fewer_files(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"] = [*state["_data_files"][1:], state["_data_files"][1]]
    (folder / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize("change", [lambda folder: None, add_stray_files, another_order, fewer_files])
def test_a_saved_folder_is_what_the_library_loads(tmp_path: Path, change: Any) -> None:
    folder = save(tmp_path, num_shards=3)
    change(folder)
    expected = list(datasets.load_from_disk(str(folder))["text"])
    assert documents(resolve_source(path=folder)) == expected
    assert [r.values and r.values["text"] for r in read_records(str(folder), None, "here")] == expected
    (tmp_path / "a.txt").write_text("before")
    (tmp_path / "z.txt").write_text("after")
    assert documents(resolve_source(path=tmp_path)) == ["before", *expected, "after"]


def test_what_is_not_part_of_a_saved_folder_is_counted(tmp_path: Path) -> None:
    folder = save(tmp_path)
    add_stray_files(folder)
    skipped = resolve_source(path=folder).skipped
    assert skipped == {"description of a saved data set": 2, "not part of the saved data set": 4}


def test_selected_rows_are_saved_alone(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"text": [f"document {n}" for n in range(50)]})
    made.select([7, 3, 3, 49]).save_to_disk(tmp_path / "saved")
    expected = ["document 7", "document 3", "document 3", "document 49"]
    assert documents(resolve_source(path=tmp_path / "saved")) == expected


def lose_a_file(folder: Path) -> None:
    next(folder.glob("data-*.arrow")).unlink()


def break_state(folder: Path) -> None:
    (folder / "state.json").write_text('{"_data_files": ')


def odd_state(folder: Path) -> None:
    (folder / "state.json").write_text('{"_data_files": [3]}')


def outside(folder: Path) -> None:
    os.rename(next(folder.glob("data-*.arrow")), folder.parent / "x.arrow")
    (folder / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')


def with_indices(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text())
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (folder / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_file, "is not in it"),
        (break_state, "is not JSON"),
        (odd_state, "names no files"),
        (outside, "is not in it"),
        (with_indices, "with a list of its rows beside the files"),
    ],
)
def test_a_damaged_saved_folder_is_one_line(tmp_path: Path, damage: Any, message: str) -> None:
    folder = save(tmp_path)
    damage(folder)
    for path in (folder, tmp_path):
        with pytest.raises(UserError, match=message) as caught:
            resolve_source(path=path, where="data.sources[0]")
        assert caught.value.line().startswith("data.sources[0]: ") and "delete" not in caught.value.line()


def test_a_folder_of_splits_names_them(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"text": ["one"]})
    datasets.DatasetDict({"validation": made, "other": made}).save_to_disk(tmp_path / "in" / "dict")
    for path in (tmp_path / "in" / "dict", tmp_path / "in"):
        with pytest.raises(UserError, match="holds several splits; name one, such as .*dict/validation'"):
            resolve_source(path=path)
    assert documents(resolve_source(path=tmp_path / "in" / "dict" / "other")) == ["one"]
    with pytest.raises(UserError, match="was saved with save_to_disk; give it as path"):
        resolve_source(dataset=str(tmp_path / "in" / "dict" / "other"))


@pytest.mark.parametrize("content", ["{}", "[]", "not JSON", '{"splits": 3}', '{"step": 7}'])
def test_files_of_those_names_may_be_a_users_own(tmp_path: Path, content: str) -> None:
    for name in ("state.json", "dataset_info.json", "dataset_dict.json", "manifest.json"):
        (tmp_path / name).write_text(content)
    (tmp_path / "a.txt").write_text("text")
    assert [file.name for file in resolve_source(path=tmp_path).files] == sorted(
        ["state.json", "dataset_info.json", "dataset_dict.json", "manifest.json", "a.txt"]
    )
