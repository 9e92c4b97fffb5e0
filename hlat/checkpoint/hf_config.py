"""Hugging Face's config.json and parameter names for Llama, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError

from hlat.checkpoint.hf_schema import LlamaFields, checked, shown
from hlat.errors import UserError
from hlat.model.config import ModelConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_ONLY = "only plain Llama models can be converted"
# LlamaModel: a model that was saved without its head, which is the embedding then.
_LLAMA: tuple[Any, ...] = (None, [], ["LlamaForCausalLM"], ["LlamaModel"])
_FIELDS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}
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

    Raises UserError for a value of the wrong type, with its key, and for what HLAT's decoder is not.
    """

    def refuse(what: str) -> UserError:
        return UserError(what, where=where, fix=_ONLY)

    if raw.get("model_type") != "llama" or raw.get("architectures") not in _LLAMA:
        named = raw.get("architectures")
        named = ", ".join(map(str, named)) if isinstance(named, list) and named else shown(named)
        raise refuse(f"the architecture is {named[:80]} ({shown(raw.get('model_type'))})")
    found = checked(LlamaFields, raw, where)
    # transformers 5 keeps theta and scaling together in rope_parameters; before it they were two keys.
    ropes = [rope for rope in (found.rope_parameters, found.rope_scaling) if rope is not None]
    kind = next((rope.kind for rope in ropes if rope.kind != "default"), "default")
    partial = [rope.partial_rotary_factor for rope in ropes] + [found.partial_rotary_factor]
    if kind != "default" or any(part not in (None, 1.0) for part in partial):
        raise refuse(f"scaled or partial rotary positions ({shown(kind)}) are not supported")
    for key in ("attention_bias", "mlp_bias"):
        if getattr(found, key):
            raise refuse(f"{key} is set, and HLAT's layers have no biases")
    if found.hidden_act not in ("silu", "swish"):
        raise refuse(f"the activation is {shown(found.hidden_act)}, not silu")
    if found.quantization_config:
        raise refuse("the weights are quantised")
    theta = next((rope.rope_theta for rope in ropes if rope.rope_theta), found.rope_theta)
    values = {name: getattr(found, key) for name, key in _FIELDS.items()}
    config = model_fields(values | {"rope_theta": theta or 10000.0}, _FIELDS, where)
    if (found.head_dim or config.head_dim) != config.head_dim:
        raise refuse(f"head_dim {found.head_dim} is not hidden_size / num_attention_heads")
    return config


def model_fields(values: Mapping[str, Any], keys: Mapping[str, str], where: str) -> ModelConfig:
    """The configuration with these values; those that are None are left out.

    Args:
        keys: what a field is called in the file, for messages.

    Raises UserError for an impossible shape, with the key.
    """
    try:
        return ModelConfig(**{name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    context = problem.get("ctx") or {}
    name = str(context.get("key") or next(iter(problem["loc"]), ""))
    key = f"{keys.get(name, name)}: " if name else ""
    raise UserError(f"impossible shape: {key}{problem['msg']}", where=where, fix=_ONLY) from None
