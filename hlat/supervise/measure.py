"""What is measured of a job before it trains: a matrix product on each rank, an all-reduce over all."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from hlat.backend.cluster import Cluster

ELEMENTS = 2 << 20  # of fp32 in the all-reduce: 8 MiB
_REDUCTIONS, _PRODUCTS = 5, 7
_SIZE = {"cuda": 4096, "xla": 2048, "cpu": 512}  # rows of the square matrices


def product_seconds(device: torch.device) -> float:
    """Seconds for a product of square matrices on a device, the fastest of several: others may disturb one.

    fp32 with 512 rows on a CPU, bf16 with 4,096 on a GPU and 2,048 on a NeuronCore.
    """
    size = _SIZE[device.type]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    left = torch.full((size, size), 0.5, dtype=dtype).to(device)  # a constant made there could be folded
    seconds = []
    for _ in range(_PRODUCTS + 1):
        start = time.perf_counter()
        product = left @ left
        _wait(product)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def reduce_seconds(cluster: Cluster, device: torch.device, elements: int = ELEMENTS) -> tuple[float, bool]:
    """Seconds for one all-reduce of fp32 over all ranks in the job's own process group (median), and whether
    every sum was right: each rank gives its number plus one.
    """
    wanted = cluster.world * (cluster.world + 1) / 2
    seconds, right = [], True
    for _ in range(_REDUCTIONS + 1):
        values = torch.full((elements,), float(cluster.rank + 1)).to(device)
        _wait(values)
        start = time.perf_counter()
        dist.all_reduce(values)
        _wait(values)
        seconds.append(time.perf_counter() - start)
        right = right and bool((values == wanted).all())
    return statistics.median(seconds[1:]), right


def pair_seconds(
    cluster: Cluster, device: torch.device, first: int, second: int, elements: int = ELEMENTS
) -> float:
    """Seconds for sending fp32 from one rank to another and back; 0 on all others. Both must call it."""
    if cluster.rank not in (first, second):
        return 0.0
    values = torch.zeros(elements).to(device)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        if cluster.rank == first:
            dist.send(values, second)
            dist.recv(values, second)
        else:
            dist.recv(values, first)
            dist.send(values, first)
        _wait(values)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def bus_bandwidth(seconds: float, world: int, elements: int = ELEMENTS) -> float:
    """Bytes per second that each rank's link carried in an all-reduce: 2 (n - 1) / n of the data, as
    nccl-tests counts (its doc/PERFORMANCE.md).
    """
    return 2 * (world - 1) / world * 4 * elements / seconds if seconds > 0 else 0.0


def _wait(values: torch.Tensor) -> None:
    """Until a tensor has been computed: a GPU and a NeuronCore work while the host goes on."""
    if values.device.type == "cuda":
        torch.cuda.synchronize(values.device)
    elif values.device.type == "xla":
        values.view(-1)[:1].cpu()
