"""Attention through NxD's flash kernel: written for Neuron cores, so it runs nowhere else."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from hlat.backend.neuron.limits import flash_unfit


def unusable(seq_len: int, document_mask: bool) -> str:
    """Why the kernel cannot be used, in a line; empty when it can."""
    if reason := flash_unfit(seq_len, document_mask):
        return reason
    try:
        kernels = importlib.import_module("neuronxcc.nki.kernels")
        importlib.import_module("neuronx_distributed.kernels.flash_attn")
    except ImportError as error:
        return f"NxD's flash kernel cannot be imported ({error})"
    if not hasattr(kernels, "flash_fwd"):
        return "neuronxcc has no kernel flash_fwd"
    return ""


def flash_attention(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask: Any = None) -> Tensor:
    """Causal attention, as `hlat.model.attention.CoreAttention` without a mask. Returns (B, S, H, K).

    The kernel wants (B, H, K, S), one key head for each query head, and gives (B, H, S, K).
    """
    from neuronx_distributed.kernels.flash_attn import nki_flash_attn_func

    if mask is not None:
        raise ValueError("NxD's flash kernel takes no mask")
    shared = q_BSHK.shape[2] // k_BTGK.shape[2]
    k, v = (x.repeat_interleave(shared, dim=2) if shared > 1 else x for x in (k_BTGK, v_BTGK))
    q, k, v = (x.permute(0, 2, 3, 1) for x in (q_BSHK, k, v))
    out: Tensor = nki_flash_attn_func(q, k, v, lnc=1, causal=True, transpose_nki_inputs=True)
    return out.transpose(1, 2)
