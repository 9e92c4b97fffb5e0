"""One rank: joins the others, works through cases.json, leaves a file for each case.

A case names a job here and its arguments. Rank 0's result goes to <case>.json.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

FOLDER = Path(sys.argv[1])


def join() -> None:
    """Join the other ranks, and put the stand-ins in as soon as torch.distributed is there."""
    import nxd_host

    from hlat.backend.nxd.start import cpu_mode, process_group

    torch.set_num_threads(1)
    dist.init_process_group(process_group(), init_method="env://")
    if cpu_mode():
        nxd_host.cpu_mode()
    else:
        nxd_host.xla_bridge()


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    join()
    sys.path.insert(0, str(Path(__file__).parent))
    jobs = {}
    for name in ("nxd_jobs", "nxd_traps", "nxd_plugins"):
        jobs |= vars(load(Path(__file__).with_name(f"{name}.py")))
    rank = dist.get_rank()
    for case in json.loads((FOLDER / "cases.json").read_text()):
        name = case.pop("name")
        try:
            result = jobs[case.pop("job")](FOLDER / name, **case)
        except Exception:
            (FOLDER / f"{name}.{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
            os._exit(1)  # the others may wait for this rank for ever
        if rank == 0:
            (FOLDER / f"{name}.tmp").write_text(json.dumps(result))
            (FOLDER / f"{name}.tmp").rename(FOLDER / f"{name}.json")
    sys.stdout.flush()
    os._exit(0)  # NxD's and torch's exit handlers would meet once more, at different times


if __name__ == "__main__":
    main()
