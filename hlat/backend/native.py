"""The native backend: plain PyTorch on CPU or one GPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil

import torch
from torch import Tensor, nn

from hlat.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
COMPILE_PAYS_FROM = 100  # steps; below it, compiling on a CPU takes longer than it saves


class NativeBackend:
    """CPU or CUDA through PyTorch. See `hlat.backend.base.Backend`.

    Raises:
        UserError: started by a launcher with more than one process.
    """

    name = "native"

    def __init__(self) -> None:
        self.rank, self.world = 0, 1
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "this version of HLAT trains in one process",
                where="WORLD_SIZE",
                fix="start it with one process",
            )
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        if self.device.type == "cpu":
            keep_freed_memory()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The identity: there is one rank."""
        return tensor

    def mark_step(self) -> None:
        """Nothing: this device runs operations as they come."""

    def synchronize(self) -> None:
        """Wait for the GPU's queue; a CPU has none."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def prepare_model(self, model: nn.Module) -> None:
        """On a CPU, multiply layers with a common input as one matrix."""
        if self.device.type == "cpu":
            for module in model.modules():
                if hasattr(module, "joint"):
                    module.joint = True  # type: ignore[assignment]

    def compile_by_default(self, steps: int) -> tuple[bool, str]:
        """On where a compiler is found and the run is long enough to earn back the minute it takes."""
        if self.device.type == "cuda":
            return True, "CUDA device"
        compiler = (
            os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        )
        if not compiler:
            return False, "no C++ compiler found"
        if steps < COMPILE_PAYS_FROM:
            return False, f"fewer than {COMPILE_PAYS_FROM} steps"
        trouble = compile_trouble()
        if trouble:
            return False, f"torch.compile does not work here: {trouble}"
        return True, f"CPU with {os.path.basename(compiler)}"


def compile_trouble() -> str:
    """Why the smallest function does not compile here, in a line; empty when it does.

    A compiler alone is not enough: headers, OpenMP, a writable cache, a path without spaces are needed too.
    """
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.zeros(8))
    except Exception as error:  # whatever the tool chain throws, training can go on without it
        lines = [line.strip() for line in str(error).splitlines() if "error" in line.lower()]
        return f"{type(error).__name__}: {lines[0] if lines else error}"[:160]
    return ""


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones, where the C library is glibc.

    By default it returns large blocks to the kernel, which then clears and maps every page again at the next
    allocation: a million page faults in 24 steps of the benchmark model, 6 % of their time. Peak memory
    is the same.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def has_native_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster than fp32 ones here, rather than emulated."""
    if device.type != "cpu":
        return True
    flags = _cpu_flags()
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}) or not flags


def _cpu_flags() -> set[str]:
    """CPU features by the kernel's names; empty where /proc/cpuinfo does not exist."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.lower().startswith(("flags", "features")):
                    return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return set()
