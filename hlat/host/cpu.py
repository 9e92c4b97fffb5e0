"""What this machine's CPU multiplies fast: the 16-bit dtypes that it has instructions for."""

from __future__ import annotations

import os

import torch

CPUINFO = "/proc/cpuinfo"
# The names in it (x86, then ARM) of instructions that multiply the dtype.
_INSTRUCTIONS = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16", "svebf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "fphp", "asimdhp"},
}
# Values of oneDNN's limit of the instructions it uses that still allow those for the dtype.
_ALLOWED_BY_LIMIT = {
    torch.bfloat16: ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10", "ALL", "DEFAULT"),
    torch.float16: ("AVX512_CORE_FP16", "AVX512_CORE_AMX_FP16", "AVX10", "ALL", "DEFAULT"),
}


def has_instructions(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies matrices of this dtype faster than fp32 ones; True for fp32 and wider.

    False where the kernel does not say (no /proc/cpuinfo), and where ONEDNN_MAX_CPU_ISA forbids PyTorch's CPU
    library to use the instructions.
    """
    if dtype not in _INSTRUCTIONS:
        return True
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    allowed = limit.upper().startswith(_ALLOWED_BY_LIMIT[dtype])
    return allowed and bool(_flags() & _INSTRUCTIONS[dtype])


def _flags() -> set[str]:
    """CPU features by the kernel's names; empty where /proc/cpuinfo does not exist."""
    try:
        with open(CPUINFO, encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.lower().startswith(("flags", "features")):
                    return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return set()


# Asked once: what a compiled graph was built on must not change under it.
WIDENED = frozenset(dtype for dtype in _INSTRUCTIONS if not has_instructions(dtype))
"""The dtypes whose products are made in fp32 on this machine's CPU: see `hlat.model.products`."""


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which matrices of `dtype` are multiplied on a device, and the result then rounded."""
    return torch.float32 if device.type == "cpu" and dtype in WIDENED else dtype
