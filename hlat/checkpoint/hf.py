"""Hugging Face folders of the Llama architecture: read as a source of weights, imported, exported.

Everything goes tensor by tensor, so memory does not grow with the model. An export that fails leaves nothing
behind.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from hlat.checkpoint.codec import CODE_DTYPES
from hlat.checkpoint.hf_tokenizer import copy_tokenizer, export_tokenizer, special_ids, tokenizer_texts
from hlat.checkpoint.output import new_folder
from hlat.checkpoint.safetensors_writer import write_safetensors
from hlat.checkpoint.weights import PREFIX, WeightSource, model_config, open_weights, source_tokenizer
from hlat.errors import UserError
from hlat.model.config import ModelConfig
from hlat.model.init import parameter_shapes

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TORCH_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_LAYER = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{f"attention.{x}": f"self_attn.{x}_proj" for x in "qkvo"},
    **{f"mlp.{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id")
_GENERATION = "generation_config.json"
_NO_TOKENIZER = "no tokenizer"
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def hf_name(name: str) -> str:
    """ "layers.3.attention.q.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    if name in _TOP:
        return _TOP[name]
    _, index, rest = name.split(".", 2)
    return f"model.layers.{index}.{_LAYER[rest.removesuffix('.weight')]}.weight"


def config_to_hf(config: ModelConfig, dtype: torch.dtype, extra: dict[str, Any]) -> dict[str, Any]:
    """config.json for LlamaForCausalLM, readable by transformers 4 and 5. `extra`: special token ids and
    other keys to keep."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": config.init_std,
        "torch_dtype": _TORCH_NAMES[dtype],
        "bos_token_id": None,
        "eos_token_id": None,
        **extra,
    }


def config_from_hf(raw: dict[str, Any], where: str) -> ModelConfig:
    """The model configuration of a config.json; absent keys have LlamaConfig's defaults. Raises UserError for
    what HLAT's decoder is not."""

    def refuse(what: str) -> UserError:
        return UserError(what, where=where, fix="only plain Llama models can be converted")

    architectures = raw.get("architectures") or ["LlamaForCausalLM"]
    if raw.get("model_type") != "llama" or architectures != ["LlamaForCausalLM"]:
        raise refuse(f"the architecture is {', '.join(map(str, architectures))} ({raw.get('model_type')})")
    # transformers 5 keeps theta and scaling together in rope_parameters; before it they were two keys.
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if (
        kind not in ("default", None)
        or rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0
    ):
        raise refuse(f"scaled or partial rotary positions ({kind}) are not supported")
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise refuse(f"{key} is set, and HLAT's layers have no biases")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise refuse(f"the activation is {raw['hidden_act']}, not silu")
    if raw.get("quantization_config"):
        raise refuse("the weights are quantised")
    try:
        config = ModelConfig(
            layers=raw["num_hidden_layers"],
            hidden=raw["hidden_size"],
            heads=raw["num_attention_heads"],
            kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            ffn=raw["intermediate_size"],
            vocab=raw["vocab_size"],
            max_seq_len=raw.get("max_position_embeddings", 2048),
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
            tie_embeddings=raw.get("tie_word_embeddings", False),
            init_std=raw.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise refuse(f"{error.args[0]} is missing") from None
    except ValidationError as error:
        raise refuse(f"impossible shape: {error.errors()[0]['msg']}") from None
    if (raw.get("head_dim") or config.head_dim) != config.head_dim:
        raise refuse(f"head_dim {raw['head_dim']} is not hidden_size / num_attention_heads")
    return config


class HFFolder:
    """A folder with config.json and safetensors files, as a WeightSource. Its tensors have HLAT's names.

    Raises UserError for another architecture, missing weights or a shard that the index names but the folder
    lacks.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        raw = read_json(self.path / "config.json")
        config = config_from_hf(raw, where=str(self.path / "config.json"))
        kept: dict[str, Any] = {"config": {key: raw[key] for key in _KEPT if key in raw}}
        if (self.path / _GENERATION).is_file():
            kept["generation_config"] = read_json(self.path / _GENERATION)
        self.meta: dict[str, Any] = {"model": config.model_dump(), "step": 0, "huggingface": kept}
        has_tokenizer = any((self.path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
        self.tokenizer: Path | None = self.path if has_tokenizer else None
        self._hf_names = {PREFIX + name: hf_name(name) for name in parameter_shapes(config)}
        self._files = self._weight_map()
        self._open: dict[str, Any] = {}
        # A tied model may carry its head once more, and old exports the rotary frequencies.
        ignored = {"lm_head.weight"} if config.tie_embeddings else set()
        self._unknown = [
            n
            for n in self._files
            if n not in {*self._hf_names.values(), *ignored} and not n.endswith("rotary_emb.inv_freq")
        ]

    def _weight_map(self) -> dict[str, str]:
        if (self.path / _INDEX).is_file():
            files: dict[str, str] = read_json(self.path / _INDEX).get("weight_map", {})
            for file in sorted(set(files.values())):
                if Path(file).name != file or not (self.path / file).is_file():
                    raise UserError(
                        f"{file} is missing", where=str(self.path), fix="copy the whole folder again"
                    )
            return files
        if not (self.path / _SINGLE).is_file():
            what = "no safetensors weights" + (" (only .bin files)" if list(self.path.glob("*.bin")) else "")
            raise UserError(
                what,
                where=str(self.path),
                fix="save the model with save_pretrained, which writes model.safetensors",
            )
        with self._safe_open(_SINGLE) as file:
            return dict.fromkeys(file.keys(), _SINGLE)

    def _safe_open(self, file: str) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.path / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"not a readable safetensors file ({error})", where=str(self.path / file)
            ) from None

    def _file(self, name: str) -> Any:
        file = self._files[self._hf_names[name]]
        if file not in self._open:
            self._open = {
                file: self._safe_open(file)
            }  # one at a time: a mapped file counts as memory while it is open
        return self._open[file]

    def names(self) -> list[str]:
        present = [name for name, other in self._hf_names.items() if other in self._files]
        return present + [f"{PREFIX}{name}" for name in self._unknown]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file(name).get_slice(self._hf_names[name]).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        kind = self._file(name).get_slice(self._hf_names[name]).get_dtype()
        dtype: torch.dtype | None = CODE_DTYPES.get(kind)
        if dtype not in DTYPES.values():
            what = f"{self._hf_names[name]} is stored as {kind}"
            raise UserError(what, where=str(self.path), fix="save it as bfloat16, float16 or float32")
        return dtype  # type: ignore[return-value]

    def read(self, name: str) -> Tensor:
        return self._file(name).get_tensor(self._hf_names[name])


def import_weights(source: WeightSource, out: str | Path, dtype: str = "keep") -> list[str]:
    """Writes any source's weights, tensor by tensor, as a weights-only checkpoint at `out`. Returns warnings
    for the user.

    Args:
        dtype: bf16, fp16, fp32, or keep (as stored, so that the way back is bit-identical).
    """
    from hlat.checkpoint.store import write_weights

    config = model_config(source)
    target = None if dtype == "keep" else DTYPES[dtype]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in parameter_shapes(config):
            tensor = source.read(PREFIX + name)
            yield PREFIX + name, tensor.to(target or tensor.dtype)

    meta = {"model": config.model_dump(), "step": 0, "huggingface": source.meta.get("huggingface", {})}
    write_weights(out, tensors(), meta, tokenizer_texts(source.tokenizer))
    return [] if source.tokenizer else [f"{source.path} has no tokenizer, so {out} has none either"]


def from_hf(folder: str | Path, out: str | Path, dtype: str = "keep") -> list[str]:
    """Imports a Hugging Face folder as a weights-only checkpoint; `import_weights` says the rest."""
    if not (Path(folder) / "config.json").is_file():
        raise UserError("no config.json", where=str(folder), fix="give a folder in Hugging Face's layout")
    return import_weights(HFFolder(folder), out, dtype)


def to_hf(
    source: WeightSource | str | Path, out: str | Path, dtype: str = "bf16", shard_size: int = 5 * 10**9
) -> list[str]:
    """Exports a run (its newest complete checkpoint) or a step folder to Hugging Face's layout. Returns
    warnings for the user.

    Args:
        dtype: bf16, fp16, fp32, or keep (the checkpoint's own, fp32 for a training run's masters).
        shard_size: most bytes of tensors in one file; a larger tensor gets a file to itself.
    """
    if isinstance(source, (str, Path)):
        source = open_weights(source)
    config = model_config(source)
    names = [PREFIX + name for name in parameter_shapes(config)]
    dtypes = {name: source.dtype(name) if dtype == "keep" else DTYPES[dtype] for name in names}
    if dtype == "keep":
        names.sort(key=lambda name: -dtypes[name].itemsize)  # stable; wide tensors first keeps every tensor
        aligned
    warnings: list[str] = []
    with new_folder(Path(out)) as partial:
        _write_shards(source, names, dtypes, shard_size, partial)
        kept, warnings = _export_texts(source, partial, config.max_seq_len)
        write_json(partial / "config.json", config_to_hf(config, dtypes[names[0]], kept["config"]))
        if kept.get("generation_config"):
            write_json(partial / _GENERATION, kept["generation_config"])
    if warnings == [_NO_TOKENIZER]:
        warnings = [f"{source.path} has no tokenizer, so {out} has none either"]
    return warnings


def _export_texts(source: WeightSource, folder: Path, max_seq_len: int) -> tuple[dict[str, Any], list[str]]:
    """Writes the tokenizer's files. Returns the parts of config.json and generation_config.json that follow
    from it, and warnings."""
    if "huggingface" in source.meta:  # came from Hugging Face and goes back as it came
        if source.tokenizer is not None:
            copy_tokenizer(source.tokenizer, folder)
        return {"config": {}, **source.meta["huggingface"]}, [] if source.tokenizer is not None else [
            _NO_TOKENIZER
        ]
    tokenizer = source_tokenizer(source)
    if tokenizer is None:
        return {"config": {}}, [_NO_TOKENIZER]
    ids = special_ids(tokenizer)
    return {"config": ids, "generation_config": ids}, export_tokenizer(tokenizer, folder, max_seq_len)


def _write_shards(
    source: WeightSource, names: list[str], dtypes: dict[str, torch.dtype], shard_size: int, folder: Path
) -> None:
    """model.safetensors, or several numbered files and their index."""
    groups: list[list[str]] = [[]]
    room = shard_size
    size = {name: math.prod(source.shape(name)) * dtypes[name].itemsize for name in names}
    for name in names:
        if groups[-1] and size[name] > room:
            groups.append([])
            room = shard_size
        groups[-1].append(name)
        room -= size[name]
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = _SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        by_hf_name = {hf_name(name.removeprefix(PREFIX)): name for name in group}
        write_safetensors(
            folder / file,
            {other: source.shape(name) for other, name in by_hf_name.items()},
            {other: dtypes[name] for other, name in by_hf_name.items()},
            lambda other, names=by_hf_name: source.read(names[other]),  # type: ignore[misc]
        )
        weight_map |= dict.fromkeys(by_hf_name, file)
    if len(groups) > 1:
        index = {
            "metadata": {"total_size": sum(size.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_json(folder / _INDEX, index)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises UserError when it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"not readable JSON ({error})", where=str(path)) from None
    if not isinstance(value, dict):
        raise UserError("not a JSON object", where=str(path))
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes indented UTF-8 JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def parse_size(text: str) -> int:
    """ "5GB", "500 MB", "1048576" -> bytes (decimal units, as Hugging Face counts). Raises UserError
    otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(B?)\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise UserError(f"'{text}' is not a size", where="--shard-size", fix="write e.g. 5GB or 500MB")
    return size
