"""Folders in Hugging Face's layout: what is refused, what comes back unchanged, what is said."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hlat.checkpoint.hf import from_hf, to_hf
from hlat.checkpoint.provenance import META, provenance_of
from hlat.checkpoint.store import write_weights
from hlat.checkpoint.weights import open_weights
from hlat.cli import main
from hlat.errors import UserError
from hlat.model.config import ModelConfig
from hlat.model.init import init_tensor, parameter_shapes

CONFIG = ModelConfig(layers=2, hidden=16, heads=2, ffn=24, vocab=257, max_seq_len=48)


def weights():
    return ((f"model/{n}", init_tensor(CONFIG, n, s, 3)) for n, s in parameter_shapes(CONFIG).items())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for `transformers`, not HLAT's own: it has a chat template, and other ones."""
    meta = {"model": CONFIG.model_dump(), "recipe": {"data": {"tokenizer": "bytes"}}}
    write_weights(tmp_path / "run", weights(), meta)
    to_hf(tmp_path / "run", tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    config.pop("hlat", None)
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    (tmp_path / "hf/chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "hf/additional_chat_templates").mkdir()
    (tmp_path / "hf/additional_chat_templates/tools.jinja").write_text("{{ tools }}")
    return tmp_path / "hf"


QUANTISED = {
    torch.float8_e4m3fn: "the weights are quantised: model.layers.0.mlp.up_proj.weight is stored as F8_E4M3",
    torch.float8_e5m2: "the weights are quantised: model.layers.0.mlp.up_proj.weight is stored as F8_E5M2",
    torch.int8: "the weights are quantised: model.layers.0.mlp.up_proj.weight is stored as I8",
    torch.uint8: "the weights are quantised: model.layers.0.mlp.up_proj.weight is stored as U8",
    torch.int32: "the weights are quantised: model.layers.0.mlp.up_proj.weight is stored as I32",
    torch.float64: "hf: model.layers.0.mlp.up_proj.weight is stored as F64",
}


@pytest.mark.parametrize("dtype", QUANTISED)
def test_quantised_weights_are_refused_before_a_tensor_is_converted(
    folder: Path, tmp_path: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture
) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[f"{name}_scale"] = torch.ones(1)
    save_file({**tensors, name: tensors[name].to(dtype)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError):
        open_weights(folder)
    commands = (
        ["convert", "from-hf", str(folder), str(tmp_path / "out")],
        ["convert", "to-hf", str(folder), str(tmp_path / "out")],
        ["generate", str(folder), "--prompt", "x"],
    )
    for command in commands:
        assert main(command) == 2
        said = capsys.readouterr()
        [line] = said.err.splitlines()
        assert QUANTISED[dtype] in line and not said.out
    assert not (tmp_path / "out").exists()


GENERATION = [
    b'{"eos_token_id":256,\r\n\t"top_p": 0.90, "temperature": 1e0}',
    b"{}",
    '{"eos_token_id": [256], "transformers_version": "4.0 é \\u00e9"}\n\n'.encode(),
]


@pytest.mark.parametrize("text", GENERATION)
def test_the_files_come_back_byte_for_byte(folder: Path, tmp_path: Path, text: bytes) -> None:
    (folder / "generation_config.json").write_bytes(text)
    from_hf(folder, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back", "keep")
    # A run that starts there hands the record on, in its own checkpoints.
    source = open_weights(tmp_path / "ours")
    record = replace(provenance_of(source), ancestors=("ours 0",))
    meta = {"model": CONFIG.model_dump(), META: record.to_json()}
    write_weights(tmp_path / "tuned", weights(), meta, source.tokenizer)
    to_hf(tmp_path / "tuned", tmp_path / "later")
    names = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    kept = [name for name in names if name.name not in ("config.json", "model.safetensors")]
    assert len(kept) == 5
    for out in ("back", "later"):
        for name in kept:
            assert (tmp_path / out / name).read_bytes() == (folder / name).read_bytes(), (out, name)
    assert (tmp_path / "back/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_settings_that_a_run_changed_are_written(folder: Path, tmp_path: Path) -> None:
    (folder / "generation_config.json").write_bytes(GENERATION[0])
    from_hf(folder, tmp_path / "ours")
    source = open_weights(tmp_path / "ours")
    record = provenance_of(source)
    files = {**record.files, "generation_config": {"eos_token_id": [9, 256]}}
    meta = {"model": CONFIG.model_dump(), META: replace(record, files=files).to_json()}
    write_weights(tmp_path / "tuned", weights(), meta, source.tokenizer)
    to_hf(tmp_path / "tuned", tmp_path / "later")
    assert json.loads((tmp_path / "later/generation_config.json").read_text()) == {"eos_token_id": [9, 256]}


def test_a_tensor_above_the_shard_size_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["convert", "to-hf", str(folder), str(tmp_path / "out"), "--shard-size", "5KB"]) == 0
    [line] = capsys.readouterr().err.splitlines()
    expected = "2 tensors exceed --shard-size, 5,000 bytes, in a file to itself: "
    assert expected in line and "has 8,224 bytes" in line
    tensors = [load_file(path) for path in (tmp_path / "out").glob("*.safetensors")]
    assert all(sum(t.nbytes for t in file.values()) <= 5000 or len(file) == 1 for file in tensors)
    shutil.rmtree(tmp_path / "out")
    assert main(["convert", "to-hf", str(folder), str(tmp_path / "out"), "--shard-size", "9KB"]) == 0
    assert not capsys.readouterr().err
