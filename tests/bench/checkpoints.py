"""What saving, verifying and loading a checkpoint cost.

    python tests/bench/checkpoints.py [--parameters 14000000] [--rounds 7] [--folder FOLDER] [--out FILE.json]

The state is that of AdamW in fp32: weights and two moments, in matrices of 1024 x 1024. Printed are medians
of the rounds and their range; saving the first time, when the memory for the copy is new, apart. What is
read was written just before: it comes from the system's cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hlat.checkpoint.store import CheckpointStore

SIDE = 1024


def state(parameters: int) -> dict[str, torch.Tensor]:
    """Tensors of so many parameters, rounded up to whole matrices, and of their two moments."""
    matrices = -(-parameters // SIDE**2)
    kinds = ("model", "optim/exp_avg", "optim/exp_avg_sq")
    return {f"{kind}/layer.{i}": torch.randn(SIDE, SIDE) for kind in kinds for i in range(matrices)}


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(parameters: int, rounds: int, root: Path) -> dict[str, list[float]]:
    """Seconds of each operation, one item a round."""
    torch.manual_seed(1)
    tensors = state(parameters)
    seconds: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        seconds.setdefault(name, []).append(value)

    for async_ in (True, False):
        store = CheckpointStore(root / ("background" if async_ else "foreground"), keep=1, async_=async_)
        for number in range(rounds + 1):  # the first is apart: memory and files are new
            start = time.perf_counter()
            store.save(number + 1, tensors, {}, tokens=0)
            returned = time.perf_counter() - start
            store.wait()
            complete = time.perf_counter() - start
            suffix = "" if number else ", the first time"
            if async_:
                note(f"save returns, in the background{suffix}", returned)
            note(f"complete, {'in the background' if async_ else 'without async'}{suffix}", complete)
    for _ in range(rounds):
        note("find the newest and verify every byte", seconds_of(store.newest))
        checkpoint = store.newest()
        assert checkpoint is not None
        note("load", seconds_of(lambda found=checkpoint: found.load_into(tensors)))  # type: ignore[misc]
    return seconds


def main() -> None:
    """See the module text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parameters", type=int, default=14_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one by default")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        seconds = measure(args.parameters, args.rounds, Path(folder))
    size = sum(t.numel() * t.element_size() for t in state(args.parameters).values())
    facts = {"torch": torch.__version__, "cpus": os.cpu_count(), "machine": platform.machine()}
    print(f"{size / 1e6:.0f} MB; " + ", ".join(f"{name} {fact}" for name, fact in facts.items()))
    for name, values in seconds.items():
        middle = statistics.median(values)
        span = f"{min(values):.3f} to {max(values):.3f}"
        print(f"{name:55} {middle:.3f} s ({span}), {size / 1e6 / middle:,.0f} MB/s")
    if args.out is not None:
        text = json.dumps({"bytes": size, **facts, "seconds": seconds}, indent=1) + "\n"
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
