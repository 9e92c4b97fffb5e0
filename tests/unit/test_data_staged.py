"""Tokenized folders in a store: fetched once, verified, shared, and the same run as from the disk."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from hlat.cli import main
from hlat.data import staged as module
from hlat.data.staged import staged
from hlat.errors import StorageFailed, UserError
from hlat.storage.remote import Remote, StoreError

RECIPE = """
run: {name: small, steps: 3, seed: 3}
model: {layers: 1, hidden: 16, heads: 2, kv_heads: 2, ffn: 32, vocab: 320, max_seq_len: 32}
data: {sources: [{path: tokens}], tokenizer: tokens, micro_batch: 2, global_batch: 2, holdout: 0.2}
compile: false
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tokenized folder, here as `tokens` and at file://…/store/tokens; short pauses."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "PAUSE", 0.01)
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number:02}.txt").write_text(f"the words of document {number} " * 12)
    command = [
        "data",
        "tokenize",
        "text",
        "--tokenizer",
        "train:bpe-300",
        "--holdout",
        "0.2",
        "--out",
        "tokens",
    ]
    assert main(command) == 0
    shutil.copytree("tokens", "store/tokens")
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path


def url(place: Path) -> str:
    return f"file://{place}/store/tokens"


def shard(folder: Path) -> Path:
    return next(file for file in sorted(folder.iterdir()) if file.suffix == ".bin")


def losses(folder: str) -> list[float]:
    rows = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["kind"] == "train"]


def test_a_run_from_a_store_equals_the_run_from_the_disk(place: Path) -> None:
    assert main(["train", "small.yaml", "run.dir=a"]) == 0
    there = [f"data.sources=[{{path: '{url(place)}'}}]", f"data.tokenizer={url(place)}"]
    assert main(["train", "small.yaml", "run.dir=b", *there]) == 0
    assert losses("a") == losses("b")
    (copy,) = (place / "cache" / "hlat" / "staged").iterdir()
    for file in (place / "tokens").rglob("*"):
        assert file.is_dir() or (copy / file.relative_to(place / "tokens")).read_bytes() == file.read_bytes()
    shard(place / "store" / "tokens").unlink()
    assert main(["train", "small.yaml", "run.dir=c", *there]) == 0, "what is here is not fetched again"


def test_many_processes_fetch_it_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    download = Remote.download

    def counted(self: Remote, path: str, file: Path) -> None:
        fetched.append(path)
        download(self, path, file)

    monkeypatch.setattr(Remote, "download", counted)
    threads = [threading.Thread(target=staged, args=(url(place), "x", True)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched and len(fetched) == len(set(fetched))


def test_a_fetch_that_was_cut_off_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    download, fetched = Remote.download, []

    def dying(self: Remote, path: str, file: Path) -> None:
        if len(fetched) >= 2:
            raise KeyboardInterrupt
        fetched.append(path)
        download(self, path, file)

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "download", dying)
        with pytest.raises(KeyboardInterrupt):
            staged(url(place), quiet=True)
    (partial,) = (place / "cache" / "hlat" / "staged").iterdir()
    whole = [name for name in fetched if name in os.listdir(partial)]
    assert whole, "something came through"

    def counted(self: Remote, path: str, file: Path) -> None:
        assert path not in whole
        download(self, path, file)

    monkeypatch.setattr(Remote, "download", counted)
    assert (staged(url(place), quiet=True) / "manifest.json").is_file()


@pytest.mark.parametrize("how", ["flip", "gone", "no manifest", "manifest", "away", "no room"])
def test_trouble_is_one_line(place: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    folder, kind, words = place / "store" / "tokens", UserError, ""
    if how == "flip":
        data = bytearray(shard(folder).read_bytes())
        data[3] ^= 1
        shard(folder).write_bytes(data)
        words = "does not match its sha256"
    elif how == "gone":
        shard(folder).unlink()
        words = "1 files are missing"
    elif how == "no manifest":
        (folder / "manifest.json").unlink()
        words = "there is no manifest.json"
    elif how == "manifest":
        (folder / "manifest.json").write_text("{}")
        words = "not a manifest of tokens"
    elif how == "away":

        def away(*args: Any) -> None:
            raise StoreError("no answer")

        monkeypatch.setattr(Remote, "read", away)
        kind, words = StorageFailed, "the store did not answer"
    else:
        usage = shutil.disk_usage(place)._replace(free=10)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        words = "0.0 GB are free"
    with pytest.raises(kind, match=words):
        staged(url(place), quiet=True)
    assert not list((place / "cache" / "hlat").glob("staged/*/manifest.json"))


def test_a_url_with_a_login_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "small.yaml", "data.sources=[{path: 's3://me:pw@bucket/x'}]"]) == 2
    error = capsys.readouterr().err
    assert "data.sources" in error and "login" in error and "pw@" not in error
