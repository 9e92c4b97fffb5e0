"""Two data-parallel processes of one thread each beside one process of two threads, at equal global batch.

    python tests/bench/two_processes.py            # interleaved rounds, medians and ratios

The benchmark model and batch of this folder. Each measurement is a job of its own; step times leave out the
first steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch
import torch.distributed as dist

WARM_UP, STEPS = 4, 16
HALF = ["parallel.dp=2", "data.micro_batch=4"]
KINDS = {"one process": [], "two processes": HALF, "two, zero1": [*HALF, "parallel.zero1=true"]}


def measure(overrides: list[str]) -> float:
    """Tokens per second of this rank's job."""
    from model import build

    from hlat.train.loop import manual_collection
    from hlat.train.step import train_step

    run = build(*overrides, compiled=True)
    times = []
    with manual_collection() as collector:
        for _ in range(WARM_UP + STEPS):
            start = time.perf_counter()
            float(train_step(run)["loss"])
            collector()
            times.append(time.perf_counter() - start)
    return run.recipe.tokens_per_step / statistics.median(times[WARM_UP:])


def job(overrides: list[str]) -> float:
    """Start a job as a user would and read the first rank's figure."""
    processes = 2 if overrides else 1
    start = [sys.executable]
    if overrides:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(2 // processes)}
    command = [*start, __file__, "--measure", json.dumps(overrides)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return float(output.strip().splitlines()[-1])


def main() -> None:
    """Measure in turns and print medians and ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.measure is not None:
        overrides = json.loads(args.measure)
        torch.set_num_threads(1 if overrides else 2)
        if overrides:
            dist.init_process_group("gloo")
        speed = measure(overrides)
        if not overrides or dist.get_rank() == 0:
            print(speed)
        return
    speeds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(args.rounds):
        for kind, overrides in KINDS.items():
            speeds[kind].append(job(overrides))
            print(f"round {number + 1} {kind:14} {speeds[kind][-1]:9,.0f} tokens/s", flush=True)
    for kind in KINDS:
        ratios = [a / b for a, b in zip(speeds[kind], speeds["one process"], strict=True)]
        print(
            f"{kind:14} {statistics.median(speeds[kind]):9,.0f} tokens/s, "
            f"{statistics.median(ratios):.2f} of one process ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
