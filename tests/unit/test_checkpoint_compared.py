"""The table "What is compared" of docs/checkpoints.md: every kind of damage, everybody who reads one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hlat.backend.cluster import Cluster
from hlat.checkpoint.hf import to_hf
from hlat.checkpoint.reader import Checkpoint
from hlat.checkpoint.store import CheckpointStore
from hlat.cli import main
from hlat.errors import UserError
from hlat.evaluate.target import all_checkpoints, open_target
from hlat.evaluate.text import codec_for
from hlat.model.config import ModelConfig
from hlat.model.init import init_tensor, parameter_shapes
from hlat.recipe import Recipe
from hlat.train.initial import one_checkpoint, open_source

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SHAPE: dict[str, Any] = {"layers": 1, "hidden": 8, "heads": 2, "ffn": 12, "vocab": 300, "max_seq_len": 16}
DATA = "data-00000.safetensors"


@pytest.fixture
def run(tmp_path: Path, byte_level_files: list[Path]) -> Path:
    """A run with the checkpoints of steps 10, 20 and 30: weights, optimizer state and a tokenizer."""
    config = ModelConfig(**SHAPE)
    store = CheckpointStore(tmp_path / "run/checkpoints", keep=5)
    for step in (10, 20, 30):
        tensors = {f"model/{n}": init_tensor(config, n, s, step) for n, s in parameter_shapes(config).items()}
        tensors |= {f"optim/exp_avg/{n}": torch.ones(s) for n, s in parameter_shapes(config).items()}
        store.save(step, tensors, {"model": config.model_dump()}, tokens=step, tokenizer=byte_level_files)
    return tmp_path / "run"


# -- what is damaged


def turn(file: Path, place: int) -> None:
    """Change one byte of a file."""
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)


def tensor(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        record = Checkpoint(folder)._index.tensors[name].chunks[0].record
        turn(folder / record.file, record.start + 5)

    return damage


def shortened(folder: Path) -> None:
    (folder / DATA).write_bytes((folder / DATA).read_bytes()[:-1])


def tokenizer(folder: Path) -> None:
    file = folder / "tokenizer/tokenizer_config.json"
    file.write_text(json.dumps({"eos_token": "<|dndoftext|>"}))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "weights": tensor("model/embed.weight"),
    "optimizer state": tensor("optim/exp_avg/embed.weight"),
    "cut off": shortened,
    "missing": lambda folder: (folder / DATA).unlink(),
    "tokenizer": tokenizer,
    "no tokenizer": lambda folder: (folder / "tokenizer/tokenizer.json").unlink(),
    "index": lambda folder: turn(folder / "index.json", 30),
    "recipe": lambda folder: turn(folder / "meta.json", 30),
    "marker": lambda folder: turn(folder / "complete.json", 30),
    "no marker": lambda folder: (folder / "complete.json").unlink(),
}


# -- who reads it; each answers with the steps it took


def train(run: Path, out: Path) -> list[int]:
    newest = CheckpointStore(run / "checkpoints", keep=5, warn=lambda line: None).newest()
    assert newest is not None
    return [newest.step]


def generate(path: Path, out: Path) -> list[int]:
    """The command itself says no step: it is that of the others. Raises like them where it refuses."""
    if main(["generate", str(path), "--prompt", "x", "--max-new-tokens", "2", "--device", "cpu"]) == 2:
        raise UserError("refused")
    return []


def convert(path: Path, out: Path) -> list[int]:
    to_hf(path, out)
    return []


def evaluate(path: Path, out: Path) -> list[int]:
    target = open_target(path)
    codec_for(target.source, SHAPE["vocab"])
    for name in target.source.names():
        if name.startswith("model/"):
            target.source.read(name)
    return [target.step]


def begin_from(path: Path, out: Path) -> list[int]:
    recipe = Recipe.model_validate(
        {
            "model": SHAPE,
            "data": {"sources": [{"path": str(path)}]},
            "init": {"from": str(path)},
            "run": {"dir": str(out)},
        }
    )
    with one_checkpoint(recipe, Cluster(), 1):
        source = open_source(str(path))[0]
        return [int(source.meta["step"])]


def each(run: Path, out: Path) -> list[int]:
    return [target.step for target in all_checkpoints(run)]


@pytest.mark.parametrize("kind", DAMAGES)
def test_of_a_run_folder(
    run: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGES[kind](run / "checkpoints/step-00000030")
    passed = kind == "optimizer state"
    assert train(run, tmp_path / "train") == [20], "every byte"
    for number, reader in enumerate((evaluate, begin_from, generate, convert)):
        capsys.readouterr()
        caplog.clear()
        assert reader(run, tmp_path / f"out-{number}") in ([], [30 if passed else 20])
        said = capsys.readouterr().err + caplog.text
        assert said.count("step-00000030") == said.count("using step 20 instead") == (not passed), reader
    assert (tmp_path / "out-3/config.json").is_file()
    capsys.readouterr()
    assert each(run, tmp_path) == ([10, 20, 30] if passed else [10, 20])
    said = capsys.readouterr().err
    assert said.count("skipped checkpoint") == said.count("step-00000030") == (not passed)


@pytest.mark.parametrize("kind", DAMAGES)
def test_of_a_step_folder(run: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture) -> None:
    step = run / "checkpoints/step-00000030"
    DAMAGES[kind](step)
    for number, reader in enumerate((evaluate, generate, convert)):
        out = tmp_path / f"out-{number}"
        if kind == "optimizer state":
            assert reader(step, out) in ([], [30])
            continue
        with pytest.raises(UserError):
            reader(step, out)
        assert not out.exists()
    assert "using step" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", DAMAGES)
def test_verify_in_python_compares_every_byte(run: Path, kind: str) -> None:
    from hlat.checkpoint.folder import Broken

    step = run / "checkpoints/step-00000030"
    DAMAGES[kind](step)
    with pytest.raises(Broken):
        Checkpoint(step).verify()


def test_a_file_put_beside_a_tokenizer_ends_all_that_use_it(run: Path, tmp_path: Path) -> None:
    (run / "checkpoints/step-00000030/tokenizer/special_tokens_map.json").write_text("{}")
    for number, reader in enumerate((evaluate, generate, convert)):
        with pytest.raises(UserError):
            reader(run, tmp_path / f"out-{number}")
        assert not (tmp_path / f"out-{number}").exists()
    assert train(run, tmp_path) == [30], "a run's tokenizer is that of its recipe"
