"""Llama models in llama.cpp's GGUF files, as a source of weights to import.

Quantised tensors are expanded to fp32. llama.cpp pairs neighbouring dimensions in its rotary embedding, so
its files hold the rows of the query and key projections in another order; that is undone here.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import Tensor

from hlat.checkpoint.gguf_tokenizer import write_tokenizer
from hlat.checkpoint.hf import import_weights
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
            reader = gguf.GGUFReader(self.path)
        except (ValueError, OSError, IndexError, OverflowError) as error:
            raise UserError(f"not a readable GGUF file ({error})", where=str(path)) from None
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
        """A metadata value, `default` when the key is absent."""
        return self._fields[key].contents() if key in self._fields else default

    def _config(self) -> ModelConfig:
        def refuse(what: str) -> UserError:
            return UserError(what, where=str(self.path), fix="only plain Llama models can be imported")

        architecture = self.value("general.architecture")
        if architecture != "llama":
            raise refuse(f"the architecture is {architecture}")
        if self.value("llama.expert_count", 0):
            raise refuse("the model is a mixture of experts")
        if self.value("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in self._tensors:
            raise refuse("scaled rotary positions are not supported")
        try:
            heads = self.value("llama.attention.head_count")
            config = ModelConfig(
                layers=self.value("llama.block_count"),
                hidden=self.value("llama.embedding_length"),
                heads=heads,
                kv_heads=self.value("llama.attention.head_count_kv", heads),
                ffn=self.value("llama.feed_forward_length"),
                vocab=int(self._tensors["token_embd.weight"].shape[-1]),
                max_seq_len=self.value("llama.context_length"),
                norm_eps=_shortest(self.value("llama.attention.layer_norm_rms_epsilon", 1e-5)),
                rope_theta=_shortest(self.value("llama.rope.freq_base", 10000.0)),
                tie_embeddings="output.weight" not in self._tensors,
            )
        except KeyError as error:
            raise refuse(f"{error.args[0]} is missing") from None
        except ValidationError as error:
            problem = error.errors()[0]
            raise refuse(f"impossible shape: {'.'.join(map(str, problem['loc']))} {problem['msg']}") from None
        sizes = {
            self.value(f"llama.{key}", config.head_dim)
            for key in ("rope.dimension_count", "attention.key_length")
        }
        if sizes != {config.head_dim}:
            raise refuse(f"rotated or key size {sorted(sizes)} is not the head size {config.head_dim}")
        return config

    def _write_tokenizer(self, folder: Path) -> dict[str, Any]:
        values = {key: self.value(key) for key in self._fields if key.startswith("tokenizer.")}
        problem = write_tokenizer(values, folder, self.config.max_seq_len)
        if problem:
            self.warnings.append(f"{self.path}: {problem}, so the checkpoint has no tokenizer")
        ids = {f"{kind}_token_id": values.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos")}
        pad = values.get("tokenizer.ggml.padding_token_id")
        ids |= {"pad_token_id": pad} if pad is not None else {}
        return {"config": ids, "generation_config": ids}

    def names(self) -> list[str]:
        known = set(self._names.values())
        extra = [f"{PREFIX}{name}" for name in self._tensors if name not in known]
        return [name for name, other in self._names.items() if other in self._tensors] + extra

    def shape(self, name: str) -> tuple[int, ...]:
        # GGUF lists the fastest axis first.
        return tuple(int(n) for n in reversed(self._tensors[self._names[name]].shape))

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def content(self) -> str:
        return file_digest(self.path)

    def read(self, name: str) -> Tensor:
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
