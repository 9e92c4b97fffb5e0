"""A SLURM cluster of two nodes on this machine: munge, slurmctld and two slurmd in a temporary folder.

    with Cluster(folder) as cluster:
        job = cluster.sbatch("script.sh")
        cluster.wait(job, "COMPLETED")

Only `folder` is written, only the processes started here are ended. Needs root, as SLURM's daemons do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
NODES = 2
_FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"}

# No cgroups, no affinity, no accounting: what a container lacks. cred_expire: a requeued job waits that long.
CONF = """
ClusterName=hlat
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdDebug=debug
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/linear
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait={kill_wait}
MinJobAge=3600
SlurmctldTimeout=60
SlurmdTimeout=60
SchedulerParameters=sched_interval=1,bf_interval=1
SchedulerType=sched/backfill
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1024
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1024
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why no cluster can be started here; empty when it can."""
    absent = [name for name in NEEDED if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed: make test-slurm installs Debian's packages"
    return "" if os.geteuid() == 0 else "SLURM's daemons are started as root only"


class Cluster:
    """See the module text. `environ`: what SLURM's commands need to find this cluster."""

    def __init__(self, folder: Path, kill_wait: int = 10) -> None:
        self.folder, self.kill_wait = folder, kill_wait
        self.environ = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        self.folder.mkdir(parents=True, exist_ok=True)
        host = socket.gethostname().partition(".")[0]
        conf = CONF.format(host=host, folder=self.folder, ports=_free_ports(3), kill_wait=self.kill_wait)
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "state").mkdir(exist_ok=True)
        try:
            self._munge()
            self._start("slurmctld", "-D", "-i")
            for number in range(1, NODES + 1):
                self._start("slurmd", "-D", "-N", f"node{number}")
            until(self._ready, 60, "nodes idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._daemons:
            for job in self.output("squeue", "--noheader", "--format=%i", "--array").split():
                self.output("scancel", "--signal=KILL", "--full", job)
                self.output("scancel", job)
            with contextlib.suppress(TimeoutError):
                until(lambda: not self.output("squeue", "--noheader"), 30, "no job left")
        for process in reversed(self._daemons):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._daemons = []

    def _munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        places = [f"--{name}={self.folder}/munge.{end}" for name, end in _MUNGE_FILES]
        # --force: the temporary folder is not as private as munge wants it, and the user is root.
        self._start("munged", "--foreground", "--force", f"--key-file={key}", *places)
        until((self.folder / "munge.socket").exists, 20, "munge's socket")

    def _start(self, *command: str) -> None:
        with open(self.folder / f"daemon-{len(self._daemons)}-{command[0]}.out", "wb") as log:
            process = subprocess.Popen(
                command, env=self.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        self._daemons.append(process)

    def _ready(self) -> bool:
        states = self.output("sinfo", "--noheader", "--Node", "--format=%N %t").split()
        return states == ["node1", "idle", "node2", "idle"]

    def output(self, *command: str) -> str:
        """What a command prints."""
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=60)
        return done.stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        """A job's fields, as `scontrol show job` gives them."""
        line = self.output("scontrol", "show", "job", "--oneliner", job)
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def wait(self, job: str, seconds: float = 120) -> dict[str, str]:
        """The fields of a job once it has ended for good."""

        def ended() -> Any:
            fields = self.show(job)
            return fields if fields.get("JobState") in _FINAL else None

        return dict(until(ended, seconds, f"job {job} ended"))


_MUNGE_FILES = (("socket", "socket"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"))


def until(ready: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value of `ready`. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not (value := ready()):
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.1)
    return value


def _free_ports(count: int) -> Sequence[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports
