"""Worker processes that tokenize units.

They are started as a module, hlat.data.worker, rather than through multiprocessing, whose spawned children
import the caller's main module again: a script without a main guard would start itself once more. Requests
and answers are lines of JSON.
"""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hlat.errors import UserError
from hlat.host.limits import cores
from hlat.host.python import environment, module


def run(
    folder: Path, numbers: list[int], holdout_below: int, workers: int | None, advance: Callable[[int], None]
) -> dict[int, dict[str, Any]]:
    """Tokenize the numbered units of the job in `folder`; returns their statistics by number.

    `advance` is called, in this thread, with bytes of text done. Raises UserError as the workers do; the
    others are then stopped.
    """
    count = min(workers or cores(), len(numbers))
    if count <= 1:
        from hlat.data.worker import Worker

        worker = Worker(folder, threads=workers)
        return {number: worker.tokenize(number, holdout_below, advance) for number in numbers}
    pending: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in numbers:
        pending.put(number)
    answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    processes = [_start(folder, holdout_below) for _ in range(count)]
    threads = [
        threading.Thread(target=_serve, args=(process, pending, answers), daemon=True)
        for process in processes
    ]
    try:
        for thread in threads:
            thread.start()
        return _collect(answers, len(numbers), advance)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
        for thread in threads:
            thread.join()


def _start(folder: Path, holdout_below: int) -> subprocess.Popen[str]:
    environ = {**environment(), "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    command = module("hlat.data.worker", str(folder), str(holdout_below))
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environ
    )


def _serve(
    process: subprocess.Popen[str],
    pending: queue.SimpleQueue[int],
    answers: queue.SimpleQueue[dict[str, Any]],
) -> None:
    """Feed one worker until no unit is left; runs in a thread of its own."""
    assert process.stdin and process.stdout
    try:
        while True:
            process.stdin.write(f"{pending.get_nowait()}\n")
            process.stdin.flush()
            while True:
                line = process.stdout.readline()
                if not line:
                    raise EOFError
                answer = json.loads(line)
                answers.put(answer)
                if "number" in answer:
                    break
    except queue.Empty:
        process.stdin.close()
    except (OSError, EOFError, ValueError):
        # The worker wrote its own traceback to stderr, unless it was killed.
        answers.put({"crashed": process.wait()})


def _collect(
    answers: queue.SimpleQueue[dict[str, Any]], wanted: int, advance: Callable[[int], None]
) -> dict[int, dict[str, Any]]:
    done: dict[int, dict[str, Any]] = {}
    while len(done) < wanted:
        answer = answers.get()
        if "advance" in answer:
            advance(answer["advance"])
        elif "number" in answer:
            done[answer["number"]] = answer["statistics"]
        elif "error" in answer:
            raise UserError(
                answer["error"]["what"], where=answer["error"]["where"], fix=answer["error"]["fix"]
            )
        else:
            raise RuntimeError(
                f"a tokenizing process ended with status {answer['crashed']}"
                " (out of memory, if it was killed: try fewer --workers)"
            )
    return done
