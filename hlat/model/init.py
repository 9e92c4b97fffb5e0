"""HLAT's initialisation: normal, narrower for the matrices that write into the residual stream.

Every tensor has its own random generator, seeded by the run's seed and the tensor's name, so any tensor can
be made alone: by a rank that holds only some layers, for a slice of it, or to count norms of a model that
does not fit in memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hlat.model.config import ModelConfig

_RESIDUAL = ("attention.o.weight", "mlp.down.weight")


def tensor_seed(seed: int, name: str) -> int:
    """The 63-bit seed of one tensor: the first bytes of sha256("seed:name")."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def init_std(config: ModelConfig, name: str) -> float | None:
    """Standard deviation of the parameter called `name`; None for norm weights, which start at one.

    With `scaled_init`, attention.o and mlp.down get init_std / sqrt(2 · layers), as in HLAT-7B and 70B.
    """
    if name.endswith("norm.weight"):
        return None
    if config.scaled_init and name.endswith(_RESIDUAL):
        return config.init_std / math.sqrt(2 * config.layers)
    return config.init_std


def init_tensor(config: ModelConfig, name: str, shape: Sequence[int], seed: int) -> Tensor:
    """The initial value of one parameter, fp32 on the CPU.

    Args:
        name: global parameter name, e.g. "layers.0.attention.q.weight".
        shape: its whole shape; a rank that needs a part slices the result.
        seed: the run's seed.
    """
    std = init_std(config, name)
    if std is None:
        return torch.ones(tuple(shape), dtype=torch.float32, device="cpu")
    generator = torch.Generator(device="cpu").manual_seed(tensor_seed(seed, name))
    return torch.empty(tuple(shape), dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the model's own order; a tied head is not listed."""
    hidden, ffn = config.hidden, config.ffn
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (config.vocab, hidden)}
    for i in range(config.layers):
        shapes |= {
            f"layers.{i}.attention_norm.weight": (hidden,),
            f"layers.{i}.attention.q.weight": (query, hidden),
            f"layers.{i}.attention.k.weight": (key, hidden),
            f"layers.{i}.attention.v.weight": (key, hidden),
            f"layers.{i}.attention.o.weight": (hidden, query),
            f"layers.{i}.mlp_norm.weight": (hidden,),
            f"layers.{i}.mlp.gate.weight": (ffn, hidden),
            f"layers.{i}.mlp.up.weight": (ffn, hidden),
            f"layers.{i}.mlp.down.weight": (hidden, ffn),
        }
    shapes["norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes["head.weight"] = (config.vocab, hidden)
    return shapes | {"classifier.weight": (config.classes, hidden)} if config.classes else shapes
