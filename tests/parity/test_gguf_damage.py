"""GGUF files that are cut, changed or written with wrong types: one line, soon."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hlat.checkpoint.gguf import from_gguf
from hlat.checkpoint.gguf_header import header_problem
from hlat.checkpoint.hf_generation import generation_stops
from hlat.checkpoint.store import open_checkpoint
from hlat.errors import UserError

gguf = pytest.importorskip("gguf")

SHAPES = {
    "token_embd": (260, 8),
    "output_norm": (8,),
    "blk.0.attn_norm": (8,),
    "blk.0.attn_q": (8, 8),
    "blk.0.attn_k": (4, 8),
    "blk.0.attn_v": (4, 8),
    "blk.0.attn_output": (8, 8),
    "blk.0.ffn_norm": (8,),
    "blk.0.ffn_gate": (12, 8),
    "blk.0.ffn_up": (12, 8),
    "blk.0.ffn_down": (8, 12),
}
USUAL: dict[str, Any] = {
    "llama.block_count": 1,
    "llama.context_length": 16,
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 12,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.eos_token_id": 3,
}


def write(path: Path, **changes: Any) -> Path:
    from tokenizers.pre_tokenizers import ByteLevel

    writer = gguf.GGUFWriter(path, "llama")
    values = {**USUAL, "tokenizer.ggml.tokens": [*sorted(ByteLevel.alphabet()), "ab"]}
    values |= {"tokenizer.ggml.token_type": [1] * 257, "tokenizer.ggml.merges": ["a b"], **changes}
    for key, value in values.items():
        if value is None:
            continue
        kind = {
            bool: "add_bool",
            int: "add_uint32",
            float: "add_float32",
            str: "add_string",
            list: "add_array",
        }
        getattr(writer, kind[type(value)])(key, value)
    for name, shape in SHAPES.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("gguf") / "m.gguf").read_bytes()


def said(path: Path, out: Path) -> str:
    """The line that an import ends with; empty where it works."""
    try:
        from_gguf(path, out)
    except UserError as error:
        assert str(path) in error.line() and "\n" not in error.line() and len(error.line()) < 600
        assert not out.exists()
        return error.line()
    return ""


def test_a_whole_file(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(whole)
    assert header_problem(tmp_path / "m.gguf") == "" == said(tmp_path / "m.gguf", tmp_path / "ours")
    source = open_checkpoint(tmp_path / "ours")
    assert source.tokenizer is not None and generation_stops(source.meta) == {3}


def test_a_file_that_is_cut(whole: bytes, tmp_path: Path) -> None:
    for number, length in enumerate((0, 3, 4, 8, 20, 24, 100, 1000, 3000, len(whole) // 2, len(whole) - 40)):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(whole[:length])
        assert said(path, tmp_path / f"out{number}")


@pytest.mark.parametrize("place", ["tensors", "keys", "list", "text", "version", "axes"])
def test_numbers_beyond_the_file(whole: bytes, tmp_path: Path, place: str) -> None:
    data, huge = bytearray(whole), struct.pack("<Q", 10**18)
    at = {"tensors": 8, "keys": 16, "text": 24, "version": 4}.get(place)
    if place == "list":
        name = b"tokenizer.ggml.token_type"
        at = whole.index(name) + len(name) + 8
    if place == "axes":
        at = whole.index(b"output_norm.weight") + len(b"output_norm.weight")
    data[at : at + (4 if place in ("version", "axes") else 8)] = huge[
        : 4 if place in ("version", "axes") else 8
    ]
    (tmp_path / "m.gguf").write_bytes(data)
    assert "not a readable GGUF file" in said(tmp_path / "m.gguf", tmp_path / "ours")


ODD = [None, True, 0, 2**31, 1.5, float("nan"), "x", [1, 2], ["x"]]


def test_a_text_in_place_of_a_number(tmp_path: Path) -> None:
    for number, key in enumerate(key for key in USUAL if key.startswith("llama.")):
        path = write(tmp_path / f"{number}.gguf", **{key: "x"})
        assert key in said(path, tmp_path / "ours")


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key in USUAL if key.startswith("llama.")])
def test_values_of_wrong_types(tmp_path: Path, key: str) -> None:
    refused = 0
    for number, value in enumerate(ODD):
        path = write(tmp_path / f"{number}.gguf", **{key: value})
        refused += bool(said(path, tmp_path / f"out{number}"))
    assert refused >= 5


@pytest.mark.slow
@pytest.mark.parametrize("key", ["tokens", "token_type", "scores", "merges", "eos_token_id", "model", "pre"])
def test_a_tokenizer_of_wrong_types_is_left_out(tmp_path: Path, key: str) -> None:
    for number, value in enumerate(ODD):
        path = write(tmp_path / f"{number}.gguf", **{f"tokenizer.ggml.{key}": value})
        assert said(path, tmp_path / f"out{number}") == ""
        assert generation_stops(open_checkpoint(tmp_path / f"out{number}").meta) <= {0, 3, 7, 1}


@pytest.mark.slow
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_bytes_changed(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed) - 1))
        new = data.draw(st.binary(min_size=1, max_size=8))
        changed[at : at + len(new)] = new
    folder = tmp_path_factory.mktemp("any")
    (folder / "m.gguf").write_bytes(changed)
    said(folder / "m.gguf", folder / "ours")
