"""Peak FLOP/s of a device, which model FLOP utilisation (MFU) is measured against: stated, else measured."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import torch

from hlat.host.cpu import product_dtype

# Dense bf16 TFLOP/s; the first name that occurs in the device's name wins ("H100 PCIe" before "H100").
# Vendors print the figure with 2:4 sparsity for some of these; the dense one is half of it.
_BF16_TFLOPS: tuple[tuple[str, float], ...] = (
    # AWS, trn1 architecture page: 3,040 TFLOPS bf16 on 16 chips of two NeuronCores each.
    ("trn1", 95.0),
    # AWS, trn2 architecture page: 667 TFLOPS bf16, dense, on a chip of eight NeuronCores.
    ("trn2", 667.0 / 8),
    ("H200", 989.0),  # NVIDIA H200 datasheet: 1,979 with sparsity (SXM)
    ("H100 PCIe", 756.0),  # NVIDIA H100 datasheet: 1,513 with sparsity
    ("H100 NVL", 835.0),  # NVIDIA H100 NVL datasheet: 1,671 with sparsity
    ("H100", 989.0),  # NVIDIA H100 datasheet: 1,979 with sparsity (SXM)
    ("A100", 312.0),  # NVIDIA A100 datasheet
)
_MEASURE_SECONDS = 0.25


@dataclass(frozen=True)
class Peak:
    """FLOP/s of one device and where the number comes from."""

    flops: float
    measured: bool

    def __str__(self) -> str:
        scaled, unit = (self.flops / 1e12, "TFLOP/s") if self.flops >= 1e10 else (self.flops / 1e9, "GFLOP/s")
        return f"a {'measured' if self.measured else 'stated'} {scaled:.3g} {unit}"


def stated_peak(name: str, dtype: torch.dtype) -> Peak | None:
    """The vendor's dense bf16 figure for a device name ("NVIDIA H200", "trn1" for one NeuronCore).

    None for an unknown device, a MIG slice, and fp32 (whose rate depends on whether TF32 is allowed).
    """
    if dtype != torch.bfloat16 or " MIG " in f" {name} ":  # a slice of a GPU carries the whole GPU's name
        return None
    for part, tflops in _BF16_TFLOPS:
        if part.lower() in name.lower():
            return Peak(tflops * 1e12, measured=False)
    return None


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> Peak | None:
    """Peak of one device for matrix products: stated for a known GPU, else measured once a process.

    Measuring takes under a second, of products as `hlat.model.products` makes them. None on devices whose
    eager matmul rate says nothing (XLA: every shape is compiled); their backend knows the name for
    `stated_peak`.
    """
    if device.type in ("xla", "neuron", "meta"):
        return None
    if device.type == "cuda":
        stated = stated_peak(torch.cuda.get_device_name(device), dtype)
        if stated is not None:
            return stated
    return Peak(measure(device, product_dtype(device, dtype)), measured=True)


def measure(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...] | None = None) -> float:
    """The best FLOP/s of square matrix products over `sizes` (default: 512 to 2048, on a GPU up to 4096)."""
    sizes = sizes or ((512, 1024, 2048) if device.type == "cpu" else (2048, 4096))
    return max(_rate(size, device, dtype, _MEASURE_SECONDS / len(sizes)) for size in sizes)


@torch.no_grad()
def _rate(size: int, device: torch.device, dtype: torch.dtype, budget: float) -> float:
    """FLOP/s of size³ products: the best of as many repetitions as fit in `budget` seconds, at least two."""
    generator = torch.Generator(device).manual_seed(0)  # the run's own random state must not move
    a = torch.randn(size, size, device=device, generator=generator).to(dtype)
    b = torch.randn(size, size, device=device, generator=generator).to(dtype)
    out = torch.empty(size, size, device=device, dtype=dtype)
    calls = 1 if device.type == "cpu" else 10
    best, spent, runs = float("inf"), 0.0, 0
    while runs < 3 or spent < budget:
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            torch.mm(a, b, out=out)
        _wait(device)
        seconds = time.perf_counter() - start
        spent, runs = spent + seconds, runs + 1
        if runs > 1:  # the first call initialises libraries
            best = min(best, seconds / calls)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
