"""The variables of a launcher from those of SLURM, for a command that srun starts once for each rank."""

from __future__ import annotations

import re
from collections.abc import Mapping

from hlat.errors import UserError

_PORT = 29500  # torchrun's


def launcher_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of a task of `srun`; empty where a launcher
    has set WORLD_SIZE already, outside of a step, and for a single task.

    The first node of the step holds the store. MASTER_ADDR and MASTER_PORT that are set stay.
    Raises UserError when SLURM does not say which nodes there are.
    """
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "")
    if environ.get("WORLD_SIZE") or not tasks.isdecimal() or int(tasks) < 2:
        return {}
    host = environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", ""))
    if not host or not environ.get("SLURM_PROCID", "").isdecimal():
        fix = "start the command with srun, or set MASTER_ADDR to the first node"
        raise UserError("SLURM does not say which nodes the step has", where="SLURM_STEP_NODELIST", fix=fix)
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": host,
        "MASTER_PORT": environ.get("MASTER_PORT") or str(_PORT),
    }


def first_host(nodes: str) -> str:
    """The first name of SLURM's list of nodes: `trn-[007-012,20],head` -> `trn-007`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0]) if first else ""
