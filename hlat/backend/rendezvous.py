"""What a launcher tells a process, and the store that the processes of a job share."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from hlat.backend.interfaces import INTERFACES, listen, port_error
from hlat.errors import UserError

STORE_SECONDS = 20.0  # an answer from the store


@dataclass(frozen=True)
class Address:
    """What a launcher tells a process. `by_launcher`: the launcher holds the store, else rank 0 does.
    `attempt`: of a restarted job. `interfaces`: those of the cluster, where named. `machines`: of the job, 1
    where it is not told. `bound`: the address on which this process holds the store.
    """

    rank: int
    world: int
    local_rank: int | None
    host: str
    port: int
    by_launcher: bool
    attempt: str
    interfaces: tuple[str, ...] = ()
    machines: int = 1
    bound: str = ""

    @property
    def serves(self) -> bool:
        """Whether this process holds the store."""
        return self.rank == 0 and not self.by_launcher


def read_address(environ: Mapping[str, str]) -> Address | None:
    """What the launcher's variables say; None for a single process. Raises UserError."""
    if not environ.get("WORLD_SIZE"):
        if environ.get("RANK"):
            fix = "start with torchrun, or unset RANK to train in one process"
            raise UserError("RANK is set and WORLD_SIZE is not", where="environment", fix=fix)
        return None
    world = _number(environ, "WORLD_SIZE", 1)
    if world == 1 and not environ.get("RANK"):
        return None
    rank = _number(environ, "RANK", 0)
    if rank >= world:
        fix = f"give the {world} processes the ranks 0 to {world - 1}"
        raise UserError(f"RANK {rank} is not below WORLD_SIZE {world}", where="environment", fix=fix)
    if world == 1:
        return None
    host, port = environ.get("MASTER_ADDR", ""), _number(environ, "MASTER_PORT", 1)
    if not host:
        fix = "set it to the machine of rank 0"
        raise UserError("MASTER_ADDR is not set", where="environment", fix=fix)
    by_launcher = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    local = _number(environ, "LOCAL_RANK", 0) if environ.get("LOCAL_RANK") else None
    attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    names = tuple(name.strip() for name in environ.get(INTERFACES, "").split(",") if name.strip())
    return Address(rank, world, local, host, port, by_launcher, attempt, names, _machines(environ, world))


def _machines(environ: Mapping[str, str], world: int) -> int:
    """At least so many machines there are, by what SLURM says of this step and torchrun of this machine."""
    nodes, local = environ.get("SLURM_STEP_NUM_NODES", ""), environ.get("LOCAL_WORLD_SIZE", "")
    several = local.isdecimal() and int(local) < world
    return max(int(nodes) if nodes.isdecimal() else 1, 2 if several else 1)


def _number(environ: Mapping[str, str], name: str, least: int) -> int:
    text = environ.get(name, "")
    if not text.isdecimal() or int(text) < least:
        what = f"{name} is {text!r}, not a number of {least} or more" if text else f"{name} is not set"
        raise UserError(what, where="environment", fix="start with torchrun, which sets it")
    return int(text)


def serve(address: Address) -> tuple[Any, Address]:
    """The store itself, in this process and on the cluster's interface alone (`hlat.backend.interfaces`), and
    the address with where that is. The socket is opened here: a failure is then one line. Raises UserError.
    """
    try:
        listener, bound = listen(address.host, address.port, address.interfaces, address.machines)
    except (OSError, OverflowError) as error:
        raise port_error(error, address.port) from error
    store = dist.TCPStore(
        bound,
        address.port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
        timeout=timedelta(seconds=STORE_SECONDS),
    )
    return store, replace(address, bound=bound)


def connect_store(
    address: Address, deadline: float, who: str = "", connect: Callable[[str], Any] | None = None
) -> Any:
    """A connection to the store. Knocks first: torch fills the screen while nobody answers.

    Args:
        deadline: monotonic seconds.
        who: the name of this process in the error (default: its rank).
        connect: makes the connection to a host (default: a client that waits for nobody else).

    Raises UserError when nobody answers in time.
    """
    where = f"{address.host}:{address.port}"
    started = time.monotonic()
    host = address.bound or address.host
    while True:
        try:
            socket.create_connection((host, address.port), timeout=STORE_SECONDS).close()
            if connect is not None:
                return connect(host)
            limit = timedelta(seconds=STORE_SECONDS)
            return dist.TCPStore(host, address.port, None, False, limit, wait_for_workers=False)
        except (OSError, OverflowError, dist.DistError) as error:
            if time.monotonic() < deadline and not isinstance(error, OverflowError):
                time.sleep(0.1)
                continue
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            waited = f"no answer for {time.monotonic() - started:.0f} s ({reason})"
            fix = (
                "is rank 0 started, are MASTER_ADDR and MASTER_PORT the same everywhere, and is MASTER_ADDR "
                "its address in the cluster's network there too?"
            )
            raise UserError(f"{who or f'rank {address.rank}'}: {waited}", where=where, fix=fix) from error
