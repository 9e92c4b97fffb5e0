"""`--help` of every command ends with examples that are real, and with a page that is there."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from hlat.cli import main
from hlat.cli_examples import HELP

sys.path.insert(0, str(Path(__file__).parent))
from command_parsers import parsers, whole_parser


def test_every_command_has_examples_and_a_page() -> None:
    assert {parser.prog for parser in parsers(whole_parser())} == set(HELP)
    root = Path(__file__).parents[2]
    assert [entry.page for entry in HELP.values() if not (root / entry.page).is_file()] == []
    assert all(entry.examples for entry in HELP.values())


def test_every_example_is_a_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some paths are looked at while they are read
    for folder in ("Llama-2-7b-hf", "runs/hlat-7b", "runs/tiny/checkpoints/step-00000200", "runs/wide"):
        Path(folder).mkdir(parents=True)
    Path("model-q8_0.gguf").touch()
    parser = whole_parser()
    for command, entry in HELP.items():
        for example in entry.examples:
            words = shlex.split(example)
            words = words[words.index("-m") + 1 :] if words[0] == "torchrun" else words
            assert words[0] == "hlat", example
            if words[1] == "help" or words[-1] == "--help":
                continue
            args = parser.read(words[1:])
            assert command == "hlat" or args.verb == command.split()[1], example


@pytest.mark.parametrize("words", [["--help"], ["data", "verify", "--help"], ["help", "eval"]])
def test_help_shows_them(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(words)
    out = capsys.readouterr().out
    name = " ".join(["hlat", *(word for word in words if word not in ("help", "--help"))])
    assert f"\nexamples:\n  {HELP[name].examples[0]}\n" in out and out.endswith(
        f"\nmore: {HELP[name].page}\n"
    )
