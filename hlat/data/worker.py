"""One tokenizing process.

`python -m hlat.data.worker FOLDER HOLDOUT_BELOW`, unit numbers on stdin, JSON lines on stdout.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hlat.data.convention import Convention
from hlat.data.packed import write_unit
from hlat.data.sources import InputFile, Piece
from hlat.data.tokenizer import load_tokenizer
from hlat.errors import UserError

_busy = threading.Event()


class Worker:
    """The job of a partial folder, ready to tokenize any of its units."""

    def __init__(self, folder: Path, threads: int | None = 1) -> None:
        job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        self._folder = folder
        self._files = [[InputFile(**file) for file in source["files"]] for source in job["sources"]]
        self._fields = [source["text_field"] for source in job["sources"]]
        self._units = job["units"]
        spec = job["tokenizer"]
        self._tokenizer = load_tokenizer(folder / spec if spec.startswith("tokenizer/") else spec, threads)
        self._tokenizer.convention = Convention(bos=job["bos_id"])
        if self._tokenizer.identity != job["tokenizer_identity"]:
            raise UserError(
                "the tokenizer's files changed while they were read", where=str(folder), fix="run again"
            )

    def tokenize(self, number: int, holdout_below: int, progress: Callable[[int], None]) -> dict[str, Any]:
        """Write unit `number`; returns its statistics (see `packed.write_unit`)."""
        unit = self._units[number]
        source = unit["source"]
        pieces = [Piece(**piece) for piece in unit["pieces"]]
        return write_unit(
            self._folder,
            number,
            self._files[source],
            pieces,
            self._fields[source],
            self._tokenizer,
            holdout_below,
            progress,
        )


def _requests() -> queue.SimpleQueue[int | None]:
    """Unit numbers from stdin.

    When the parent dies while a unit is in work the process ends at once: another builder may take over.
    """
    requests: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            requests.put(int(line))
        if _busy.is_set():
            os._exit(1)
        requests.put(None)

    threading.Thread(target=read, daemon=True).start()
    return requests


def main(folder: Path, holdout_below: int) -> int:
    """Serve units until stdin closes.

    Exit status 0, or 2 after a UserError (sent to the parent as a line).
    """

    def send(message: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()

    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent ends its workers
    try:
        requests = _requests()
        worker = Worker(folder)
        while (number := requests.get()) is not None:
            _busy.set()
            statistics = worker.tokenize(number, holdout_below, lambda size: send({"advance": size}))
            _busy.clear()
            send({"number": number, "statistics": statistics})
    except UserError as error:
        send({"error": {"what": error.what, "where": error.where, "fix": error.fix}})
        return 2
    return 0


if __name__ == "__main__":
    status = main(Path(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.flush()
    os._exit(status)  # the reading thread may be waiting in stdin, which an ordinary exit would stumble over
