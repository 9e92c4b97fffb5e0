"""torchrun's static rendezvous, with its store on the cluster's interface instead of all of them."""

from __future__ import annotations

import os
import time

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import (
    StaticTCPRendezvous,
    create_rdzv_handler,
)

from hlat.backend.interfaces import INTERFACES, listen, port_error
from hlat.backend.rendezvous import Address, connect_store

NAME = "hlat"


class BoundRendezvous(StaticTCPRendezvous):
    """The agent of node 0 serves the store where --master-addr, or GLOO_SOCKET_IFNAME, leads to."""

    def get_backend(self) -> str:
        """The name under which torchrun knows this."""
        return NAME

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet the other agents; the ranks use the same store. Raises UserError where it cannot be served."""
        if self._store is None:
            self._host = self.master_addr
            self._store = self._serve() if self.rank == 0 else self._join()
        store, info = PrefixStore(self.run_id, self._store), RendezvousStoreInfo(self._host, self.master_port)
        return RendezvousInfo(store, self.rank, self.world_size, info)

    def _serve(self) -> TCPStore:
        names = [name.strip() for name in os.environ.get(INTERFACES, "").split(",") if name.strip()]
        try:
            listener, self._host = listen(self.master_addr, self.master_port, names)
        except (OSError, OverflowError) as error:
            raise port_error(error, self.master_port) from error
        descriptor = listener.detach()
        place = (self._host, self.master_port, self.world_size)
        return TCPStore(*place, True, self.timeout, master_listen_fd=descriptor)

    def _join(self) -> TCPStore:
        """Waits for the store without torch's pages about each try."""

        def connect(host: str) -> TCPStore:
            return TCPStore(host, self.master_port, self.world_size, False, self.timeout)

        address = Address(self.rank, self.world_size, None, self.master_addr, self.master_port, True, "0")
        deadline = time.monotonic() + self.timeout.total_seconds()
        store: TCPStore = connect_store(address, deadline, f"node {self.rank}", connect)
        return store


def create(parameters: RendezvousParameters) -> RendezvousHandler:
    """For torchrun's registry of rendezvous handlers."""
    made = create_rdzv_handler(parameters)
    assert isinstance(made, StaticTCPRendezvous)
    seconds = int(made.timeout.total_seconds())
    return BoundRendezvous(
        made.master_addr, made.master_port, made.rank, made.world_size, made.run_id, seconds
    )
