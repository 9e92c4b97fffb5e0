"""Every option and recipe key that takes a path, with everything a path can be: one line, and no waiting."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hlat.cli import main
from hlat.errors import StorageFailed, UserError, names_explained
from hlat.paths import (
    existing,
    existing_file,
    existing_folder,
    expand,
    file_to_write,
    folder_to_write,
    kind_of,
    read_whole,
)

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """run: {name: mini, steps: 1}
model: {layers: 1, hidden: 16, heads: 2, ffn: 16, vocab: 300, max_seq_len: 16}
data: {sources: [{path: corpus}], seq_len: 16, micro_batch: 1, global_batch: 1}
compile: false
"""
SECONDS = 60  # for a command that waits for a pipe; one that does not takes a tenth of a second


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """A read of a pipe that never ends becomes a failure, not a test that never ends."""

    def late(*_: object) -> None:
        raise AssertionError(f"waited for {SECONDS} s")

    former = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one path of each kind in `kinds/`, and a recipe beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kinds = tmp_path / "kinds"
    (kinds / "folder").mkdir(parents=True)
    (kinds / "folder" / "binary").write_bytes(b"\0\1")
    (kinds / "file").write_text("hello\n")
    os.mkfifo(kinds / "pipe")
    (kinds / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as made:
        monkeypatch.chdir(kinds)  # a socket's name is short
        made.bind("socket")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    for number in range(4):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"text {number} " * 50)
    (tmp_path / "r.yaml").write_text(RECIPE)
    return kinds


NOWHERE = {  # no command can do anything with these
    "empty": "",
    "nul": "kinds/a\0b",
    "unknown user": "~nosuchuser/x",
    "long name": f"kinds/{'n' * 300}",
    "long path": f"kinds/{'d/' * 3000}x",
    "half a character": "kinds/\ud800",
    "loop": "kinds/loop",
    "below a loop": "kinds/loop/x",
    "below a file": "kinds/file/x",
}
NO_FILES = {"pipe": "kinds/pipe", "device": "/dev/zero", "socket": "kinds/socket"}
MISSING = {"missing": "kinds/none"}

TRAIN = ["train", "r.yaml", "run.dir=run"]
READ = {  # words, and what the line has to name; PATH is the path, TEXT its YAML
    "train RECIPE": (["train", "PATH"], ""),
    "supervise RECIPE": (["supervise", "PATH"], ""),
    "launch RECIPE": (["launch", "torchrun", "PATH", "--nodes", "1", "--nproc-per-node", "1"], ""),
    "sweep RECIPE": (["sweep", "PATH", "optim.lr=[1e-3]", "--list"], ""),
    "doctor RECIPE": (["doctor", "PATH"], ""),
    "recipes show": (["recipes", "show", "PATH"], ""),
    "recipes diff": (["recipes", "diff", "r.yaml", "PATH"], ""),
    "recipes check": (["recipes", "check", "PATH"], ""),
    "cache RECIPE": (["cache", "push", "memory://x", "PATH", "--compiler", "1"], ""),
    "data.sources": ([*TRAIN, "data.sources=[{path: TEXT}]"], "data.sources[0]"),
    "data.examples": ([*TRAIN, "data.sources=[]", "data.examples={path: TEXT}"], "data.examples"),
    "data.tokenizer": ([*TRAIN, "data.tokenizer=TEXT"], "data.tokenizer"),
    "init.from": ([*TRAIN, "init.from=TEXT"], "init.from"),
    "eval.tasks": ([*TRAIN, "eval.tasks=[TEXT]"], "eval.tasks"),
    "data train-tokenizer SRC": (["data", "train-tokenizer", "PATH", "--vocab", "300", "--out", "o"], "SRC"),
    "data tokenize SRC": (["data", "tokenize", "PATH", "--tokenizer", "bytes", "--out", "o"], "SRC"),
    "data tokenize --tokenizer": (
        ["data", "tokenize", "corpus", "--tokenizer", "PATH", "--out", "o"],
        "--tokenizer",
    ),
    "data inspect": (["data", "inspect", "PATH"], ""),
    "data locate": (["data", "locate", "PATH", "--step", "1"], ""),
    "generate": (["generate", "PATH", "--prompt", "x"], ""),
    "convert to-hf": (["convert", "to-hf", "PATH", "o"], ""),
    "convert from-hf": (["convert", "from-hf", "PATH", "o"], "DIR"),
    "convert from-gguf": (["convert", "from-gguf", "PATH", "o"], "FILE"),
    "convert from-nxd": (["convert", "from-nxd", "PATH", "o"], "RUN_OR_DIR"),
    "eval TARGET": (["eval", "PATH", "--tasks", "hlat-offline"], ""),
    "eval --tasks": (["eval", "run", "--tasks", "PATH"], "--tasks"),
    "eval --include-path": (["eval", "x", "--tasks", "y", "--include-path", "PATH"], "--include-path"),
    "eval --tokenizer": (["eval", "x", "--tasks", "y", "--tokenizer", "PATH"], "--tokenizer"),
    "compare TARGET": (["compare", "PATH", "PATH", "--tasks", "hlat-offline"], ""),
    "report RUN": (["report", "PATH"], ""),
}
WRITTEN = {
    "run.dir": (["train", "r.yaml", "run.dir=TEXT"], ""),
    "supervise run.dir": (["supervise", "r.yaml", "run.dir=TEXT"], ""),
    "launch run.dir": (
        ["launch", "torchrun", "r.yaml", "run.dir=TEXT", "--nodes", "1", "--nproc-per-node", "1"],
        "",
    ),
    "sweep --out": (["sweep", "r.yaml", "run.steps=[1]", "--out", "PATH"], "--out"),
    "recipes schema --out": (["recipes", "schema", "--out", "PATH"], "--out"),
    "data train-tokenizer --out": (
        ["data", "train-tokenizer", "corpus", "--vocab", "300", "--out", "PATH"],
        "--out",
    ),
    "data tokenize --out": (["data", "tokenize", "corpus", "--tokenizer", "bytes", "--out", "PATH"], "--out"),
    "convert to-hf OUT": (["convert", "to-hf", "run", "PATH"], "OUT"),
    "convert from-hf OUT": (["convert", "from-hf", "corpus", "PATH"], "OUT"),
    "convert from-nxd RUN": (["convert", "from-nxd", "corpus", "PATH"], "RUN"),
    "eval --json": (["eval", "run", "--tasks", "x", "--json", "PATH"], "--json"),
    "eval --html": (["eval", "run", "--tasks", "x", "--all-checkpoints", "--html", "PATH"], "--html"),
    "compare --markdown": (["compare", "a", "b", "--tasks", "x", "--markdown", "PATH"], "--markdown"),
    "report --out": (["report", "run", "--out", "PATH"], "--out"),
    "cache --cache": (["cache", "pull", "memory://x", "--compiler", "1", "--cache", "PATH"], "--cache"),
}


def one_line(words: list[str], path: str, named: str, capsys: pytest.CaptureFixture[str]) -> str:
    text = json.dumps(path)
    code = main([w.replace("TEXT", text) if "TEXT" in w else path if w == "PATH" else w for w in words])
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and said.startswith("hlat: error: "), (words, path, said)
    assert named in said, (words, path, said)
    return said


@pytest.mark.parametrize("what", READ)
def test_what_is_read(what: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, named = READ[what]
    for path in (NOWHERE | NO_FILES | MISSING).values():
        one_line(words, path, named, capsys)
    assert not Path("run").exists() and not Path("o").exists()


@pytest.mark.parametrize("what", WRITTEN)
def test_what_is_written(what: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, named = WRITTEN[what]
    paths = {**NOWHERE, **NO_FILES}
    if "run.dir" in what:  # the name of a folder like any other
        del paths["unknown user"]
    before = sorted(Path.cwd().rglob("*"))
    for path in paths.values():
        one_line(words, path, named, capsys)
    assert [path for path in sorted(Path.cwd().rglob("*")) if "cache" not in path.parts] == before


@pytest.mark.parametrize("base", [*NOWHERE, *NO_FILES, *MISSING])
def test_a_base(base: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = (NOWHERE | NO_FILES | MISSING)[base]
    Path("b.yaml").write_text(f"base: {json.dumps(path)}\n")
    one_line(["recipes", "check", "b.yaml"], "", "", capsys)


def test_a_chain_of_bases_has_an_end(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(200):
        Path(f"{number}.yaml").write_text(f"base: {number + 1}.yaml\n")
    assert "more than 20 recipes stand on each other" in one_line(
        ["recipes", "check", "0.yaml"], "", "", capsys
    )


def test_the_helper_itself(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place))
    assert expand("~/file") == place / "file" and existing_file("~/file") == place / "file"
    assert kind_of(Path("/dev/null")) == "device" and kind_of(place / "none") == "missing"
    assert file_to_write(place / "new") == place / "new"
    assert folder_to_write(place / "a" / "b") == place / "a" / "b" and not (place / "a").exists()
    for function, path, said in (
        (existing, "none", "no such file or folder"),
        (existing_file, "folder", "is a folder, not a file"),
        (existing_folder, "file", "is a file, not a folder"),
        (existing_folder, "pipe", "is a pipe, not a folder"),
        (file_to_write, "folder", "is a folder; give the name of a file in it"),
        (file_to_write, "none/x", "there is no folder"),
        (folder_to_write, "file", "is not a folder"),
    ):
        with pytest.raises(UserError, match=f"^--opt: .*{re.escape(said)}"):
            function(place / path, "--opt")


def test_what_may_not_be_used(place: Path) -> None:
    """As somebody who is not root, for whom nothing is closed."""
    (place / "file").chmod(0)
    (place / "folder").chmod(0)
    user = os.geteuid()
    os.chmod(place.parent, 0o755)
    above = [path for path in place.parents if path.stat().st_uid == user and path != place.parent]
    modes = {path: path.stat().st_mode for path in above}
    try:
        if user == 0:
            for path in above:
                path.chmod(modes[path] | 0o711)
            os.seteuid(65534)
        for function, path in (
            (existing_file, "file"),
            (existing_folder, "folder"),
            (existing, "folder/x"),
            (file_to_write, "folder/x"),
            (folder_to_write, "folder/x/y"),
        ):
            with pytest.raises(UserError, match="--opt: .*no permission to"):
                function(place / path, "--opt")
    finally:
        if user == 0:
            os.seteuid(0)
            for path, mode in modes.items():
                path.chmod(mode)
        (place / "folder").chmod(0o755)


def test_a_file_is_read_once_and_not_without_end(place: Path) -> None:
    assert read_whole(place / "file", "f", 6, "a recipe") == b"hello\n"
    with pytest.raises(UserError, match="is larger than 0 MiB, so it is not a recipe"):
        read_whole(place / "file", "f", 5, "a recipe")
    for name in ("pipe", "folder", "loop", "socket", "none"):
        with pytest.raises(UserError, match="^f: "):
            read_whole(place / name, "f", 100, "a recipe")


def test_what_escapes_is_a_line_too(tmp_path: Path) -> None:
    for kind, number in ((UserError, 13), (UserError, 40), (StorageFailed, 28), (UserError, 21)):
        with pytest.raises(kind, match=r"^a/b: cannot be used: "), names_explained():
            raise OSError(number, os.strerror(number), "a/b")
    with pytest.raises(FileNotFoundError), names_explained():  # a defect
        raise FileNotFoundError(2, "No such file", "a/b")


def test_paths_are_expanded_in_one_place() -> None:
    """Nothing else calls `expanduser`, which raises RuntimeError, or `resolve` on what a user gave."""
    found = [path for path in (ROOT / "hlat").rglob("*.py") if "expanduser(" in path.read_text("utf-8")]
    assert [path.name for path in found] == ["paths.py"]
