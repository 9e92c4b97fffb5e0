"""Recipes to the last byte, texts in any locale, and file names that cannot exist."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hlat.cli import main
from hlat.errors import UserError, check_length, names_explained
from hlat.observe.runfolder import RunFolder
from hlat.observe.text import argument_text
from hlat.recipe_yaml import read_yaml

RECIPE = (
    "\ufeff# größe – “x”\r\nrun: {name: r, steps: 2, dir: run}\r\n"
    "model: {layers: 1, hidden: 16, heads: 2, ffn: 32, vocab: 260, max_seq_len: 16}\r\n"
    "data: {sources: [{path: text.txt}], tokenizer: bytes, seq_len: 8, micro_batch: 1, global_batch: 1,"
    " holdout: 0}\r\nschedule: {name: constant}\r\neval: {every: 0}\r\ncompile: false # ende ü"
).encode()
LONG = "n" * 300


def test_a_run_in_a_locale_without_the_recipes_characters(tmp_path: Path) -> None:
    """A byte order mark, DOS line ends, comments, no line end at the end: kept; and nothing of it, nor of the
    data, nor of what is printed, depends on the locale.
    """
    (tmp_path / "r.yaml").write_bytes(RECIPE)
    (tmp_path / "text.txt").write_bytes("grün weiß ☃ ".encode() * 50)
    plain = {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONIOENCODING": "latin-1"}
    environ = {**os.environ, **plain, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "hlat", "train", "r.yaml", 'data.sources=[{path: "text.txt"}]'],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode("latin-1")
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == RECIPE
    assert read_yaml(tmp_path / "run" / "resolved.yaml")[0]["run"]["name"] == "r"


def test_a_recipe_is_kept_as_bytes(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run").start(RECIPE, "größe: 1\n", description={}) as folder:
        assert folder.recipe.read_bytes() == RECIPE
        assert folder.resolved.read_bytes() == "größe: 1\n".encode()
    with RunFolder(tmp_path / "run").start(RECIPE + b"\r\n", "größe: 1\n", description={}) as folder:
        assert (folder.logs / "recipe-until-start-1.yaml").read_bytes() == RECIPE
        assert folder.recipe.read_bytes() == RECIPE + b"\r\n"


def test_a_recipe_that_is_not_utf8(tmp_path: Path) -> None:
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "r.yaml").write_bytes(mark + b"run: {}\r\n# gr\xfc\xdfe\n")
        with pytest.raises(UserError, match=r"r.yaml:2: is not UTF-8 text \(byte 13\); save it as UTF-8"):
            read_yaml(tmp_path / "r.yaml")


def test_the_text_of_a_command_line() -> None:
    assert argument_text("grün ☃", "--prompt") == "grün ☃"
    assert argument_text("gr\udcc3\udcbcn", "--prompt") == "grün"  # as Python reads it in the locale C
    with pytest.raises(UserError, match="--prompt: is not UTF-8 text"):
        argument_text("caf\udce9", "--prompt")


@pytest.mark.parametrize(
    "words",
    [
        ["train", "r.yaml", f"run.name={LONG}"],
        ["train", "r.yaml", f"run.dir={'/'.join(['d' * 200] * 21)}"],
        ["train", f"{LONG}.yaml"],
        ["train", "r.yaml", f"data.sources=[{{path: {LONG}}}]"],
        ["supervise", "r.yaml", f"run.name={LONG}"],
        ["launch", "torchrun", "r.yaml", "--nodes", "1", "--nproc-per-node", "1", f"run.dir={LONG}"],
        ["sweep", "r.yaml", "optim.lr=[1e-3]", "--out", LONG],
        ["report", "r.yaml", "--out", f"{LONG}.html"],
        ["eval", LONG, "--tasks", "hlat-offline"],
        ["generate", LONG, "--prompt", "a"],
        ["convert", "from-hf", LONG, "out"],
        ["data", "tokenize", "text.txt", "--tokenizer", "bytes", "--out", LONG],
    ],
    ids=lambda words: " ".join(words)[:30],
)
def test_names_too_long_are_one_line(words, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "r.yaml").write_bytes(RECIPE.replace(b", dir: run", b""))
    (tmp_path / "text.txt").write_text("red green blue " * 20)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("bytes, and a file system takes 255" in said or "too" in said)
    assert {path.name for path in tmp_path.iterdir()} == {"r.yaml", "text.txt"}, "nothing is left behind"


def test_lengths_are_those_of_bytes(tmp_path: Path) -> None:
    check_length(tmp_path / ("n" * 255))
    with pytest.raises(UserError, match="has 256 bytes"):
        check_length(tmp_path / ("ü" * 128))
    with pytest.raises(UserError, match="too many for this system"):
        check_length("/" + "/".join(["d" * 200] * 20), room=100)
    check_length("/" + "/".join(["d" * 200] * 20))


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(OSError, match="busy"), names_explained():
        raise OSError(errno.EBUSY, "busy")
    with pytest.raises(UnicodeEncodeError), names_explained():
        "\udce9".encode()  # a defect, not a file name
