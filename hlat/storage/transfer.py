"""Several files at once, in threads that do not keep a process from ending."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

STREAMS = 4  # files at a time; a large file of S3 travels in ten parts at a time besides

Item = TypeVar("Item")


def side_by_side(work: Callable[[Item], object], items: Sequence[Item], threads: int = STREAMS) -> None:
    """`work` on every item. Raises the first exception, once no work is under way any more; what had not
    begun by then is left.
    """
    waiting: queue.SimpleQueue[Item] = queue.SimpleQueue()
    for item in items:
        waiting.put(item)
    failures: list[BaseException] = []

    def run() -> None:
        while not failures:
            try:
                item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                work(item)
            except BaseException as error:
                failures.append(error)

    workers = [threading.Thread(target=run, daemon=True) for _ in range(min(threads, len(items)))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
