"""What compression and error update cost beside the backward pass, without a network.

    python tests/bench/conef_cost.py [--rows 8] [--reduce '{name: conef, start_step: 0}']

The benchmark model in one process: seconds of backward, and of everything the reducer does in a step
(choosing and gathering what is sent, spreading it, sketching the rest, moving the error), medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from model import build


def clock(call: Callable[[], object], repetitions: int = 15) -> float:
    """Median seconds of a call, after three unmeasured ones."""
    times = []
    for _ in range(repetitions + 3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="rows of 512 tokens in a step")
    parser.add_argument("--reduce", default="{name: conef, start_step: 0}")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    batch = f"data.micro_batch={args.rows}", f"data.global_batch={args.rows}"
    run = build(*batch, f"reduce={args.reduce}", compiled=args.compile)
    for bucket in run.buckets:
        bucket.on_ready = None
    batches, tokens = run.next_batches(), torch.tensor(512 * args.rows)
    keep, back = torch.tensor(True), []

    def forward_backward() -> None:
        for bucket in run.buckets:
            bucket.begin()
        loss = run.objective.loss(run.model, batches[0], tokens)
        start = time.perf_counter()
        loss.backward()
        back.append(time.perf_counter() - start)

    def reduction() -> None:
        run.reducer.begin(1000, 1.0)
        run.reducer.reduce(run.buckets)
        run.reducer.commit(keep)

    clock(forward_backward)
    backward = statistics.median(back[3:])
    seconds = clock(reduction)
    elements = sum(bucket.length for bucket in run.buckets)
    print(f"{elements:,} elements, {args.rows} rows, {torch.get_num_threads()} threads")
    print(f"backward {backward * 1e3:.1f} ms, reducer {seconds * 1e3:.1f} ms: {seconds / backward:.1%} of it")


if __name__ == "__main__":
    main()
