"""Two processes and one sum over gloo: `python -m hlat.doctor.probe STORE [RANK]`, started by `hlat doctor`.

Without a rank it is the first process and starts the second. Prints one JSON line, as
hlat/backend/nxd/probe.py does.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import timedelta

from hlat.host.python import module

RANKS, ELEMENTS, TIMEOUT = 2, 1024, timedelta(seconds=60)


def main(store: str, rank: int) -> int:
    """Join the group, reduce twice, leave."""
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=TIMEOUT
    )
    right, seconds = True, 0.0
    for _ in range(2):
        ones = torch.ones(ELEMENTS)
        start = time.perf_counter()
        dist.all_reduce(ones)
        seconds = time.perf_counter() - start
        right = right and bool((ones == RANKS).all())
    dist.destroy_process_group()
    if rank == 0:
        print(json.dumps({"right": right, "seconds": seconds, "ranks": RANKS}), flush=True)
    return 0 if right else 1


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(main(sys.argv[1], int(sys.argv[2])))
    other = subprocess.Popen(module("hlat.doctor.probe", sys.argv[1], "1"))
    try:
        code = main(sys.argv[1], 0)
        sys.exit(code or other.wait(timeout=30))
    finally:
        if other.poll() is None:
            other.kill()
            other.wait()
