"""How much memory a run holds, and how much it needed at most."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hlat.train.run import Run

_STATUS = Path("/proc/self/status")


def persistent_bytes(run: Run) -> int:
    """Bytes that this rank holds between steps: weights, masters, gradients, the state of optimizer,
    reducer, guard and method, and in the host's memory frozen weights as they came. What lies in the same
    memory counts once.
    """
    return _distinct(_held(run))


def peak_bytes(device: torch.device) -> int | None:
    """The most memory this process has needed so far: on a GPU what torch allocated there, on a CPU the
    resident set, Python and libraries included. None where neither is known.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return None
    try:  # getrusage may remember the process that started this one
        lines = _STATUS.read_text(encoding="utf-8", errors="replace").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most << 10


def _held(run: Run) -> Iterator[Tensor]:
    yield from run.model.parameters()
    yield from run.model.buffers()
    for bucket in run.buckets:
        yield from (bucket.weights, bucket.grad, bucket.master, *bucket.parameters)
    for state in run.optimizer.state.values():
        yield from (value for value in state.values() if torch.is_tensor(value))
    yield from (held.exact for held in run.frozen.values() if held.exact is not None)
    yield from getattr(run.optimizer, "kept", None) or ()
    for part in (run.reducer, run.guard, run.method):
        yield from part.state().values() if hasattr(part, "state") else ()


def _distinct(tensors: Iterable[Tensor]) -> int:
    sizes = {}
    for tensor in tensors:
        if tensor.device.type == "xla":  # no memory to look at: tensors there are no views
            sizes[id(tensor)] = tensor.nbytes
        elif tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
