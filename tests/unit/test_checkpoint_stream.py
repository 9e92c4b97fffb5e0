"""Weights-only checkpoints, written from a stream of tensors."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hlat.checkpoint import stream
from hlat.checkpoint.store import write_weights
from hlat.errors import UserError


def test_weights_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PART_BYTES", 1000)
    tensors = {"a": torch.randn(33, 8), "b": torch.randn(33, 8).bfloat16(), "c": torch.tensor(7)}
    files: list[int] = []

    def produce() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            files.append(len(os.listdir(next(tmp_path.glob(".w.partial-*")))))
            yield name, tensor

    found = write_weights(tmp_path / "w", produce(), {"step": 9, "model": {"layers": 1}})
    assert files == [0, 1, 1], "a full file is written while tensors still come"
    assert os.listdir(tmp_path) == ["w"] and found.step == 9 and found.meta["model"] == {"layers": 1}
    found.verify()
    assert all(torch.equal(found.read(name), tensor) for name, tensor in tensors.items())


def test_weights_leave_nothing_behind_when_they_fail(tmp_path: Path) -> None:
    def produce() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.ones(3)
        raise RuntimeError("source broke")

    with pytest.raises(RuntimeError, match="source broke"):
        write_weights(tmp_path / "w", produce(), {})
    with pytest.raises(ValueError, match="'a' comes twice"):
        write_weights(tmp_path / "w", [("a", torch.ones(1)), ("a", torch.ones(1))], {})
    assert not list(tmp_path.iterdir())
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "precious").write_text("")
    with pytest.raises(UserError, match="exists already"):
        write_weights(tmp_path / "w", [], {})
