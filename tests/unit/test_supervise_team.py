"""The supervisors of two machines agree, also after a signal."""

from __future__ import annotations

import socket
import threading
import time

from hlat.supervise.team import Machines


def test_after_a_signal_the_first_machine_waits_until_the_others_have_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    first = Machines(0, 2, "127.0.0.1", port, 20, waiting=lambda: True)
    second = Machines(1, 2, "127.0.0.1", port, 20, waiting=lambda: True)
    told, ended = [], []

    def decide() -> None:
        told.append(first.decide(1, lambda: {"exit": 75}))
        ended.append(time.monotonic())

    thread = threading.Thread(target=decide)
    thread.start()
    time.sleep(1.0)
    assert not ended  # the store would have ended with it
    read = time.monotonic()
    assert second.decide(1, lambda: {"exit": 1}) == {"exit": 75}
    assert first.number(2, lambda: 7) == second.number(2, lambda: 8) == 7
    thread.join(15)
    assert told == [{"exit": 75}] and ended[0] >= read
