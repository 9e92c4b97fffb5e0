"""Control characters never reach a terminal: from file names, errors, recipes, samples and generated text."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hlat import cli
from hlat.observe.terminal import Guarded, escaped, guarded, one_line, unguarded

EVIL = "a\x1b[2J\x1b]52;c;aGk=\x07\rb\x08\x9b31m\u202egnp.exe\u2066x\x7f\x85"
SHOWN = r"a\x1b[2J\x1b]52;c;aGk=\x07\x0db\x08\x9b31m\u202egnp.exe\u2066x\x7f\x85"


def acts(text: str) -> list[str]:
    """Characters that a terminal acts on, or that turn a line around."""
    bidi = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    return [c for c in text if (unicodedata.category(c) == "Cc" and c not in "\n\t")
            or unicodedata.bidirectional(c) in bidi]  # fmt: skip


@given(st.text())
def test_nothing_acts_and_the_rest_stays(text: str) -> None:
    once = escaped(text)
    assert acts(once) == [] and escaped(once) == once
    assert not acts(one_line(text)) and "\n" not in one_line(text)
    if not acts(text) and not any(unicodedata.category(c) in ("Cf", "Zl", "Zp", "Cs") for c in text):
        assert once == text


def test_how_they_are_shown() -> None:
    assert escaped(EVIL) == SHOWN
    assert escaped("日本\u3000語 é\u0301 👩\u200d💻\n\tx") == "日本\u3000語 é\u0301 👩\u200d💻\n\tx", (
        "not only ASCII"
    )
    assert escaped(os.fsdecode(b"caf\xe9.txt")) == r"caf\xe9.txt"
    assert one_line("a\nb\tc") == r"a\nb\tc"


def test_a_guarded_stream_escapes_and_is_else_the_stream() -> None:
    stream = io.StringIO()
    bars = Guarded(stream, bars=True)
    assert bars.write(EVIL) == len(EVIL)
    bars.writelines(["\r50 %", "\n", "\x1b[A", "\r\x1b[A\r100 %"])
    assert stream.getvalue() == f"{SHOWN}\r50 %\n\x1b[A\r" + r"\x1b[A\x0d100 %"
    assert bars.getvalue() == stream.getvalue() and unguarded(bars) is stream and unguarded(stream) is stream
    out = sys.stdout
    with pytest.raises(KeyError), guarded(), guarded():
        assert isinstance(sys.stdout, Guarded) and unguarded(sys.stdout) is out
        raise KeyError
    assert sys.stdout is out


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[bytes]:
    environ = {**os.environ, "PYTHONUTF8": "1", "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    command = [sys.executable, "-P", "-m", "hlat", *arguments]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, timeout=120)


def test_commands_show_names_and_recipes_escaped(tmp_path: Path, capsys: Any) -> None:
    """In this process: every verb prints through the same guard."""
    name = EVIL.replace("\x85", "")
    for arguments in (
        ["recipes", "check", f"{tmp_path}/{name}.yaml"],
        ["recipes", "check", "tiny", f"run.{name}=1"],
        ["data", "inspect", f"{tmp_path}/{name}"],
        ["generate", f"{tmp_path}/{name}", "--prompt", "x"],
        ["train", f"{name}"],
        ["report", f"{tmp_path}/{name}"],
    ):
        assert cli.main(arguments) == 2, arguments
        said = capsys.readouterr()
        assert acts(said.out + said.err) == [] and r"\x1b" in said.err, said.err
    recipe = tmp_path / f"evil\u202e{chr(27)}.yaml"
    recipe.write_text('base: tiny\nrun: {dir: "x\\u202e\\x9b1m"}\n', encoding="utf-8")
    assert cli.main(["recipes", "check", str(recipe)]) == 0
    assert cli.main(["recipes", "diff", str(recipe), "tiny"]) == 0
    said = capsys.readouterr()
    assert acts(said.out + said.err) == [] and r"\u202e" in said.out


@pytest.mark.slow
def test_a_real_command_line(tmp_path: Path) -> None:
    done = run(["train", "no\x1b[31mrecipe\u202e"], tmp_path)
    assert done.returncode == 2 and b"\x1b" not in done.stderr and rb"no\x1b[31mrecipe\u202e" in done.stderr
