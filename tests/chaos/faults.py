"""What can go wrong with a run, each as a function that makes it happen."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hlat.checkpoint.folder import entries, step_folder
from hlat.supervise.processes import descendants


@dataclass
class Target:
    """A supervised run under way. store: folder behind `checkpoint.remote`; disk: of the run folder;
    mischief: the file that tests/mischief.py obeys.
    """

    supervisor: int
    run: Path
    disk: Path
    store: Path
    mischief: Path
    dice: random.Random
    lost: set[int] = field(default_factory=set)  # checkpoints that a fault is allowed to have destroyed

    def ranks(self) -> dict[int, int]:
        """Process ids by rank."""
        found = {}
        for process in descendants(self.supervisor):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
                values = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
                rank = next((v[5:] for v in values if v.startswith(b"RANK=")), None)
                if rank is not None and b"hlat" in words and b"train" in words:
                    found[int(rank)] = process.pid
        return found

    def one_rank(self) -> int:
        """The process id of any rank."""
        return self.dice.choice(sorted(self.ranks().values()))

    def newest(self) -> int:
        """Step of the newest complete checkpoint, 0 without one."""
        return max((entry.step for entry in entries(self.run / "checkpoints")), default=0)


def kill(target: Target) -> None:
    """kill -9 of a rank."""
    os.kill(target.one_rank(), signal.SIGKILL)


def stop(target: Target) -> None:
    """SIGSTOP of a rank: it is there and does nothing."""
    os.kill(target.one_rank(), signal.SIGSTOP)


def term(target: Target) -> None:
    """SIGTERM to one rank."""
    os.kill(target.one_rank(), signal.SIGTERM)


def corrupt(target: Target) -> None:
    """A byte of the newest checkpoint changes on the disk; then a rank is killed, so that it is needed."""
    before = target.newest()
    wait_for(lambda: target.newest() > before, "a fresh checkpoint")  # which the kill leaves the newest
    step = target.newest()
    file = sorted(step_folder(target.run / "checkpoints", step).glob("data-*"))[0]
    with file.open("r+b") as data:
        data.seek(-1, os.SEEK_END)
        last = data.read(1)
        data.seek(-1, os.SEEK_END)
        data.write(bytes([last[0] ^ 1]))
    target.lost.add(step)
    kill(target)


def full_disk(target: Target) -> None:
    """The disk of the run folder is full for a few seconds, over at least one checkpoint."""
    filler = target.disk / "filler"
    saved = target.newest()
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    time.sleep(target.dice.uniform(3, 6))
    filler.unlink()
    wait_for(lambda: target.newest() > saved, "a checkpoint after the disk had room again")


def store_errors(target: Target) -> None:
    """Every write to the store of checkpoints fails for a few seconds: there is a file where it was."""
    aside, saved = target.store.with_name("aside"), remote_newest(target)
    target.store.rename(aside)
    target.store.write_text("no folder")
    time.sleep(target.dice.uniform(3, 6))
    target.store.unlink()
    aside.rename(target.store)
    wait_for(lambda: remote_newest(target) > saved, "a checkpoint in the store after it worked again")


def nan_batch(target: Target) -> None:
    """The loss of one micro-batch of a rank is NaN; the guard goes back and leaves that step's data out."""
    records = target.run / "logs" / "anomalies.jsonl"

    def rewinds() -> int:
        return records.read_text().count('"rewind"') if records.exists() else 0

    before, partial = rewinds(), target.mischief.with_suffix(".new")
    partial.write_text(f"{target.dice.choice(sorted(target.ranks()))} nan")
    partial.rename(target.mischief)
    wait_for(lambda: rewinds() > before, "a rewind")


def remote_newest(target: Target) -> int:
    """Step of the newest complete checkpoint in the store, whose folder there is named after the run."""
    complete = target.store.glob("chaos/step-*/complete.json")
    return max((int(path.parent.name.split("-")[1]) for path in complete), default=0)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    """Poll; raises TimeoutError."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"no {what} within {seconds:.0f} s")
        time.sleep(0.05)


FAULTS = {
    "kill": kill,
    "stop": stop,
    "term": term,
    "corrupt": corrupt,
    "full_disk": full_disk,
    "store_errors": store_errors,
    "nan_batch": nan_batch,
}
RESTARTS = {"kill", "stop", "term", "corrupt"}  # those after which a new attempt begins
