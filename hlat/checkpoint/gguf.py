"""Llama models in llama.cpp's GGUF files, as a source of weights to import.

Quantised tensors are expanded to fp32. llama.cpp pairs neighbouring dimensions in its rotary embedding, so
its files hold the rows of the query and key projections in another order; that is undone here.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hlat.checkpoint.gguf_header import header_problem
from hlat.checkpoint.gguf_tokenizer import write_tokenizer
from hlat.checkpoint.hf import import_weights
from hlat.checkpoint.hf_config import model_fields
from hlat.checkpoint.hf_schema import shown
from hlat.checkpoint.weights import PREFIX
from hlat.errors import UserError, missing_extra
from hlat.model.config import ModelConfig
from hlat.model.init import parameter_shapes
from hlat.storage.digests import file_digest

if TYPE_CHECKING:
    import numpy as np

_TOP = {
    "embed.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
}
_LAYER = {
    "attention_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.o": "attn_output",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}


_KEYS = {
    "layers": "llama.block_count",
    "hidden": "llama.embedding_length",
    "heads": "llama.attention.head_count",
    "kv_heads": "llama.attention.head_count_kv",
    "ffn": "llama.feed_forward_length",
    "max_seq_len": "llama.context_length",
    "norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
}
_NEEDED = ("layers", "hidden", "heads", "ffn", "max_seq_len")


def gguf_name(name: str) -> str:
    """ "layers.3.attention.q.weight" -> "blk.3.attn_q.weight"."""
    if name in _TOP:
        return _TOP[name]
    _, index, rest = name.split(".", 2)
    return f"blk.{index}.{_LAYER[rest.removesuffix('.weight')]}.weight"


def undo_permutation(rows: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection from neighbouring pairs to two halves per head. (heads·K, D) -> the
    same shape."""
    size = rows.shape[0] // heads
    return rows.view(heads, size // 2, 2, -1).transpose(1, 2).reshape(rows.shape)


class GGUFFile:
    """A GGUF file as a WeightSource. Raises UserError for a file that is not GGUF, or not a plain Llama
    model.

    Args:
        path: the file.
        tokenizer: folder to write the tokenizer's files into; where the file's tokenizer cannot be expressed,
            it stays empty and `warnings` says why.
    """

    def __init__(self, path: str | Path, tokenizer: Path | None = None) -> None:
        try:
            import gguf
        except ImportError:
            raise missing_extra("gguf", "gguf", "reading a GGUF file") from None
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError("no such file", where=str(path))
        try:
            problem = header_problem(self.path)
            reader = None if problem else gguf.GGUFReader(self.path)
        except Exception as error:  # the package raises whatever a damaged file leads it to
            problem, reader = f"{type(error).__name__}: {error}", None
        if reader is None:
            raise UserError(f"not a readable GGUF file ({problem[:200]})", where=str(path))
        self._dequantize = gguf.dequantize
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._fields = reader.fields
        self.config = self._config()
        self._names = {PREFIX + name: gguf_name(name) for name in parameter_shapes(self.config)}
        self.warnings: list[str] = []
        kept = (
            {"config": {}, "generation_config": {}} if tokenizer is None else self._write_tokenizer(tokenizer)
        )
        self.meta: dict[str, Any] = {
            "model": self.config.model_dump(),
            "step": 0,
            "huggingface": kept,
        }
        self.tokenizer = tokenizer if tokenizer is not None and any(tokenizer.iterdir()) else None

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata value, `default` when the key is absent. Raises UserError for one that is damaged."""
        try:
            return self._fields[key].contents() if key in self._fields else default
        except Exception as error:  # text that is not UTF-8, an empty list, …
            what = f"{key} cannot be read ({type(error).__name__})"
            raise UserError(what, where=str(self.path), fix="copy the file again") from None

    def _number(self, key: str, default: float) -> float:
        """A number of the metadata as it was written, before fp32 made it longer."""
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{key} is {shown(value)}, not a number", where=str(self.path))
        return _shortest(value)

    def _config(self) -> ModelConfig:
        def refuse(what: str) -> UserError:
            return UserError(what, where=str(self.path), fix="only plain Llama models can be imported")

        architecture = self.value("general.architecture")
        if architecture != "llama":
            raise refuse(f"the architecture is {shown(architecture)}")
        if self.value("llama.expert_count", 0):
            raise refuse("the model is a mixture of experts")
        if self.value("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in self._tensors:
            raise refuse("scaled rotary positions are not supported")
        values: dict[str, Any] = {name: self.value(key) for name, key in _KEYS.items()}
        embedding = self._tensors.get("token_embd.weight")
        missing = [_KEYS[name] for name in _NEEDED if values[name] is None]
        missing += ["token_embd.weight"] if embedding is None or not len(embedding.shape) else []
        if embedding is None or missing:
            raise refuse(f"{missing[0]} is missing")
        values |= {
            "vocab": int(embedding.shape[-1]),
            "norm_eps": self._number(_KEYS["norm_eps"], 1e-5),
            "rope_theta": self._number(_KEYS["rope_theta"], 10000.0),
            "tie_embeddings": "output.weight" not in self._tensors,
        }
        config = model_fields(values, _KEYS, str(self.path))
        for key in ("rope.dimension_count", "attention.key_length"):
            if (size := self.value(f"llama.{key}", config.head_dim)) != config.head_dim:
                raise refuse(f"llama.{key} is {shown(size)}, not the head size {config.head_dim}")
        return config

    def _write_tokenizer(self, folder: Path) -> dict[str, Any]:
        values = {key: self.value(key) for key in self._fields if key.startswith("tokenizer.")}
        problem = write_tokenizer(values, folder, self.config.max_seq_len)
        if problem:
            self.warnings.append(f"{self.path}: {problem}, so the checkpoint has no tokenizer")

        def token(kind: str) -> int | None:
            index = values.get(f"tokenizer.ggml.{kind}_token_id")
            fine = isinstance(index, int) and not isinstance(index, bool) and 0 <= index < self.config.vocab
            return index if fine else None

        ids = {f"{kind}_token_id": token(kind) for kind in ("bos", "eos")}
        pad = token("padding")
        ids |= {"pad_token_id": pad} if pad is not None else {}
        return {"config": ids, "generation_config": ids}

    def names(self) -> list[str]:
        """Logical names of the tensors in the file; of an unknown one, `model/` and its name there."""
        known = set(self._names.values())
        extra = [f"{PREFIX}{name}" for name in self._tensors if name not in known]
        return [name for name, other in self._names.items() if other in self._tensors] + extra

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, slowest axis first."""
        # GGUF lists the fastest axis first.
        return tuple(int(n) for n in reversed(self._tensors[self._names[name]].shape))

    def dtype(self, name: str) -> torch.dtype:
        """fp32 for every tensor: the values that its blocks stand for."""
        return torch.float32

    def content(self) -> str:
        """SHA-256 (hex) of the file. Raises UserError if it cannot be read."""
        return file_digest(self.path)

    def read(self, name: str) -> Tensor:
        """A tensor in fp32 and in HLAT's order of rows, dequantised by the package `gguf`. Raises UserError
        for a type that the package does not know, and for a file that is cut or damaged.
        """
        tensor = self._tensors[self._names[name]]
        try:
            data: np.ndarray = self._dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UserError(
                f"{tensor.name} is quantised as {kind}",
                where=str(self.path),
                fix="take a file of another type",
            ) from None
        except Exception as error:  # of numpy, for data that is not what the header says
            what = f"{tensor.name} cannot be read ({error})"
            raise UserError(what, where=str(self.path), fix="copy the file again") from None
        rows = torch.from_numpy(data.copy()).view(self.shape(name)).float()
        if name.endswith("attention.q.weight"):
            return undo_permutation(rows, self.config.heads)
        return undo_permutation(rows, self.config.kv_heads) if name.endswith("attention.k.weight") else rows


def _shortest(value: float) -> float:
    """The shortest decimal of an fp32 number: 9.999999747e-06 was written as 1e-05."""
    return float(f"{value:.6g}")


def from_gguf(file: str | Path, out: str | Path, dtype: str = "keep") -> list[str]:
    """Imports a GGUF file as a weights-only checkpoint, tensor by tensor. Returns warnings for the user.

    Args:
        dtype: bf16, fp16, fp32 or keep, which is fp32 here: the values a quantised file stands for.
    """
    with tempfile.TemporaryDirectory() as scratch:
        source = GGUFFile(file, Path(scratch))
        warnings = import_weights(source, out, dtype)
    return source.warnings or warnings
