"""kill -9 at any moment: what was complete stays, and nothing incomplete is ever taken for complete.

This file is also the program that is killed. A server process has torch imported and forks one writer per
request, so that starting a writer takes milliseconds.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hlat.checkpoint import folder
from hlat.checkpoint.store import CheckpointStore, open_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
KEEP = 1  # the hardest: each save deletes the only checkpoint before it


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {
        "model/a": torch.full((64, 256), float(step)),
        "optim/b": torch.full((64, 256), -float(step)).bfloat16(),
    }


def write_for_ever(root: Path, progress: Path, async_: bool, again: bool) -> None:
    """Continue from the newest checkpoint, saving every step; the last one whose `save` returned is noted."""
    store = CheckpointStore(root, keep=KEEP, async_=async_, warn=lambda line: None)
    newest = store.newest()
    step = newest.step if newest else 0
    while True:
        step += 1
        for _ in range(2 if again else 1):  # a second time: the folder is replaced
            store.save(step, tensors(step), {"step": step}, tokens=step)
        progress.write_text(str(step))


def die_at(operation: int) -> None:
    """From now on count every call that changes the disk, and die just before number `operation`."""
    count = 0

    def counted(function):
        def wrapper(*args, **kwargs):
            nonlocal count
            count += 1
            if count > operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    for name in ("rename", "fsync", "unlink", "rmdir", "mkdir", "open"):
        setattr(os, name, counted(getattr(os, name)))


def serve() -> None:
    """For each line `root progress async again operation` fork a writer and answer its process number."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    torch.set_num_threads(1)
    for line in sys.stdin:
        root, progress, async_, again, operation = line.split()
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                if operation != "-":
                    die_at(int(operation))
                write_for_ever(Path(root), Path(progress), async_ == "1", again == "1")
            os._exit(1)
        print(pid, flush=True)


class Server:
    """The forking process, as the tests see it."""

    def __init__(self) -> None:
        command = [sys.executable, "-W", "ignore", __file__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(
        self, root: Path, progress: Path, async_: bool, again: bool, operation: int | None = None
    ) -> int:
        assert self.process.stdin and self.process.stdout
        last = "-" if operation is None else operation
        print(root, progress, int(async_), int(again), last, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.process.kill()
    server.process.wait()


def wait_until_dead(pid: int, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.002)
    raise AssertionError("the writer still lives")


def noted(progress: Path) -> int:
    return int(progress.read_text() or 0) if progress.exists() else 0


def check(root: Path, progress: Path, async_: bool) -> int:
    """The folder after a kill: readable at once, then tidied up; returns the newest step (0 for none)."""
    returned = noted(progress)
    complete = (
        returned - 1 if async_ else returned
    )  # in the background, the one before is sure to be complete
    if complete > 0:
        assert open_checkpoint(root).step >= complete
    warnings: list[str] = []
    store = CheckpointStore(root, keep=KEEP, warn=warnings.append)
    newest = store.newest()
    assert (newest.step if newest else 0) >= complete
    assert all("ended before this checkpoint was complete" in line for line in warnings), (
        "nothing looked complete but was not"
    )
    for step in store.steps():
        found = open_checkpoint(folder.step_folder(root, step))
        found.verify()
        assert found.meta["step"] == found.step == step
        assert all(torch.equal(found.read(name), tensor) for name, tensor in tensors(step).items())
    hidden = [name for name in os.listdir(root) if name.startswith(".")] if root.exists() else []
    assert hidden == [], "leftovers are removed at the next start"
    return newest.step if newest else 0


def wait_for_step(progress: Path, step: int, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and noted(progress) < step:
        time.sleep(0.002)


@pytest.mark.parametrize(("async_", "again"), [(True, False), (False, True), (True, True)])
def test_twenty_random_moments(server: Server, tmp_path: Path, async_: bool, again: bool) -> None:
    """The same run killed and started again and again; it never goes back further than allowed."""
    root, progress = tmp_path / "checkpoints", tmp_path / "progress"
    moments = random.Random(f"{async_}{again}")
    reached = 0
    for kill in range(20):
        pid = server.start(root, progress, async_, again)
        if kill % 2:  # else it is mostly killed in its first save
            wait_for_step(progress, reached + 2)
        time.sleep(moments.uniform(0.0, 0.05))
        os.kill(pid, signal.SIGKILL)
        wait_until_dead(pid)
        found = check(root, progress, async_)
        assert found >= reached - (1 if async_ else 0)
        reached = found
    assert reached >= 10, "it did make progress"


def test_before_every_disk_operation(server: Server, tmp_path: Path) -> None:
    """Not left to chance: killed before the first, second, ... operation of save, replace and delete."""
    steps = []
    for operation in range(75):
        root, progress = tmp_path / f"{operation}", tmp_path / f"progress-{operation}"
        wait_until_dead(server.start(root, progress, async_=False, again=True, operation=operation))
        steps.append(check(root, progress, async_=False))
    assert sorted(steps) == steps and steps[0] == 0 and steps[-1] >= 2, "the kills fell into several saves"


if __name__ == "__main__":
    serve()
