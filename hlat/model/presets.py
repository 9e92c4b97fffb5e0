"""Model shapes by name. Any field may be overridden beside `preset` in a recipe.

The two HLAT shapes and their initialisation are those of arXiv 2404.10630 and the scripts published with it;
the LLaMA and SmolLM2 shapes are those of their published configurations.
"""

from __future__ import annotations

from typing import Any

_COLUMNS = ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "max_seq_len")


def _shape(*numbers: int, **more: Any) -> dict[str, Any]:
    return {**dict(zip(_COLUMNS, numbers, strict=True)), **more}


PRESETS: dict[str, dict[str, Any]] = {
    # layers, hidden, heads, kv_heads, ffn, vocab, max_seq_len
    "tiny": _shape(4, 256, 4, 4, 688, 4096, 256),  # trains on two CPU cores in minutes
    "160m": _shape(12, 768, 12, 12, 3072, 32000, 2048),
    "1b": _shape(16, 2048, 32, 8, 8192, 32000, 4096),  # 8 kv_heads: tp up to 8 replicates none
    # The 7B run initialised with 0.021; the 70B script passes 0.021 too but never uses it, so 0.02 applied.
    "hlat-7b": _shape(32, 4096, 32, 32, 11008, 32000, 4096, init_std=0.021),
    "hlat-70b": _shape(80, 8192, 64, 8, 28672, 32000, 4096, init_std=0.02),
    "smollm2-135m": _shape(30, 576, 9, 3, 1536, 49152, 8192, rope_theta=100000.0, tie_embeddings=True),
    "llama-2-7b": _shape(32, 4096, 32, 32, 11008, 32000, 4096),
    "llama-3-8b": _shape(32, 4096, 32, 8, 14336, 128256, 8192, rope_theta=500000.0),
}
