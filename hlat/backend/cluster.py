"""Joining a job of several processes: who they are, a key-value store they share, process groups.

A launcher (torchrun, or anything that sets the same variables) gives each process RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR and MASTER_PORT; what others set is translated (`hlat.backend.launcher`). What the
processes say to each other outside training (facts at the start, signs of life, failures) goes through the
store: it works before there are process groups and after they have broken. Under torchrun the store lives in
the launcher and so outlives every rank.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from hlat import process
from hlat.backend.groups import Group
from hlat.backend.launcher import launcher_variables
from hlat.backend.rendezvous import STORE_SECONDS, Address, connect_store, read_address, serve
from hlat.errors import UserError
from hlat.host.limits import cores

JOIN_SECONDS = 600.0  # a machine may still be starting; torchrun waits as long
_FAREWELL_SECONDS = 30.0
_LINGER_SECONDS = 2.0


@dataclass(frozen=True)
class Member:
    """A process of the job. `born` and `space` tell a process id of this machine from the same number reused
    or in another container.
    """

    rank: int
    host: str
    pid: int
    born: str
    space: str

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host})"

    def exists(self) -> bool | None:
        """Whether the process runs; None when it is on another machine and cannot be seen from here."""
        if (self.host, self.space) != (socket.gethostname(), process.space()):
            return None
        return process.runs(self.pid, self.born)


class Cluster:
    """The processes of a job and this one's place among them; without arguments a job of one process.

    Attributes:
        rank, world: of all processes. local_rank, local_world: of those on this machine.
        members: all processes, by rank.
        device: what this rank computes on, after `choose_device`.
        stop: CPU group of its own for the vote on stopping, after `connect`.
        on_wait: called now and then while this process waits for others; may raise to end the wait.
    """

    def __init__(self, address: Address | None = None, seconds: float = JOIN_SECONDS) -> None:
        self.rank, self.world = (address.rank, address.world) if address else (0, 1)
        self.local_rank, self.local_world = 0, 1
        self.device = torch.device("cpu")
        self.members: tuple[Member, ...] = (_this_process(0),)
        self.stop = Group()
        self.on_wait: Callable[[], None] = lambda: None
        self._address, self._server = address, None
        self._groups: list[dist.ProcessGroup] = []
        if address is not None:
            self._join(address, seconds)

    def _join(self, address: Address, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        if address.serves:
            self._server, address = serve(address)
            self._address = address
        self._store = connect_store(address, deadline)
        self.store = self.new_client("hlat", self._store)
        mine = asdict(_this_process(address.rank))
        try:
            fix = f"start all {self.world}, with the same MASTER_ADDR and MASTER_PORT"
            members = self.gather("member", mine, max(0.0, deadline - time.monotonic()), fix)
        except UserError:
            if self.serves_store:
                time.sleep(_LINGER_SECONDS)  # the others find out who is missing as well
            raise
        except dist.DistError as error:
            what = f"rank {self.rank}: rank 0 ended before all {self.world} processes had come"
            raise UserError(what, where=self.store_place) from error
        self.members = tuple(Member(**member) for member in members)
        here = [member.rank for member in self.members if member.host == self.me.host]
        self.local_rank = here.index(self.rank) if address.local_rank is None else address.local_rank
        self.local_world = len(here)

    @property
    def me(self) -> Member:
        """This process."""
        return self.members[self.rank]

    @property
    def first_here(self) -> bool:
        """Whether this is the first rank on its machine."""
        return self.rank == min(m.rank for m in self.members if m.host == self.me.host)

    @property
    def store_place(self) -> str:
        """Where the store is, for messages."""
        return f"{self._address.host}:{self._address.port}" if self._address else "this process"

    @property
    def store_holder(self) -> str:
        """The process that holds the store, for messages."""
        if self._address is None or self._address.by_launcher:
            return f"the launcher at {self.store_place}"
        first = self.members[0]
        return f"rank 0 ({first.host}, pid {first.pid}), which held the job's store,"

    @property
    def serves_store(self) -> bool:
        """Whether the store ends with this process."""
        return self._server is not None

    def new_client(self, prefix: str, connection: Any = None) -> Any:
        """The store under a prefix. Threads need a connection each: one that waits blocks the other's."""
        assert self._address is not None, "one process has no store"
        connection = connection or connect_store(self._address, time.monotonic() + STORE_SECONDS)
        return dist.PrefixStore(prefix, dist.PrefixStore(f"attempt-{self._address.attempt}", connection))

    def gather(
        self, name: str, value: Any, seconds: float, fix: str = "raise parallel.first_timeout if they work"
    ) -> list[Any]:
        """Every rank's `value` (JSON), by rank, on every rank. `name` must be new each time. Works without
        process groups.

        Raises UserError naming ranks that have not come after `seconds`, and whatever `on_wait` raises.
        """
        if self.world == 1:
            return [value]
        self.store.set(f"{name}/{self.rank}", json.dumps(value))
        self.store.add(f"{name}/count", 1)
        keys = [f"{name}/{rank}" for rank in range(self.world)]
        if not self._poll(lambda: self.store.add(f"{name}/count", 0) >= self.world, seconds):
            missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
            raise UserError(
                f"{_ranks(missing)} of {self.world} did not come in time",
                where=self.store_place,
                fix=fix,
            )
        return [json.loads(text) for text in self.store.multi_get(keys)]

    def from_first(self, name: str, value: Any, seconds: float) -> Any:
        """Rank 0's `value` (JSON) on every rank; others' is ignored. Else like `gather`."""
        if self.world == 1:
            return value
        if self.rank == 0:
            self.store.set(name, json.dumps(value))
        elif not self._poll(lambda: self.store.check([name]), seconds):
            raise UserError(f"rank 0 was not ready within {seconds:.0f} s", where=f"waiting for {name}")
        return json.loads(self.store.get(name))

    def in_turn(self, name: str, work: Callable[[], Any], seconds: float) -> Any:
        """`work` on the first rank of each machine, then on its other ranks, which find a cache filled."""
        key = f"{name}/{self.me.host}"
        if self.world == 1 or self.first_here:
            result = work()
            if self.world > 1:
                self.store.set(key, "done")
            return result
        if not self._poll(lambda: self.store.check([key]), seconds):
            raise UserError(f"the first rank on {self.me.host} was not ready within {seconds:.0f} s")
        return work()

    def choose_device(self) -> str:
        """Set `device`: this rank's GPU where there are GPUs, else its share of the CPU. Returns a name that
        no other GPU has. Raises UserError when there are fewer GPUs than processes.
        """
        if not torch.cuda.is_available():
            if "OMP_NUM_THREADS" not in os.environ:
                share = max(1, cores() // self.local_world)
                torch.set_num_threads(share if self.local_world > 1 else min(share, torch.get_num_threads()))
            return "cpu"
        count = torch.cuda.device_count()
        if count > 1 and self.local_rank >= count:
            what = f"process {self.local_rank} of this machine, but it has {count} GPUs"
            fix = f"start at most {count} processes on it, or let each see one GPU (srun --gpus-per-task=1)"
            raise UserError(what, where=self.me.host, fix=fix)
        # One GPU: it is this process's own, launchers may show each process no other.
        self.device = torch.device("cuda", self.local_rank if count > 1 else 0)
        torch.cuda.set_device(self.device)
        return f"cuda {getattr(torch.cuda.get_device_properties(self.device), 'uuid', self.device.index)}"

    def connect(self, first_timeout: float, kind: str = "") -> None:
        """Make the default process group and `stop`.

        Args:
            first_timeout: seconds.
            kind: torch.distributed's backend, then also for one process; default: gloo on CPUs, nccl too
                where there are GPUs, nothing for one process.
        """
        if self.world == 1:
            if kind:
                dist.init_process_group(kind, store=dist.HashStore(), rank=0, world_size=1)
            return
        kind = kind or ("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
        limit = timedelta(seconds=first_timeout)
        store = self.new_client("groups", self._store)
        dist.init_process_group(kind, store=store, rank=self.rank, world_size=self.world, timeout=limit)
        handle = dist.new_group(backend="gloo", timeout=limit)
        self.stop = Group(range(self.world), self.rank, handle)

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's `value`, by rank, on every rank: `gather` for during training, by a collective."""
        values = [value] * self.world
        if self.stop.handle is not None:
            dist.all_gather_object(values, value, group=self.stop.handle)
        return values

    def note_groups(self) -> None:
        """The groups made so far are those of training, whose timeouts `shorten_timeouts` shortens. Writing a
        checkpoint in the background has one of its own and may take longer.
        """
        self._groups = list(c10d._world.pg_map) if self.world > 1 and hasattr(c10d, "_world") else []

    def shorten_timeouts(self, seconds: float) -> None:
        """Let the collectives of training give up after `seconds` from now on. Where torch has no way to say
        so, the watchdog ends a job that hangs.
        """
        change = getattr(c10d, "_set_pg_timeout", None)
        if change is None:
            return
        for group in self._groups:
            if not c10d._rank_not_in_group(group):
                change(timedelta(seconds=seconds), group)

    def leave(self, seconds: float) -> None:
        """Wait for all ranks, then take down the groups. Nothing may be sent after it."""
        if self.world == 1:
            return
        self.gather("leave", self.rank, seconds)
        if dist.is_initialized():
            dist.destroy_process_group()
        self.stop = Group()
        self.store.add("left", 1)
        if self.serves_store:  # the others' last questions
            end = time.monotonic() + _FAREWELL_SECONDS
            while self.store.add("left", 0) < self.world and time.monotonic() < end:
                time.sleep(0.01)

    def _poll(self, ready: Callable[[], bool], seconds: float) -> bool:
        end, pause = time.monotonic() + seconds, 0.002
        while not ready():
            if time.monotonic() > end:
                return False
            self.on_wait()
            time.sleep(pause)
            pause = min(0.25, 1.5 * pause)
        return True


def join(seconds: float = JOIN_SECONDS, environ: Mapping[str, str] | None = None) -> Cluster:
    """Meet the other processes of the job that the environment describes; alone when it describes none.

    Raises UserError for an environment that makes no sense, a port that is refused or taken, and processes
    that do not come within `seconds`.
    """
    environ = os.environ if environ is None else environ
    address = read_address({**environ, **launcher_variables(environ)})
    return Cluster(address, seconds) if address else Cluster()


def _this_process(rank: int) -> Member:
    pid = os.getpid()
    return Member(rank, socket.gethostname(), pid, process.birth(pid), process.space())


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"
