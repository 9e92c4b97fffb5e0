"""`hlat launch torchrun`: a script for each node, started by hand or here."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from hlat import cli


@pytest.fixture
def recipe(launch_stubs, tmp_path: Path, monkeypatch) -> str:
    """A recipe with an odd name; a Python that writes down its words and ends with 3."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "it's $(touch x).yaml").write_text(launch_stubs.RECIPE)
    (tmp_path / "text").write_text("what is trained on\n")
    (tmp_path / "python").write_text('#!/bin/bash\nprintf "%s\\0" "$@" >words\nexit 3\n')
    (tmp_path / "python").chmod(0o755)
    return "it's $(touch x).yaml"


def words(tmp_path: Path) -> list[str]:
    return (tmp_path / "words").read_bytes().decode().split("\0")[:-1]


def launch(tmp_path: Path, recipe: str, *more: str) -> list[str]:
    start = ["launch", "torchrun", recipe, "--nproc-per-node", "2", "--python", str(tmp_path / "python")]
    return [*start, "--job-name", "odd", *more]


def test_by_hand_on_each_node(recipe, tmp_path, capsys) -> None:
    override = "data.tokenizer=x `touch y` \"$HOME\" 'z'"
    assert (
        cli.main(launch(tmp_path, recipe, "--nodes", "2", "--interface", "ens5", "run.name=odd", override))
        == 0
    )
    file = tmp_path / "runs/odd/launch/torchrun.sh"
    assert str(file) in capsys.readouterr().out and os.access(file, os.X_OK)
    done = subprocess.run(["bash", file, "1", "10.0.0.1"], cwd="/", capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert words(tmp_path) == [
        "-P", "-m", "hlat", "supervise", recipe, "run.name=odd", override, "--nproc-per-node", "2",
        "--grace", "300", "--nnodes", "2", "--node-rank", "1",
        "--master-addr", "10.0.0.1", "--master-port", "29500",
    ]  # fmt: skip
    assert not {"x", "y"} & {path.name for path in tmp_path.rglob("*")}
    subprocess.run([file, "0", "node-a", "4000"], cwd="/", capture_output=True)
    assert words(tmp_path)[-6:] == ["--node-rank", "0", "--master-addr", "node-a", "--master-port", "4000"]


@pytest.mark.parametrize("arguments", [[], ["0"], ["2", "a"], ["-1", "a"], ["x", "a"], ["0", "a", "1", "b"]])
def test_the_script_says_how_to_use_it(recipe, tmp_path, capsys, arguments) -> None:
    assert cli.main(launch(tmp_path, recipe, "--nodes", "2", "--dry-run")) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    done = subprocess.run(["bash", "script", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage: bash script NODE_RANK MASTER_ADDR")
    assert not (tmp_path / "words").exists() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("more", "last"),
    [
        (["--nodes", "1"], ["--grace", "300"]),
        (
            ["--nodes", "2", "--node-rank", "1", "--master-addr", "a", "--master-port", "4000"],
            ["--master-port", "4000"],
        ),
    ],
)
def test_started_here(recipe, tmp_path, monkeypatch, capsys, more, last) -> None:
    ran = []

    def execvp(file: str, command: list[str]) -> None:
        ran.append(subprocess.run(command, check=False).returncode)
        raise SystemExit(ran[0])

    monkeypatch.setattr(os, "execvp", execvp)
    with pytest.raises(SystemExit):
        cli.main(launch(tmp_path, recipe, *more))
    assert ran == [3] and words(tmp_path)[-2:] == last


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--nodes", "2", "--node-rank", "0"], "--master-addr"),
        (["--nodes", "2", "--node-rank", "2", "--master-addr", "a"], "--node-rank"),
        (["--nodes", "2", "--master-port", "0"], "--master-port"),
        (["--nodes", "3"], "global_batch"),
    ],
)
def test_mistakes(recipe, tmp_path, capsys, more, message) -> None:
    assert cli.main(launch(tmp_path, recipe, *more)) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "runs").exists()
