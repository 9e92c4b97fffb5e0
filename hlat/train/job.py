"""The processes that train together, as one of them sees them."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import Any

from hlat.backend.cluster import Cluster
from hlat.observe.failures import Board, Ending
from hlat.observe.stopping import Signals
from hlat.observe.watchdog import Watchdog


@dataclass
class Job:
    """The processes that train together, and what ends this one when another fails."""

    cluster: Cluster
    neuron_profile: list[dict[str, Any]]
    signals: Signals
    watchdog: Watchdog = field(init=False)
    ending: Ending | None = None

    def __post_init__(self) -> None:
        self.watchdog = Watchdog(self.cluster.rank, self.cluster.members)

    def watch(self) -> None:
        """Begin to look after the other ranks, and let failures end this one."""
        cluster, names = self.cluster, [str(member) for member in self.cluster.members]
        own_board = Board(cluster.new_client("hlat"), cluster.rank, names)
        self.watchdog.start(own_board, cluster.store_holder, cluster.serves_store)
        self.ending = Ending(Board(cluster.store, cluster.rank, names), self.watchdog, cluster.serves_store)
        cluster.on_wait = self.ending.on_wait

    def note(self, error: BaseException) -> None:
        """Report a failure to the other ranks before anything that may wait for them."""
        if self.ending is not None:
            self.ending.note(error)

    def leave(self, seconds: float) -> None:
        """Wait for all ranks; after it each goes its own way."""
        if self.ending is not None:
            for number in (
                signal.SIGTERM,
                signal.SIGUSR1,
                signal.SIGHUP,
            ):  # sent once one has ended
                signal.signal(number, signal.SIG_IGN)
            self.watchdog.beat(0, "leaving", patient=True)
            self.ending.board.note_end()
            self.cluster.leave(seconds)
            self.watchdog.stop()
            self.ending = None
