"""Whatever reads the weights of a run passes over a checkpoint in which they are damaged, and says so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hlat.backend.cluster import Cluster
from hlat.checkpoint.reader import Checkpoint
from hlat.checkpoint.store import CheckpointStore
from hlat.checkpoint.weights import open_weights
from hlat.cli import main
from hlat.errors import UserError
from hlat.evaluate.target import all_checkpoints, open_target
from hlat.model.config import ModelConfig
from hlat.model.init import init_tensor, parameter_shapes
from hlat.recipe import Recipe
from hlat.train.initial import one_checkpoint, open_source

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SHAPE: dict[str, Any] = {"layers": 1, "hidden": 8, "heads": 2, "ffn": 12, "vocab": 257, "max_seq_len": 16}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with the checkpoints of steps 10, 20 and 30: weights and optimizer state."""
    config = ModelConfig(**SHAPE)
    store = CheckpointStore(tmp_path / "run/checkpoints", keep=5)
    meta = {"model": config.model_dump(), "recipe": {"data": {"tokenizer": "bytes"}}}
    for step in (10, 20, 30):
        tensors = {f"model/{n}": init_tensor(config, n, s, step) for n, s in parameter_shapes(config).items()}
        tensors |= {f"optim/exp_avg/{n}": torch.ones(s) for n, s in parameter_shapes(config).items()}
        store.save(step, tensors, meta, tokens=step)
    return tmp_path / "run"


def damage(run: Path, step: int, name: str) -> Path:
    """Turn a bit of a tensor of a checkpoint; returns its folder."""
    folder = run / f"checkpoints/step-{step:08d}"
    record = Checkpoint(folder)._index.tensors[name].chunks[0].record
    data = bytearray((folder / record.file).read_bytes())
    data[record.start + 5] ^= 4
    (folder / record.file).write_bytes(data)
    return folder


def generate(run: Path, out: Path) -> str:
    assert main(["generate", str(run), "--prompt", "x", "--max-new-tokens", "2", "--device", "cpu"]) == 0
    return ""


def convert(run: Path, out: Path) -> str:
    assert main(["convert", "to-hf", str(run), str(out)]) == 0
    return "from step 20 "


def evaluate(run: Path, out: Path) -> str:
    assert open_target(run).step == 20
    return ""


def start_from(run: Path, out: Path) -> str:
    model, data = SHAPE, {"sources": [{"path": str(run)}]}
    recipe = Recipe.model_validate(
        {"model": model, "data": data, "init": {"from": str(run)}, "run": {"dir": str(out)}}
    )
    with one_checkpoint(recipe, Cluster(), 1):
        assert open_source(str(run))[0].path.name == "step-00000020"
    return ""


READERS = [generate, convert, evaluate, start_from]


@pytest.mark.parametrize("reader", READERS)
def test_the_newest_checkpoint_with_whole_weights_is_used(
    run: Path,
    tmp_path: Path,
    reader: Callable[[Path, Path], str],
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    damage(run, 30, "model/embed.weight")
    expected = reader(run, tmp_path / "out")
    said = capsys.readouterr()
    assert expected in said.out
    text = said.err + caplog.text
    assert (
        text.count("skipped checkpoint") == 1 and "step-00000030: data-00000.safetensors is damaged" in text
    )
    assert "using step 20 instead" in text


def test_a_named_checkpoint_has_no_substitute(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = str(damage(run, 30, "model/embed.weight"))
    assert main(["generate", folder, "--prompt", "x", "--max-new-tokens", "2", "--device", "cpu"]) == 2
    assert main(["convert", "to-hf", folder, str(tmp_path / "hf")]) == 2
    said = capsys.readouterr()
    assert said.err.count("does not match its checksum") == 2 == len(said.err.splitlines())
    assert not said.out and not (tmp_path / "hf").exists()


def test_where_all_are_damaged_each_is_named(run: Path, capsys: pytest.CaptureFixture) -> None:
    for step in (10, 20, 30):
        damage(run, step, "model/embed.weight")
    assert main(["generate", str(run), "--prompt", "x", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and all(f"step {step}: data-00000" in said for step in (10, 20, 30))
    with pytest.raises(UserError, match="no checkpoint here can be used"):
        list(all_checkpoints(run))


def test_of_every_checkpoint_the_damaged_are_left_out(run: Path, capsys: pytest.CaptureFixture) -> None:
    damage(run, 20, "model/norm.weight")
    assert [target.step for target in all_checkpoints(run)] == [10, 30]
    [line] = capsys.readouterr().err.splitlines()
    assert "skipped checkpoint" in line and "step-00000020: data-00000.safetensors is damaged" in line


def test_optimizer_state_is_left_to_those_who_read_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The weights beside it are whole, and reading it would take three times as long."""
    damage(run, 30, "optim/exp_avg/embed.weight")
    source = open_weights(run)
    assert isinstance(source, Checkpoint) and source.step == 30 and source.verified == "model/"
    with pytest.raises(UserError, match="'optim/exp_avg/embed.weight' does not match"):
        source.read("optim/exp_avg/embed.weight")
    store = CheckpointStore(run / "checkpoints", keep=5)
    assert (newest := store.newest()) is not None and newest.step == 20
