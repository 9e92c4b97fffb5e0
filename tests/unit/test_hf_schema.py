"""Values of every kind in Hugging Face's JSON files, and sizes that no model has: one line each."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hlat.checkpoint.hf import HFFolder, from_hf
from hlat.checkpoint.hf_config import config_from_hf, hf_name
from hlat.checkpoint.hf_schema import GenerationFields, LlamaFields, checked, read_json, write_json
from hlat.checkpoint.weights import load_model, model_config
from hlat.errors import UserError
from hlat.host.limits import Memory
from hlat.model import fit
from hlat.model.config import ModelConfig
from hlat.model.init import parameter_shapes

SHAPE = {"layers": 1, "hidden": 8, "heads": 2, "kv_heads": 1, "ffn": 12, "vocab": 13, "max_seq_len": 16}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 12,
    "vocab_size": 13,
    "max_position_embeddings": 16,
}
ODD = [
    None,
    True,
    False,
    -1,
    0,
    1.5,
    10**30,
    -1e300,
    "x",
    "8",
    "",
    "../x",
    [],
    [1],
    [[1]],
    ["x"],
    {},
    {"a": {}},
]
ODD += [{"type": 3}, {"rope_theta": "1"}, {"rope_type": ["x"]}, {"rope_type": "linear", "factor": "x"}]
KEYS = sorted(set(LlamaFields.model_fields) | set(CONFIG) | {"hlat", "torch_dtype"})


def folder(path: Path, changes: dict[str, Any] | None = None) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**CONFIG, **(changes or {})}))
    shapes = parameter_shapes(ModelConfig(**SHAPE))
    save_file({hf_name(n): torch.ones(s) for n, s in shapes.items()}, path / "model.safetensors")
    return path


def line(path: Path) -> str:
    """What opening a folder and importing it says; empty: nothing."""
    try:
        model_config(HFFolder(path))
    except UserError as error:
        assert "\n" not in error.line() and len(error.line()) < 500
        return error.line()
    return ""


@pytest.mark.parametrize("key", KEYS)
def test_a_value_of_any_kind(key: str) -> None:
    for value in ODD:
        try:
            config_from_hf({**CONFIG, key: value}, "here")
        except UserError as error:
            about = (
                key.removesuffix("_parameters"),
                "shape",
                "the architecture",
                "activation",
                "rotary",
                "quantised",
            )
            assert any(word in error.what for word in about) and error.where == "here", error.line()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": "linear"}, 'rope_scaling is "linear", not an object'),
        ({"eos_token_id": {"a": 1}}, 'eos_token_id is {"a": 1}, not a token id'),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": 1e19}, "hidden_size"),
        ({"hidden_size": "8"}, 'hidden_size is "8", not a whole number'),
        ({"tie_word_embeddings": "false"}, 'tie_word_embeddings is "false", not true or false'),
        ({"vocab_size": 10**25}, "vocab_size"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, not a number above 0"),
        ({"transformers_weights": "../model.safetensors"}, "not the name of a file in the folder"),
        ({"bos_token_id": [1]}, "bos_token_id is [1]"),
    ],
)
def test_the_key_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    assert words in line(folder(tmp_path / "hf", changes))


@pytest.mark.parametrize("key", [key for key in LlamaFields.model_fields if key in CONFIG][:7])
def test_missing_keys(key: str) -> None:
    raw = {name: value for name, value in CONFIG.items() if name != key}
    needed = LlamaFields.model_fields[key].is_required() and key != "model_type"
    if needed:
        with pytest.raises(UserError, match=f"{key} is missing"):
            config_from_hf(raw, "here")
    elif key != "model_type":
        config_from_hf(raw, "here")


@pytest.mark.parametrize("key", list(GenerationFields.model_fields))
def test_a_generation_setting_of_any_kind(key: str) -> None:
    refused = 0
    for value in ODD:
        try:
            checked(GenerationFields, {key: value}, "here")
        except UserError as error:
            assert error.what.startswith(f"{key} is ") and error.where == "here"
            refused += 1
    assert refused >= 8


def test_a_setting_is_checked_when_the_folder_is_opened(tmp_path: Path) -> None:
    path = folder(tmp_path / "hf")
    (path / "generation_config.json").write_text('{"eos_token_id": {"a": 1}}')
    assert 'generation_config.json: eos_token_id is {"a": 1}, not a token id' in line(path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"3", b"null", b'"x"', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"[" * 100_000]
    + [b'{"a":' * 50_000, b'{"vocab_size": ' + b"9" * 5000 + b"}", b"{'a': 1}"],
    ids=range(12),
)
def test_what_is_no_json_object(tmp_path: Path, name: str, data: bytes) -> None:
    path = folder(tmp_path / "hf")
    (path / name).write_bytes(data)
    assert name in line(path)


def test_nan_and_halves_of_characters(tmp_path: Path) -> None:
    path = folder(tmp_path / "hf")
    (path / "config.json").write_text(json.dumps({**CONFIG, "rms_norm_eps": float("nan")}))
    assert "rms_norm_eps is NaN" in line(path)
    write_json(path / "config.json", {**CONFIG, "note": "\ud800"})
    assert read_json(path / "config.json")["note"] == "\ud800" and not line(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4))
def test_any_configuration(changes: dict[str, Any]) -> None:
    try:
        config = config_from_hf({**CONFIG, **changes}, "here")
    except UserError as error:
        assert "here" in error.line() and "\n" not in error.line()
    else:
        assert config.parameter_count() > 0


def test_shapes_beyond_any_model_are_refused_at_once() -> None:
    for key, value in (("layers", 10**9), ("hidden", 1e19), ("vocab", 10**12), ("max_seq_len", 1e12)):
        with pytest.raises(ValueError, match=key):
            ModelConfig(**{**SHAPE, key: value})
    for key, value in (("rope_theta", 1e300), ("rope_theta", 1e-300), ("norm_eps", 1e10), ("kv_heads", 1e19)):
        with pytest.raises(ValueError, match=key):
            ModelConfig(**{**SHAPE, key: value})


def test_a_model_that_memory_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path / "hf")
    load_model(HFFolder(path))
    monkeypatch.setattr(fit, "memory", lambda: Memory(2000, 2000))
    with pytest.raises(UserError, match=r"712 parameters take 0\.0 MB, and this machine has 0\.0 MB"):
        load_model(HFFolder(path))
    monkeypatch.setattr(fit, "memory", lambda: Memory(400, 400))
    with pytest.raises(UserError, match="largest tensor take"):
        from_hf(path, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "memory", lambda: Memory(3 * 10**9, 10**9))
    cpu = torch.device("cpu")
    fit.check_fits(10**9, cpu, "weights", "here")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"take 1\.0 GB in each of 4 processes, and this machine has 3\.0 GB"):
        fit.check_fits(10**9, cpu, "weights", "here")
    fit.check_fits(10**12, torch.device("meta"), "weights", "here")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "x")
    assert fit.local_ranks() == 1


@pytest.mark.slow
def test_a_run_that_memory_cannot_hold(tmp_path: Path) -> None:
    """Said with the size before anything of the model is allocated."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("some text to learn from " * 200)
    recipe = {
        "run": {"name": "big", "steps": 1, "dir": str(tmp_path / "run")},
        "model": {
            "layers": 4,
            "hidden": 100000,
            "heads": 1000,
            "ffn": 1000000,
            "vocab": 300,
            "max_seq_len": 64,
        },
        "data": {"sources": [{"path": str(tmp_path / "text")}], "tokenizer": "bytes", "seq_len": 64},
        "compile": False,
    }
    recipe["data"] |= {"micro_batch": 1, "global_batch": 1, "holdout": 0}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "hlat", "train", str(tmp_path / "r.yaml")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "1,360,060,900,000 parameters and what training keeps beside them take" in ended.stderr
    assert "GB of memory" in ended.stderr.splitlines()[-1]
