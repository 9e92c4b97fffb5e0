"""Folders and files that are written before they have their name: none of a user's is touched."""

import json
import os
from pathlib import Path

import pytest

from hlat.data import lock
from hlat.data.build import build
from hlat.data.lock import locked_folder
from hlat.data.packed import MANIFEST
from hlat.data.partial import LOCK, OWNED, check_own, discard, temporary
from hlat.data.sources import resolve_source
from hlat.data.tokenizer import load_tokenizer
from hlat.data.train_tokenizer import train_bpe
from hlat.errors import UserError

TEXTS = ["one text", "another text", "and a third"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    return folder


def tokenize(corpus: Path, out: Path):
    return build([resolve_source(path=corpus)], load_tokenizer("bytes"), out, holdout=0, workers=1)


def snapshot(folder: Path) -> dict[str, bytes | str]:
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


def users_folder(at: Path) -> None:
    at.mkdir()
    (at / "mine.txt").write_text("thesis")


def link_to_a_folder(at: Path) -> None:
    users_folder(at.with_name("home"))
    at.symlink_to("home")


def link_to_an_empty_folder(at: Path) -> None:
    at.with_name("home").mkdir()
    at.symlink_to("home")


def link_to_nothing(at: Path) -> None:
    at.symlink_to("nowhere")


def a_file(at: Path) -> None:
    at.write_text("thesis")


def with_a_lock_of_its_own(at: Path) -> None:
    at.mkdir()
    (at / LOCK).write_text("my own lock")


def with_an_empty_lock(at: Path) -> None:
    users_folder(at)
    (at / LOCK).touch()


def with_a_link_for_a_lock(at: Path) -> None:
    at.mkdir()
    at.with_name("target").write_text("thesis")
    (at / LOCK).symlink_to("../target")


def with_a_job_of_another_program(at: Path) -> None:
    at.mkdir()
    (at / LOCK).touch()
    (at / "job.json").write_text('{"key": "mine"}')


FOREIGN = (
    users_folder,
    link_to_a_folder,
    link_to_an_empty_folder,
    link_to_nothing,
    a_file,
    with_a_lock_of_its_own,
    with_an_empty_lock,
    with_a_link_for_a_lock,
    with_a_job_of_another_program,
)


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize("made", FOREIGN)
def test_what_a_user_has_under_that_name_stays(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made, locks: bool
) -> None:
    if not locks:
        monkeypatch.setattr(lock, "fcntl", None)
    made(tmp_path / "out.partial")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="left as it is") as caught:
        tokenize(corpus, tmp_path / "out")
    assert "out.partial" in str(caught.value.where)
    discard(tmp_path / "out.partial")
    assert snapshot(tmp_path) == before


def test_an_empty_folder_of_that_name_will_do(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    tokenize(corpus, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("mark", [b"", OWNED])
def test_what_a_killed_build_left_is_taken_over(corpus: Path, tmp_path: Path, mark: bytes) -> None:
    """Also that of an earlier version, whose lock file was empty."""
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / LOCK).write_bytes(mark)
    job = {"key": "another", "tokenizer_identity": "x", "units": [], "sources": []}
    (partial / "job.json").write_text(json.dumps(job))
    (partial / "train-00000.bin").write_bytes(b"old")
    (partial / "tokenizer").mkdir()
    tokenize(corpus, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert not (tmp_path / "out" / LOCK).exists()


def test_a_link_in_place_of_the_folder_itself(corpus: Path, tmp_path: Path) -> None:
    users_folder(tmp_path / "home")
    (tmp_path / "out").symlink_to("nowhere")
    with pytest.raises(UserError, match="is a link"):
        tokenize(corpus, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists() and not (tmp_path / "nowhere").exists()
    tokenize(corpus, tmp_path / "real")
    (tmp_path / "alias").symlink_to("real")
    assert tokenize(corpus, tmp_path / "alias").seconds == 0  # there already


def test_a_failing_build_leaves_what_others_put_there(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link inside a folder of ours is removed as a link."""
    users_folder(tmp_path / "home")
    with locked_folder(tmp_path / "out.partial") as partial:
        (partial / "link").symlink_to(tmp_path / "home")
        discard(partial)
    assert not (tmp_path / "out.partial").exists() and (tmp_path / "home/mine.txt").read_text() == "thesis"


def test_the_mark_is_there_while_the_folder_is_filled(tmp_path: Path) -> None:
    with locked_folder(tmp_path / "x.partial") as partial:
        (partial / "something").touch()
        assert (partial / LOCK).read_bytes() == OWNED
        check_own(partial)
    with locked_folder(tmp_path / "x.partial") as partial:
        assert (partial / "something").exists()


def test_temporary_names_are_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in two containers
    names = {temporary(tmp_path / "a") for _ in range(20)}
    assert len(names) == 20 and all(path.parent == tmp_path for path in names)


def test_a_trained_tokenizer_replaces_nothing(tmp_path: Path) -> None:
    from hlat.cli import main

    (tmp_path / "in.txt").write_text("some text " * 50)
    out = tmp_path / "t"
    out.mkdir()
    (out / "tokenizer_config.json").write_text("mine")
    command = ["data", "train-tokenizer", str(tmp_path / "in.txt"), "--vocab", "300", "--out", str(out)]
    assert main([*command, "--holdout", "0"]) == 2
    assert (out / "tokenizer_config.json").read_text() == "mine" and len(list(out.iterdir())) == 1
    (out / "tokenizer_config.json").unlink()
    link = out / "tokenizer.json.1.tmp"
    link.symlink_to(tmp_path / "in.txt")
    train_bpe(iter(["some text " * 50]), 300, out)
    assert (tmp_path / "in.txt").read_text().startswith("some text") and link.is_symlink()


def test_finished_folders_hold_no_mark(corpus: Path, tmp_path: Path) -> None:
    tokenize(corpus, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    shard = {f"train-00000.{kind}" for kind in ("bin", "docs", "from")}
    assert names == {MANIFEST, "tokenizer", "origins.json", *shard}
