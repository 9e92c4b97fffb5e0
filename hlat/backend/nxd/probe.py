"""A tiny all-reduce on Neuron cores, started by `hlat doctor` under torchrun: two processes, one core each.

Prints one JSON line: whether the sum is right, and the seconds that the second of two reductions took (the
first compiles). Exit code 0 or 1. The sum is compared with the number of processes that torchrun started: a
device without collectives between processes reduces each with itself, and calls that a world of one.
"""

from __future__ import annotations

import json
import os
import sys
import time

ELEMENTS = 1024


def main() -> int:
    """Reduce ones over the processes torchrun started."""
    import torch
    import torch.distributed as dist
    import torch_xla
    import torch_xla.core.xla_model as xm
    import torch_xla.distributed.xla_backend

    ranks = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("xla", init_method="env://")
    right, seconds = True, 0.0
    for _ in range(2):
        start = time.perf_counter()
        ones = torch.ones(ELEMENTS, device=torch_xla.device())
        total = xm.all_reduce(xm.REDUCE_SUM, ones)
        right = right and bool((total.cpu() == ranks).all())
        seconds = time.perf_counter() - start
    if os.environ["RANK"] == "0":
        print(json.dumps({"right": right, "seconds": seconds, "ranks": ranks}), flush=True)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
