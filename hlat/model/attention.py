"""Causal self-attention with grouped key/value heads.

Shapes: B rows, S positions, T keys, H query heads, G key/value heads, K head size, D hidden size. Every count
of heads is read from the tensors, so a rank that holds a part of the heads runs the same code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hlat.model.blocked_attention import MAX_POSITIONS, blocked_attention
from hlat.model.dtype import at_least_fp32
from hlat.model.joint import project
from hlat.model.products import Linear, attention, matmul
from hlat.model.rope import rotate


class Mask(NamedTuple):
    """Which keys a query may see, when that is not simply "all earlier positions" (then the mask is None).

    allowed: bool (B or 1, 1, S, T), True where query s may see key t; already causal.
    documents: int (B, S), the numbers `allowed` was made of, for kernels that work on them directly; None
    with a cache.
    """

    allowed: Tensor
    documents: Tensor | None = None


def branch_mask(branches_BS: Tensor) -> Mask:
    """Causal attention of a shared beginning and the branches that continue it, side by side in one row.

    branches_BS: int (B, S), 0 = the beginning, other numbers = branches; a branch sees the beginning and
    itself.
    """
    S = branches_BS.shape[1]
    keys = branches_BS[:, None, :]
    same = (branches_BS[:, :, None] == keys) | (keys == 0)
    causal = torch.ones(S, S, dtype=torch.bool, device=branches_BS.device).tril()
    return Mask((same & causal)[:, None])


def document_mask(documents_BS: Tensor) -> Mask:
    """Causal attention inside equal document numbers. documents_BS: int (B, S)."""
    S = documents_BS.shape[1]
    same = documents_BS[:, :, None] == documents_BS[:, None, :]
    causal = torch.ones(S, S, dtype=torch.bool, device=documents_BS.device).tril()
    return Mask((same & causal)[:, None], documents_BS)


class LayerCache:
    """Keys and values of one layer for at most T positions, of fixed shape (B, T, G, K)."""

    def __init__(self, k_BTGK: Tensor, v_BTGK: Tensor) -> None:
        self.k, self.v = k_BTGK, v_BTGK

    def update(self, slots_S: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> tuple[Tensor, Tensor]:
        """Writes S new keys and values at the given positions and returns all T of them (the unwritten ones
        are masked by the caller)."""
        self.k.index_copy_(1, slots_S, k_BSGK)
        self.v.index_copy_(1, slots_S, v_BSGK)
        return self.k, self.v


class KVCache:
    """Static key/value cache for generation: shapes never change, so a compiled or traced step is reused for
    every token.

    The rows of a batch are fed in the same slots. Rows of different length are padded on the left: `starts_B`
    says in which slot each one begins.

    Args:
        layers: names of the layers, as in `Decoder.layers`.
        batch, length: B and T, the most slots that will be fed.
        kv_heads, head_dim: of this process's part of a layer.
        starts_B: int64 (B,); None = all rows begin in slot 0.
        longest: positions of the model. Slots may go on beyond them where a row is padded on the right.
    """

    def __init__(
        self,
        layers: Iterable[str],
        batch: int,
        length: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        starts_B: Tensor | None = None,
        longest: int | None = None,
    ) -> None:
        shape = (batch, length, kv_heads, head_dim)
        self.length, self.starts_B = length, starts_B
        self._last = None if longest is None else longest - 1
        self.layers = {
            name: LayerCache(
                torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
            )
            for name in layers
        }

    def positions(self, slots_BS: Tensor) -> Tensor:
        """Positions for RoPE of what is fed in these slots: counted from each row's start, 0 before it, and
        the model's last one for padding that lies beyond it.
        """
        if self.starts_B is None:
            return slots_BS
        return (slots_BS - self.starts_B[:, None]).clamp(min=0, max=self._last)

    def mask(self, slots_BS: Tensor) -> Mask:
        """A query in slot p sees the keys in the slots from its row's start to p. Padding sees padding: a
        query without any key would give NaN, which spreads.
        """
        keys_T = torch.arange(self.length, device=slots_BS.device)
        causal = keys_T <= slots_BS[:1, :, None]
        if self.starts_B is None:
            return Mask(causal[:, None])
        starts = self.starts_B[:, None, None]
        return Mask((causal & ((keys_T >= starts) | (slots_BS[:1, :, None] < starts)))[:, None])


def plain_attention(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask: Mask | None) -> Tensor:
    """Matmul, fp32 softmax, matmul: what HLAT ran on Trainium, and the reference for every other kernel.
    Returns (B, S, H, K)."""
    B, S, H, K = q_BSHK.shape
    T, G = k_BTGK.shape[1], k_BTGK.shape[2]
    # Query heads that share a key head become one longer query, so that keys are never copied.
    q = q_BSHK.transpose(1, 2).reshape(B, G, H // G * S, K)
    k, v = k_BTGK.transpose(1, 2), v_BTGK.transpose(1, 2)
    scores = at_least_fp32(matmul(q, k.transpose(-1, -2)).view(B, G, H // G, S, T)) / math.sqrt(K)
    if mask is None:
        allowed = torch.ones(S, T, dtype=torch.bool, device=q.device).tril()
    else:
        allowed = mask.allowed[:, :, None]
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1).to(v.dtype)
    out = matmul(weights.view(B, G, H // G * S, T), v)
    return out.view(B, H, S, K).transpose(1, 2)


def flash_attention(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask: Mask | None) -> Tensor:
    """PyTorch's fused attention: never holds the (S, T) scores. Returns (B, S, H, K)."""
    q, k, v = q_BSHK.transpose(1, 2), k_BTGK.transpose(1, 2), v_BTGK.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    if mask is None:
        out = attention(q, k, v, is_causal=True, enable_gqa=grouped)
    else:
        out = attention(q, k, v, attn_mask=mask.allowed, enable_gqa=grouped)
    return out.transpose(1, 2)


class CoreAttention(nn.Module):
    """softmax(q·k/√K)·v on plain tensors: no weights and no communication, so that selective recompute can
    wrap it.

    Args:
        kind: `plain`; `flash`; or `auto`: blocks of queries on a CPU (flash for long rows), flash on CUDA,
            plain elsewhere, where XLA's compiler fuses it.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask: Mask | None = None) -> Tensor:
        """q (B, S, H, K), k and v (B, T, G, K), H a multiple of G; mask None = causal with T = S. Returns (B,
        S, H, K) in q's dtype."""
        device, S, T = q_BSHK.device.type, q_BSHK.shape[1], k_BTGK.shape[1]
        if self.kind == "plain" or (self.kind == "auto" and device not in ("cpu", "cuda")):
            return plain_attention(q_BSHK, k_BTGK, v_BTGK, mask)
        if self.kind == "auto" and device == "cpu" and 1 < S == T <= MAX_POSITIONS:
            return blocked_attention(q_BSHK, k_BTGK, v_BTGK, None if mask is None else mask.allowed)
        return flash_attention(q_BSHK, k_BTGK, v_BTGK, mask)


class Attention(nn.Module):
    """Projections, rotation, core attention and output projection, no biases."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int, kind: str) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q = Linear(hidden, heads * head_dim)
        self.k = Linear(hidden, kv_heads * head_dim)
        self.v = Linear(hidden, kv_heads * head_dim)
        self.o = Linear(heads * head_dim, hidden)
        self.core = CoreAttention(kind)
        self.joint = False  # one product for q, k and v: see `hlat.model.joint`

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Mask | None = None,
        cache: LayerCache | None = None,
        slots_S: Tensor | None = None,
    ) -> Tensor:
        """(B, S, D) -> (B, S, D). `rope` = cos and sin from `Rope`; with a cache, `slots_S` says where the
        new keys go."""
        q, k, v = project(x_BSD, (self.q, self.k, self.v), self.joint)
        # From q, not from x: under sequence parallelism x is a part of the sequence, q is all of it.
        B, S = q.shape[0], q.shape[1]
        q = rotate(q.view(B, S, -1, self.head_dim), *rope)
        k = rotate(k.view(B, S, -1, self.head_dim), *rope)
        v = v.view(B, S, -1, self.head_dim)
        if cache is not None and slots_S is not None:
            k, v = cache.update(slots_S, k, v)
        return self.o(self.core(q, k, v, mask).reshape(B, S, -1))
