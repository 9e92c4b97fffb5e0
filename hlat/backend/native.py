"""The native backend: plain PyTorch on CPUs and GPUs."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hlat.backend.groups import make_groups
from hlat.backend.host import Direct
from hlat.errors import UserError
from hlat.host.programs import cpp_compiler, find_program
from hlat.mesh import ONE_PROCESS, Layout

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MADV_HUGEPAGE, _HUGE_PAGE = 14, 2 << 20  # asm-generic/mman-common.h; bytes
_HEAP_BLOCK = (1 << 30) - (1 << 20)  # below the threshold, so that it comes from the heap
COMPILE_PAYS_FROM = 100  # steps; below it, compiling on a CPU takes longer than it saves


class NativeBackend:
    """CPU or CUDA through PyTorch. See `hlat.backend.base.Backend`.

    Args:
        layout: the mesh. For more than one rank torch.distributed must be initialised with as many (see
            `hlat.backend.cluster`); then making a backend is collective.
        device: this rank's device; default: the first GPU, else the CPU.
        kv_heads: of the model to be trained, for the groups of ranks that share a key/value head.
    """

    name = "native"

    def __init__(
        self, layout: Layout = ONE_PROCESS, *, device: torch.device | None = None, kv_heads: int = 0
    ) -> None:
        self.rank, self.world = dist.get_rank() if layout.world > 1 else 0, layout.world
        if layout.world > 1 and dist.get_world_size() != layout.world:
            raise ValueError(f"{layout} needs {layout.world} ranks, there are {dist.get_world_size()}")
        self.layout, self.place = layout, layout.place(self.rank)
        self.head_place = self.place
        self.groups = make_groups(layout, self.rank, kv_heads=kv_heads)
        cuda = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.device = device or cuda
        if self.device.type == "cpu":
            keep_freed_memory()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        return self.groups.world.all_reduce(tensor)

    def mark_step(self, phase: str = "step") -> None:
        """Nothing: this device runs operations as they come."""

    def expect_graphs(self, reason: str, phase: str = "step") -> None:
        """Nothing: there are no graphs to count."""

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

    def shard_model(self, model: nn.Module, dtype: torch.dtype) -> bool:
        """HLAT's own layers are used."""
        return False

    @property
    def checkpoint(self) -> Callable[..., Any]:
        """torch's, in the variant that works inside compiled blocks."""
        return partial(checkpoint, use_reentrant=False)

    def rounding(self, wanted: str) -> str:
        """As wanted: the hardware rounds to nearest."""
        return wanted

    def memory(self) -> Direct:
        """The tensors themselves."""
        return Direct()

    def compile_by_default(self, steps: int) -> tuple[bool, str]:
        """On where a compiler is found and the run is long enough to earn back the minute it takes."""
        on_cpu = self.device.type == "cpu"
        if on_cpu and steps < COMPILE_PAYS_FROM:
            return False, f"fewer than {COMPILE_PAYS_FROM} steps"
        trouble = compile_trouble(self.device)
        if trouble:
            return False, f"torch.compile does not work here: {trouble}"
        return True, f"CPU with {os.path.basename(cpp_compiler())}" if on_cpu else "CUDA device"


def refuse_compile(device: torch.device | None) -> None:
    """Raise UserError where `compile: true` cannot be done on a device (None: a CPU)."""
    trouble = compile_trouble(device)
    if trouble:
        fix = "write compile=false, or install what is missing: hlat doctor names the line"
        raise UserError(f"torch.compile does not work here: {trouble}", where="compile", fix=fix)


def compile_trouble(device: torch.device | None = None) -> str:
    """Why the smallest function does not compile here for a device (default: the CPU), in a line; empty when
    it does.

    A compiler alone is not enough: headers, OpenMP, a writable cache, a path without spaces are needed too.
    """
    on_cpu = device is None or device.type == "cpu"
    if on_cpu and find_program(cpp_compiler()) is None:  # a cached result would hide it
        return f"no C++ compiler ({cpp_compiler()})"
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:  # whatever the tool chain throws, training can go on without it
        lines = [line.strip() for line in str(error).splitlines() if "error" in line.lower()]
        return f"{type(error).__name__}: {lines[0] if lines else error}"[:160]
    return ""


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones, in huge pages, where the C library is
    glibc.

    By default it returns large blocks to the kernel, which then clears and maps every page again at the next
    allocation: a million page faults in 24 steps of the benchmark model, 6 % of their time. Huge pages save
    another 2 %: the first two gigabytes of the heap are reserved, marked and freed again. No memory is used
    before a tensor needs it.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.argtypes = [ctypes.c_void_p]
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        blocks = [address for address in (libc.malloc(_HEAP_BLOCK), libc.malloc(_HEAP_BLOCK)) if address]
        for address in blocks:
            first = -(-address // _HUGE_PAGE) * _HUGE_PAGE
            length = (address + _HEAP_BLOCK - first) // _HUGE_PAGE * _HUGE_PAGE
            libc.madvise(first, length, _MADV_HUGEPAGE)
        for address in blocks:
            libc.free(address)
