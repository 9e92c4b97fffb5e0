"""Counting what a rank sends and what it keeps: the operations it issues, the storage that is alive."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

SILENT = ("wait_tensor", "recv_", "recv_any_source_")  # these send nothing
RING = {  # bytes sent for each byte of the operation's larger tensor, by the ring algorithm over n ranks
    "allreduce_": lambda n: 2 * (n - 1) / n,
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "_allgather_base_": lambda n: (n - 1) / n,
    "all_gather_into_tensor": lambda n: (n - 1) / n,
    "_reduce_scatter_base_": lambda n: (n - 1) / n,
    "reduce_scatter_tensor": lambda n: (n - 1) / n,
    "alltoall_base_": lambda n: (n - 1) / n,  # a reduce-scatter between CPUs: the sum is taken on arrival
    "send": lambda n: 1.0,
}


class Meter(TorchDispatchMode):
    """Sees every operation inside it and adds up the bytes that this rank's collectives send.

    sent: bytes by the group's ranks, as "0,1". ops: how many operations of each kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = {}
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func._opname, args, out)
        return out

    def _count(self, name: str, args: Any, out: Any) -> None:
        if name in SILENT:
            return
        if name not in RING:
            raise AssertionError(f"{name} has no place in the count")
        ranks = _ranks(args)
        tensors = [t for arg in (*args, out) for t in (arg if isinstance(arg, list | tuple) else [arg])]
        size = max(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
        key = ",".join(map(str, ranks))
        self.sent[key] = self.sent.get(key, 0.0) + RING[name](len(ranks)) * size
        self.ops[f"{name} {key}"] += 1


def _ranks(args: Any) -> list[int]:
    """The ranks of the group an operation was called with: a name in functional ones, else an object."""
    if isinstance(args[-1], str):
        group = _resolve_process_group(args[-1])
    else:
        boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and _is_group(arg))
        group = ProcessGroup.unbox(boxed)
    return sorted(dist.get_process_group_ranks(group))


def _is_group(value: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(value._type())


def storage_bytes(run: Any) -> dict[str, int]:
    """Bytes of distinct live storages: weights, gradients, masters and states of the run's buckets, and `all`
    that this process holds. A master that lies in the weights counts there.
    """
    gc.collect()
    seen: set[int] = set()

    def total(tensors: Any) -> int:
        size = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen and storage.nbytes():
                seen.add(storage.data_ptr())
                size += storage.nbytes()
        return size

    buckets, state = run.buckets, run.optimizer.state
    out = {
        "weights": total(bucket.weights for bucket in buckets),
        "gradients": total(bucket.grad for bucket in buckets),
        "masters": total(bucket.master for bucket in buckets),
        "states": total(t for b in buckets for t in state[b.master].values() if t.dim()),
    }
    known = sum(out.values())
    rest = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.device.type != "meta"]
    return {**out, "all": known + total(t for t in rest if t.layout == torch.strided)}
