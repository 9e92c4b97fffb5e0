"""What an optimizer costs beside AdamW: its own step on the same shards, and the whole training step.

    OMP_NUM_THREADS=2 python tests/bench/optimizers.py [--pairs 15] [--names mada,hyperadam,lion]

Both are measured in pairs, AdamW (HLAT's, one fused pass, and torch.optim's as it comes) and the other one by
turns in the same process, and reported as the median of the pairs' ratios with its middle half. Run it alone
on an idle machine. The shards are those of the benchmark model (tests/bench/model.py), random gradients;
optimizers are compiled as `hlat train` compiles them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from model import build

from hlat.train.run import Run
from hlat.train.step import train_step

LIMITS = {"mada": (2.0, 0.05)}  # own time over torch.optim.AdamW's, and share added to the whole step


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def seconds(action: Callable[[], object], repeat: int = 1) -> float:
    began = time.perf_counter()
    for _ in range(repeat):
        action()
    return (time.perf_counter() - began) / repeat


def stepper(run: Run) -> Callable[[], None]:
    """The optimizer's own step on a run's shards, with fresh random gradients of a usual size."""
    make = torch.Generator().manual_seed(1)
    for bucket in run.buckets:
        bucket.master.grad = torch.randn(bucket.master.shape, generator=make) * 1e-3
    keep, clip = torch.tensor(True), torch.tensor(0.9)
    run.set_learning_rate()
    return lambda: run.optimizer.step(keep=keep, clip=clip)  # type: ignore[call-arg]


def torch_adamw(run: Run) -> Callable[[], object]:
    """The same for `torch.optim.AdamW` as it comes, on copies of the shards."""
    params = []
    for bucket in run.buckets:
        params.append(torch.nn.Parameter(bucket.master.detach().clone()))
        params[-1].grad = bucket.master.grad
    optimizer = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer.step()
    return optimizer.step


def paired(ours: Callable[[], object], theirs: Callable[[], object], pairs: int, repeat: int) -> list[float]:
    """Ratios of times; which one goes first changes from pair to pair."""
    ratios = []
    for i in range(pairs):
        if i % 2:
            b = seconds(theirs, repeat)
            a = seconds(ours, repeat)
        else:
            a = seconds(ours, repeat)
            b = seconds(theirs, repeat)
        ratios.append(a / b)
    return ratios


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--names", default="mada,hyperadam,avgrad,adan,lion,yogi,amsgrad")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--optimizer-only", action="store_true", help="not the whole step")
    args = parser.parse_args()
    base = build(compiled=not args.eager)
    elements = sum(bucket.master.numel() for bucket in base.buckets)
    threads = torch.get_num_threads()
    print(f"{elements:,} elements, {threads} threads, {args.pairs} pairs, torch {torch.__version__}")
    failed = False
    for name in args.names.split(","):
        run = build(f"optim={{name: {name}}}", compiled=not args.eager)
        ours, theirs = stepper(run), stepper(base)
        for action in (ours, theirs):
            seconds(action, 3)
        own = paired(ours, theirs, args.pairs, 5)
        print(f"{name}: own step {quartiles(own)} of HLAT's AdamW's", flush=True)
        usual = paired(ours, torch_adamw(base), args.pairs, 5)
        print(f"{name}: own step {quartiles(usual)} of torch.optim.AdamW's", flush=True)
        limits = LIMITS.get(name)
        failed |= limits is not None and statistics.median(usual) > limits[0]
        if args.optimizer_only:
            continue
        for one in (run, base):
            seconds(lambda one=one: train_step(one), 2)
        whole = paired(lambda run=run: train_step(run), lambda: train_step(base), args.pairs, 1)
        print(f"{name}: whole step {quartiles(whole)} of AdamW's", flush=True)
        failed |= limits is not None and statistics.median(whole) > 1 + limits[1]
    print("limits exceeded" if failed else "within limits")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
