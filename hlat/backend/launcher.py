"""Who started this process, and what that makes it: a rank of a job, or all of it.

```
torchrun, hlat supervise    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: taken as they are
mpirun of Open MPI          OMPI_COMM_WORLD_*; on several nodes MASTER_ADDR must be set
mpiexec of MPICH, Intel MPI PMI_RANK, PMI_SIZE; MASTER_ADDR must be set
srun                        the variables of the step, see hlat.backend.slurm
```
The first that applies counts: mpirun starts its helpers with srun in a SLURM job, and torchrun may be the
task of a step. WORLD_SIZE=1 makes any task a process of its own.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, MutableMapping

from hlat.backend.slurm import FIRST_PORT, PORTS, step_tasks, step_variables
from hlat.errors import UserError

_PORT = 29500  # torchrun's
_MPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
_PMI = ("PMI_SIZE", "PMI_RANK")
_MPI_JOBS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_ess_jobid")


def launcher_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE (the last two where they
    are known), MASTER_ADDR and MASTER_PORT. Empty for a process alone, and where torchrun has set them.

    Raises UserError where the launcher does not say where the ranks are to meet.
    """
    if environ.get("WORLD_SIZE") or environ.get("RANK"):
        return {}
    if _size(environ, _MPI) > 1:
        return _open_mpi(environ)
    if _size(environ, _PMI) > 1 and not _by_srun(environ):
        return _pmi(environ)
    return step_variables(environ)


def take_place(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what `launcher_variables` says, for everything in this process that asks for it."""
    environ.update(launcher_variables(environ))


def count_tasks(environ: Mapping[str, str] = os.environ) -> int:
    """How many processes a launcher has started together, this one among them; 1 without a launcher."""
    if environ.get("WORLD_SIZE"):
        return int(environ["WORLD_SIZE"]) if environ["WORLD_SIZE"].isdecimal() else 1
    sizes = _size(environ, _MPI), _size(environ, _PMI), step_tasks(environ)
    return next((size for size in sizes if size > 1), 1)


def refuse_tasks(verb: str, environ: Mapping[str, str] = os.environ) -> None:
    """Raise UserError in each of several processes that a launcher has started: one would do the work, and
    the others the same work once more.
    """
    tasks = count_tasks(environ)
    if tasks > 1:
        what = f"one process does this, and {tasks} were started"
        fix = "start it once (srun --ntasks=1), or with WORLD_SIZE=1 where each has work of its own"
        raise UserError(what, where=f"hlat {verb}", fix=fix)


def _open_mpi(environ: Mapping[str, str]) -> dict[str, str]:
    size, rank = (environ[name] for name in _MPI)
    local = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "")
    if not environ.get("MASTER_ADDR") and local != size:
        _refuse("mpirun", rank, size, "several nodes", "mpirun -x MASTER_ADDR=NODE …")
    job = next((environ[name] for name in _MPI_JOBS if environ.get(name)), "")
    port = FIRST_PORT + 2 * (zlib.crc32(job.encode()) % PORTS) if job else _PORT
    found = {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": environ.get("OMPI_COMM_WORLD_LOCAL_RANK", ""),
        "LOCAL_WORLD_SIZE": local,
        "MASTER_ADDR": environ.get("MASTER_ADDR") or "127.0.0.1",
        "MASTER_PORT": environ.get("MASTER_PORT") or str(port),
    }
    return {name: value for name, value in found.items() if value}


def _pmi(environ: Mapping[str, str]) -> dict[str, str]:
    size, rank = (environ[name] for name in _PMI)
    if not environ.get("MASTER_ADDR"):
        _refuse("mpiexec", rank, size, "PMI", "mpiexec -genv MASTER_ADDR NODE …")
    found = {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": environ.get("MPI_LOCALRANKID", ""),
        "LOCAL_WORLD_SIZE": environ.get("MPI_LOCALNRANKS", ""),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(_PORT),
    }
    return {name: value for name, value in found.items() if value}


def _refuse(launcher: str, rank: str, size: str, reason: str, command: str) -> None:
    what = f"rank {rank} of {size}, started by {launcher}, cannot tell where rank 0 is ({reason})"
    fix = f"set MASTER_ADDR to the node of rank 0: {command}"
    raise UserError(what, where="MASTER_ADDR", fix=fix)


def _size(environ: Mapping[str, str], names: tuple[str, str]) -> int:
    """How many ranks a launcher says there are; 0 where it has not set both variables."""
    size, rank = (environ.get(name, "") for name in names)
    return int(size) if size.isdecimal() and rank.isdecimal() else 0


def _by_srun(environ: Mapping[str, str]) -> bool:
    """Whether PMI's variables are srun's own (--mpi=pmi2), about the tasks of its step."""
    step = (environ.get("SLURM_STEP_NUM_TASKS"), environ.get("SLURM_PROCID"))
    return step == tuple(environ[name] for name in _PMI)
