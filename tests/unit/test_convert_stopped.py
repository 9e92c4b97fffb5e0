"""A conversion that a signal ends leaves nothing behind and says what ended it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from hlat.checkpoint import hf, stream
from hlat.cli import main


@pytest.mark.parametrize("way", ["to-hf", "from-hf"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left(
    way: str, number: int, load_module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The signal comes while the folder is half-written."""
    shared = load_module(Path(__file__).with_name("test_eval_command.py"))
    shared.write_checkpoint(tmp_path / "model")
    assert main(["convert", "to-hf", str(tmp_path / "model"), str(tmp_path / "hf")]) == 0
    before = sorted(path.name for path in tmp_path.iterdir())
    place, name = (hf, "write_safetensors") if way == "to-hf" else (stream, "write_tensors")
    real, seen = getattr(place, name), []

    def write(path: Path, *args: object) -> object:
        found = real(path, *args)
        seen.append(path.exists() and path.parent.name.startswith(".new.partial-"))
        os.kill(os.getpid(), number)
        return found

    monkeypatch.setattr(place, name, write)
    former = signal.getsignal(number)
    capsys.readouterr()
    source = tmp_path / ("model" if way == "to-hf" else "hf")
    assert main(["convert", way, str(source), str(tmp_path / "new")]) == 128 + number
    assert seen == [True] and sorted(path.name for path in tmp_path.iterdir()) == before
    name = signal.Signals(number).name
    said = "hlat: interrupted\n" if number == signal.SIGINT else f"hlat: stopped by {name}\n"
    assert capsys.readouterr().err == said
    assert signal.getsignal(number) is former
