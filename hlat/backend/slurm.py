"""What SLURM says of the step that this process is a task of: its place among the tasks, where they meet.

Only what `srun` sets for a step counts. A batch script, and the shell of `salloc`, have the job's variables
(SLURM_NTASKS, SLURM_PROCID=0) too, and are one process.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

from hlat.errors import UserError

# Ports of a step and the next: 30000 to 32767, above those of `hlat launch slurm` (10000 to 29999) and below
# those that Linux gives to outgoing connections. 97 steps lie between two jobs that follow each other.
FIRST_PORT, PORTS = 30000, 1384
_JOB_STRIDE, _RESTART_STRIDE = 97, 31
_LOOPBACK = "127.0.0.1"
_FIX = "set MASTER_ADDR to the node of the first task, the same for all"


def step_tasks(environ: Mapping[str, str]) -> int:
    """Tasks of the step that this process is one of; 1 outside of a step."""
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "")
    return int(tasks) if tasks.isdecimal() else 1


def step_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a task of a step of two
    tasks or more; empty for any other process. MASTER_ADDR and MASTER_PORT that are set stay.

    Raises UserError when SLURM does not say which task this is, or on which node the first one is.
    """
    tasks = step_tasks(environ)
    if tasks < 2:
        return {}
    if not environ.get("SLURM_PROCID", "").isdecimal():
        what = "SLURM does not say which of the step's tasks this is"
        raise UserError(what, where="SLURM_PROCID", fix="start the command with srun")
    found = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or _first_node(environ),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(step_port(environ)),
    }
    if local := _tasks_here(environ):
        found["LOCAL_WORLD_SIZE"] = str(local)
    return found


def node_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """NODES, NODE_RANK, MASTER_ADDR and MASTER_PORT of a task that stands for its node, in a step of one task
    on each of several nodes; empty outside of one, and where NODES or WORLD_SIZE is set.

    Raises UserError for several tasks on a node, and like `step_variables`.
    """
    if environ.get("NODES") or environ.get("WORLD_SIZE"):
        return {}
    place = step_variables(environ)
    if not place:
        return {}
    nodes = environ.get("SLURM_STEP_NUM_NODES", "")
    if nodes != place["WORLD_SIZE"]:
        what = f"this is to run once on a node, and the step has {place['WORLD_SIZE']} tasks on {nodes or 1}"
        raise UserError(what, where="SLURM", fix="start it with srun --ntasks-per-node=1")
    meeting = {name: place[name] for name in ("MASTER_ADDR", "MASTER_PORT")}
    return {"NODES": nodes, "NODE_RANK": place["RANK"], **meeting}


def step_port(environ: Mapping[str, str]) -> int:
    """A port for the step's tasks to meet at, and the next: the same for all of them, another one for other
    steps of the job that run at the same time, and after a requeue.
    """
    job = _count(environ, "SLURM_JOB_ID_HET_GROUP_0") or _count(environ, "SLURM_JOB_ID")
    step = _count(environ, "SLURM_STEP_ID") or _count(environ, "SLURM_STEPID")
    number = _JOB_STRIDE * job + step + _RESTART_STRIDE * _count(environ, "SLURM_RESTART_COUNT")
    return FIRST_PORT + 2 * (number % PORTS)


def hosts(nodes: str) -> list[str]:
    """The names in SLURM's list of nodes: `trn-[007-009,20],head` -> trn-007, trn-008, trn-009, trn-20, head.
    Several brackets in a name multiply, the last one fastest.
    """
    found = []
    for name in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        parts = re.split(r"\[([^\]]*)\]", name)  # text and ranges in turn
        choices = [_range(part) if number % 2 else [part] for number, part in enumerate(parts)]
        found += ["".join(chosen) for chosen in itertools.product(*choices)]
    return found


def _range(text: str) -> list[str]:
    """The numbers of `007-009,20`, with their zeros."""
    found = []
    for item in text.split(","):
        first, _, last = item.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            return [text]
        found += [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]
    return found


def _first_node(environ: Mapping[str, str]) -> str:
    """The node of the step's first task. Raises UserError where SLURM does not say."""
    if environ.get("SLURM_STEP_NUM_NODES") == "1":
        return _LOOPBACK  # the port is then open to this machine alone
    if environ.get("SLURM_DISTRIBUTION", "").startswith("arbitrary"):
        what = "with --distribution=arbitrary SLURM does not say on which node the first task is"
        raise UserError(what, where="SLURM_DISTRIBUTION", fix=_FIX)
    names = hosts(environ.get("SLURM_STEP_NODELIST", ""))
    if not names:
        raise UserError("SLURM does not say which nodes the step has", where="SLURM_STEP_NODELIST", fix=_FIX)
    # The step of a heterogeneous job lists its nodes by name; its tasks are in the order of the components.
    for group in range(_count(environ, "SLURM_HET_SIZE")):
        for name in hosts(environ.get(f"SLURM_JOB_NODELIST_HET_GROUP_{group}", "")):
            if name in names:
                return name
    return names[0]


def _tasks_here(environ: Mapping[str, str]) -> int:
    """Tasks of the step on this node, by SLURM's list `4(x2),3`; 0 where it does not say."""
    counts: list[int] = []
    for item in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if match is None:
            return 0
        counts += [int(match[1])] * int(match[2] or 1)
    names, mine = hosts(environ.get("SLURM_STEP_NODELIST", "")), environ.get("SLURMD_NODENAME", "")
    # In the order of the list of nodes, which for a heterogeneous job is not that of SLURM_NODEID.
    place = names.index(mine) if mine in names else _count(environ, "SLURM_NODEID")
    return counts[place] if place < len(counts) else 0


def _count(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    return int(text) if text.isdecimal() else 0
