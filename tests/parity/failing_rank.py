"""`hlat` with a mishap: one rank misbehaves in a step.

    python failing_rank.py KIND RANK STEP train RECIPE [key=value ...]

KIND: raise, kill (SIGKILL), freeze (SIGSTOP), sleep, term (SIGTERM), usr1, flip (one bit of the first
bucket's weights), flip-master (of its masters), nan (in the masters), mistake (a UserError), full (no room
for checkpoints on this rank for twelve steps), full-for-good, lose (another process takes the run folder).
RANK: -1 for all. STEP: steps done before; -1 for while data is opened, a large number for never.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hlat.checkpoint import layout
from hlat.cli import main
from hlat.errors import UserError
from hlat.train import loop, same

SIGNALS = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP, "term": signal.SIGTERM, "usr1": signal.SIGUSR1}


def mishap(kind: str, run: Any) -> None:
    if kind == "raise":
        raise ValueError("a planted failure")
    if kind == "mistake":
        raise UserError("this machine has no text", where="data", fix="copy it there")
    if kind in SIGNALS:
        os.kill(os.getpid(), SIGNALS[kind])
    if kind == "lose":
        lock = Path(run.recipe.run.dir, ".lock")
        other = lock.with_name("other")
        other.write_text(json.dumps({**json.loads(lock.read_text()), "token": "another", "host": "node-b"}))
        other.replace(lock)
    if kind == "sleep":
        time.sleep(120)
    if kind == "nan":
        run.buckets[0].weights.fill_(float("nan"))
    if kind.startswith("flip"):
        bucket = run.buckets[0]
        flat = bucket.weights if kind == "flip" else bucket.master.data
        flat.view({2: torch.int16, 4: torch.int32}[flat.element_size()])[5] ^= 1


def plant(kind: str, rank: int, step: int) -> None:
    """Let the mishap happen on `rank` when `step` steps are done."""
    if rank not in (-1, int(os.environ.get("RANK", "0"))):
        return
    if step < 0:
        check = same.check_data

        def checked(*arguments: Any) -> None:
            mishap(kind, None)
            check(*arguments)

        same.check_data = checked
        return
    train_step, usage = loop.train_step, layout.shutil.disk_usage

    def train_step_with_mishap(run: Any) -> Any:
        now = run.step == step
        if kind.startswith("full") and run.step in (step, step + 12):
            time.sleep(1)  # a save in the background comes to its end before
            full = now or kind == "full-for-good"
            layout.shutil.disk_usage = lambda path: usage(path)._replace(**({"free": 0} if full else {}))
            return train_step(run)
        if now and kind != "flip":
            mishap(kind, run)
        values = train_step(run)
        if now and kind == "flip":  # the next step's masters would mend it
            mishap(kind, run)
        return values

    loop.train_step = train_step_with_mishap


if __name__ == "__main__":
    plant(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    sys.exit(main(sys.argv[4:]))
