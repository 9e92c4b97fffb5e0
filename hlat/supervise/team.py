"""The supervisors of all machines of a job agree: when an attempt begins, that it has ended, what comes next.

The first machine's supervisor holds a key-value store, and decides.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from hlat.errors import UserError
from hlat.supervise.exits import REQUEUE

_POLL = 0.5
T = TypeVar("T")


class TeamLost(UserError):
    """The first machine's supervisor, which decides, is gone or silent: nothing is wrong with what it ran."""

    exit_code = REQUEUE


class Team:
    """Of one machine: everything is decided here. `Machines` is the same for several.

    Attributes:
        node: this machine's number. count: of machines.
    """

    node, count = 0, 1

    def ready(self, attempt: int, host: str, fault: str) -> dict[int, tuple[str, str]]:
        """Wait until all machines are ready to begin an attempt.

        Args:
            attempt: its number. host: this machine's name. fault: why it is unfit to train; empty: it is fit.

        Returns:
            Name and fault of each machine that has come in time, by number.
        """
        return {0: (host, fault)}

    def number(self, attempt: int, claim: Callable[[], int]) -> int:
        """The number over all jobs that the first machine claims for an attempt of this one."""
        return claim()

    def ended_elsewhere(self, attempt: int) -> bool:
        """Whether another machine's attempt has ended already."""
        return False

    def compiling(self, attempt: int, here: bool) -> bool:
        """Tell whether a rank of this machine compiles; returns whether one of another does."""
        return False

    def share(self, attempt: int, mine: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """How the attempt ended on each machine that says so in time, by number."""
        return {0: mine}

    def decide(self, attempt: int, decision: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What comes next, as the first machine decides."""
        return decision()


def _or_lost(ask: Callable[..., T]) -> Callable[..., T]:
    """A question to the store, which ends with the supervisor of the first machine. Raises TeamLost then."""

    @functools.wraps(ask)
    def asked(team: Machines, *arguments: Any) -> T:
        from torch.distributed import DistError

        try:
            return ask(team, *arguments)
        except DistError as error:
            what = "the supervisor of the first machine is gone with its ranks; the newest checkpoint stands"
            raise TeamLost(what, where=f"node {team.node}", fix="queue the job again") from error

    return asked


class Machines(Team):
    """Several machines.

    Args:
        node, count: this machine, all machines.
        host, port: where the first one holds the store.
        seconds: how long to wait for the others to begin, and to say how they ended.
        waiting: asked while this waits; True ends the wait (a signal has come).

    Raises UserError when the first machine does not answer at first, `TeamLost` when it does not later.
    """

    def __init__(
        self,
        node: int,
        count: int,
        host: str,
        port: int,
        seconds: float,
        waiting: Callable[[], bool] = lambda: False,
    ) -> None:
        from hlat.backend.rendezvous import Address, connect_store, serve

        self.node, self.count, self.seconds, self.waiting = node, count, seconds, waiting
        address = Address(node, count, None, host, port, by_launcher=False, attempt="0")
        self._server = serve(address) if node == 0 else None
        try:
            self._store = connect_store(address, time.monotonic() + seconds, f"node {node}")
        except UserError as error:
            fix = "does `hlat supervise` run on the first machine, and is --master-addr its address?"
            raise UserError(error.what, where=f"{host}:{port}", fix=fix) from error
        self._store.set_timeout(timedelta(seconds=20))

    @_or_lost
    def ready(self, attempt: int, host: str, fault: str) -> dict[int, tuple[str, str]]:
        """See `Team`."""
        self._store.set(f"{attempt}/ready/{self.node}", json.dumps([host, fault]))
        found = self._gather(f"{attempt}/ready", self.seconds)
        return {node: (name, what) for node, (name, what) in ((n, json.loads(t)) for n, t in found.items())}

    @_or_lost
    def number(self, attempt: int, claim: Callable[[], int]) -> int:
        """See `Team`."""
        return int(self._agree(f"{attempt}/number", claim, "which number the attempt has"))

    @_or_lost
    def ended_elsewhere(self, attempt: int) -> bool:
        """See `Team`."""
        return bool(self._store.check([f"{attempt}/ended"]))

    @_or_lost
    def compiling(self, attempt: int, here: bool) -> bool:
        """See `Team`."""
        prefix = f"{attempt}/compiling"
        self._store.set(f"{prefix}/{self.node}", "1" if here else "0")
        others = [f"{prefix}/{node}" for node in range(self.count) if node != self.node]
        return any(self._store.check([key]) and self._store.get(key) == b"1" for key in others)

    @_or_lost
    def share(self, attempt: int, mine: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """See `Team`."""
        self._store.set(f"{attempt}/end/{self.node}", json.dumps(mine))
        self._store.set(f"{attempt}/ended", "1")
        found = self._gather(f"{attempt}/end", self.seconds, lambda: False)  # after a signal too
        return {node: json.loads(text) for node, text in found.items()}

    @_or_lost
    def decide(self, attempt: int, decision: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """See `Team`."""
        told: dict[str, Any] = self._agree(f"{attempt}/decision", decision, "what comes next")
        if self.node == 0:
            self._linger(attempt, told)
        else:
            with contextlib.suppress(RuntimeError):  # it has waited long enough
                self._store.set(f"{attempt}/read/{self.node}", "1")
        return told

    def _agree(self, key: str, choose: Callable[[], Any], what: str) -> Any:
        """What the first machine chooses, on each of them. Raises UserError when it does not say in time."""
        if self.node == 0:
            self._store.set(key, json.dumps(choose()))
        deadline = time.monotonic() + self.seconds
        while not self._store.check([key]):
            if time.monotonic() > deadline:
                raise TeamLost(f"the first machine does not say {what}", where=f"node {self.node}")
            time.sleep(_POLL)
        return json.loads(self._store.get(key))

    def _linger(self, attempt: int, told: dict[str, Any]) -> None:
        """The store ends with this process: the others read what was decided first."""
        self._store.set(f"{attempt}/read/0", "1")
        if told.get("exit") is not None:
            self._gather(f"{attempt}/read", 10.0, lambda: False)  # after a signal too

    def _gather(self, prefix: str, seconds: float, leave: Callable[[], bool] | None = None) -> dict[int, str]:
        """What the machines say, as far as they do in time; `leave` (default: a signal) ends the wait."""
        leave = leave or self.waiting
        deadline = time.monotonic() + seconds
        while True:
            there = [node for node in range(self.count) if self._store.check([f"{prefix}/{node}"])]
            if len(there) == self.count or time.monotonic() > deadline or leave():
                return {node: self._store.get(f"{prefix}/{node}").decode() for node in there}
            time.sleep(_POLL)
