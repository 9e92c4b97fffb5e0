"""Hugging Face's config.json and parameter names for Llama, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from hlat.errors import UserError
from hlat.model.config import ModelConfig

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


def hf_name(name: str) -> str:
    """ "layers.3.attention.q.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    if name in _TOP:
        return _TOP[name]
    _, index, rest = name.split(".", 2)
    return f"model.layers.{index}.{_LAYER[rest.removesuffix('.weight')]}.weight"


def config_to_hf(config: ModelConfig, dtype: torch.dtype, extra: dict[str, Any]) -> dict[str, Any]:
    """config.json for LlamaForCausalLM, readable by transformers 4 and 5.

    Args:
        dtype: of the weights.
        extra: special token ids and other keys to keep.
    """
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
    """The model configuration of a config.json; absent keys have LlamaConfig's defaults.

    Args:
        where: the file, for messages.

    Raises UserError for what HLAT's decoder is not.
    """

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
