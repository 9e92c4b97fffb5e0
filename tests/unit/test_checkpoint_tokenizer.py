"""A checkpoint's tokenizer is compared with its checksums before anything is encoded with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hlat.checkpoint.codec import seal, unseal
from hlat.checkpoint.hf import to_hf
from hlat.checkpoint.reader import Checkpoint, newest_in, open_checkpoint
from hlat.checkpoint.store import write_weights
from hlat.checkpoint.weights import open_weights, source_tokenizer
from hlat.errors import UserError
from hlat.model.config import ModelConfig
from hlat.model.init import parameter_shapes

SHAPE = {"layers": 1, "hidden": 8, "heads": 2, "ffn": 12, "vocab": 300, "max_seq_len": 16}


@pytest.fixture
def step(tmp_path: Path, byte_level_files: list[Path]) -> Path:
    """A checkpoint with a tokenizer of two byte_level_files, in a folder of checkpoints."""
    config = ModelConfig(**SHAPE)
    tensors = ((f"model/{n}", torch.ones(s)) for n, s in parameter_shapes(config).items())
    folder = tmp_path / "run/checkpoints/step-00000003"
    folder.parent.mkdir(parents=True)
    write_weights(folder, tensors, {"model": config.model_dump()}, byte_level_files)
    return folder


def generate(path: Path, out: Path) -> None:
    from hlat.cli import main

    assert main(["generate", str(path), "--prompt", "x", "--max-new-tokens", "2", "--device", "cpu"]) == 0


def evaluate(path: Path, out: Path) -> None:
    from hlat.evaluate.target import open_target
    from hlat.evaluate.text import codec_for

    codec_for(open_target(path).source, SHAPE["vocab"])


READERS: list[Callable[[Path, Path], Any]] = [
    to_hf,
    evaluate,
    lambda path, out: source_tokenizer(open_weights(path)),
    lambda path, out: open_checkpoint(path).tokenizer,
]


@pytest.mark.parametrize("reader", READERS, ids=["to_hf", "eval", "source_tokenizer", "tokenizer"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_changed_file_is_not_used(step: Path, tmp_path: Path, reader: Any, name: str) -> None:
    reader(step, tmp_path / "before")
    file = step / "tokenizer" / name
    file.write_text(file.read_text().replace("<|endoftext|>", "<|dndoftext|>"))  # of the same size
    with pytest.raises(UserError, match=rf"tokenizer/{name} is damaged"):
        reader(step, tmp_path / "after")
    assert not (tmp_path / "after").exists()


def test_the_command_ends_with_one_line(step: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from hlat.cli import main

    generate(step, tmp_path)
    file = step / "tokenizer/tokenizer.json"
    file.write_text(file.read_text().replace("endoftext", "dndoftext"))
    run = str(step.parents[1])
    capsys.readouterr()
    assert main(["generate", run, "--prompt", "x", "--max-new-tokens", "2"]) == 2
    assert main(["convert", "to-hf", run, str(tmp_path / "hf")]) == 2
    said = capsys.readouterr()
    assert said.err.count("tokenizer/tokenizer.json is damaged") == 2 == len(said.err.splitlines())
    assert not said.out and not (tmp_path / "hf").exists()


@pytest.mark.parametrize("name", ["chat_template.jinja", "special_tokens_map.json", "more/a.jinja"])
def test_a_file_that_was_put_there_later_is_not_used(step: Path, name: str) -> None:
    file = step / "tokenizer" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    with pytest.raises(UserError, match=f"tokenizer/{name} was put there after"):
        source_tokenizer(open_weights(step))
    file.rename(file.with_name("notes.md"))
    assert source_tokenizer(open_weights(step)) is not None


def test_a_checkpoint_without_checksums_of_them_is_used_with_a_note(
    step: Path, caplog: pytest.LogCaptureFixture
) -> None:
    marker = unseal((step / "complete.json").read_bytes())
    for name in list(marker["files"]):
        if name.startswith("tokenizer/"):
            del marker["files"][name]["sha256"]
    (step / "complete.json").write_bytes(seal(marker))
    assert source_tokenizer(open_weights(step)) is not None
    assert "has no checksum" in caplog.text


def test_other_small_files_are_compared_when_it_is_opened(step: Path) -> None:
    """meta.json holds the recipe and generation_config.json, index.json where the tensors are."""
    for name in ("meta.json", "index.json"):
        copy = step.parent / "step-00000009"
        shutil.copytree(step, copy)
        text = (copy / name).read_text()
        (copy / name).write_text(text.replace("8", "9", 1))
        with pytest.raises(UserError, match=name):
            open_checkpoint(copy)
        shutil.rmtree(copy)


def test_a_run_does_not_go_on_with_a_changed_tokenizer(step: Path) -> None:
    file = step / "tokenizer/tokenizer_config.json"
    file.write_text(json.dumps({"eos_token": "<|dndoftext|>"}))
    from hlat.checkpoint.peers import Peers

    found, skipped = newest_in(step.parent, verify=True, peers=Peers())
    assert found is None and "tokenizer_config.json" in skipped[3]
    assert Checkpoint(step).names()  # what needs no tokenizer can still be read
