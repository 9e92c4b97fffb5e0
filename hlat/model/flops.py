"""Floating-point operations of a training step, for model FLOPs utilisation (MFU).

Counted: two operations (multiply, add) per weight of every matrix a token passes through, attention scores
and their product with the values; the backward pass costs twice the forward. Not counted: the embedding
look-up (no arithmetic), norms, softmax, rotation, optimizer, and work done again by recompute, so MFU states
useful work only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hlat.model.config import ModelConfig


def matmul_parameters(config: ModelConfig) -> int:
    """Weights of all linear layers, with the head (multiplied even if tied) and without the embedding."""
    query = config.hidden * config.heads * config.head_dim
    key = config.hidden * config.kv_heads * config.head_dim
    per_layer = 2 * query + 2 * key + 3 * config.hidden * config.ffn
    return config.layers * per_layer + config.hidden * config.vocab


def flops_per_token(config: ModelConfig, seq_len: int, *, backward: bool = True, head: bool = True) -> float:
    """Operations per token at this sequence length.

    6·(matmul weights) + 6·layers·heads·head_dim·(seq_len + 1): a causal token sees (seq_len + 1) / 2 keys on
    average, and each costs 4·heads·head_dim forward (score and value). Many MFU figures elsewhere count the
    whole square, 12·layers·hidden·seq_len; theirs are higher for the same speed. Masked documents see fewer
    keys still; they are counted as one causal sequence.

    Args:
        seq_len: length of the attended rows.
        backward: False counts the forward pass alone (a third).
        head: False leaves out the head, for objectives that make logits of a few places only.
    """
    matmul = 2 * (matmul_parameters(config) - (0 if head else config.hidden * config.vocab))
    attention = 2 * config.layers * config.heads * config.head_dim * (seq_len + 1)
    return float((3 if backward else 1) * (matmul + attention))
