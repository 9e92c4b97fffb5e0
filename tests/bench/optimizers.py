"""What an optimizer costs beside AdamW: its own step on the same shards, and the whole training step.

    OMP_NUM_THREADS=2 python tests/bench/optimizers.py [--pairs 15] [--names mada,hyperadam,lion]

Both are measured in pairs, AdamW (HLAT's, one fused pass, and torch.optim's as it comes and fused) and the
other one by turns in the same process, in two processes that build them in either order, and reported as the
median of all pairs' ratios with its middle half. Run it alone on an idle machine. The shards are those of the
benchmark model (tests/bench/model.py), random gradients; optimizers are compiled as `hlat train` compiles
them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
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


def torch_adamw(run: Run, **options: bool) -> Callable[[], object]:
    """The same for `torch.optim.AdamW`, as it comes or with options, on copies of the shards."""
    params = []
    for bucket in run.buckets:
        params.append(torch.nn.Parameter(bucket.master.detach().clone()))
        params[-1].grad = bucket.master.grad
    optimizer = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, **options)
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


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Ratios of one optimizer's times to AdamW's, pair by pair, in this process.

    What is built second finds less of the memory that lies in huge pages, and its backward pass is slower for
    it, so `--second` says which of the two that is.
    """
    name, compiled = args.name, not args.eager
    if args.second == name:
        base = build(compiled=compiled)
        run = build(f"optim={{name: {name}}}", compiled=compiled)
    else:
        run = build(f"optim={{name: {name}}}", compiled=compiled)
        base = build(compiled=compiled)
    ratios: dict[str, list[float]] = {}
    if not args.optimizer_only:  # first: random gradients would make another model of it
        for one in (run, base):
            seconds(lambda one=one: train_step(one), 3)
        ratios["whole"] = paired(lambda: train_step(run), lambda: train_step(base), args.pairs, 1)
    ours, theirs = stepper(run), stepper(base)
    for action in (ours, theirs):
        seconds(action, 3)
    ratios["own"] = paired(ours, theirs, args.pairs, 5)
    ratios["usual"] = paired(ours, torch_adamw(base), args.pairs, 5)
    ratios["fused"] = paired(ours, torch_adamw(base, fused=True), args.pairs, 5)
    return ratios


def both_orders(name: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """`measure` in two processes, one for each order in which the two runs are built."""
    ratios: dict[str, list[float]] = {}
    for second in (name, "adamw"):
        command = [sys.executable, __file__, "--name", name, "--second", second, "--pairs", str(args.pairs)]
        command += ["--eager"] * args.eager + ["--optimizer-only"] * args.optimizer_only
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        for kind, values in json.loads(found.splitlines()[-1]).items():
            ratios.setdefault(kind, []).extend(values)
    return ratios


WHAT = {
    "own": "own step {} of HLAT's AdamW's",
    "usual": "own step {} of torch.optim.AdamW's",
    "fused": "own step {} of torch.optim.AdamW(fused=True)'s",
    "whole": "whole step {} of AdamW's",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=15, help="in each of the two orders of building")
    parser.add_argument("--names", default="mada,hyperadam,avgrad,adan,lion,yogi,amsgrad")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--optimizer-only", action="store_true", help="not the whole step")
    parser.add_argument("--name", help="measure this one in this process; prints JSON")
    parser.add_argument("--second", help="with --name: which of the two runs is built second")
    args = parser.parse_args()
    if args.name:
        print(json.dumps(measure(args)))
        return 0
    threads = torch.get_num_threads()
    print(f"{threads} threads, twice {args.pairs} pairs, torch {torch.__version__}")
    failed = False
    for name in args.names.split(","):
        ratios = both_orders(name, args)
        for kind, values in ratios.items():
            print(f"{name}: {WHAT[kind].format(quartiles(values))}", flush=True)
        if name in LIMITS:
            usual, whole = LIMITS[name]
            failed |= statistics.median(ratios["usual"]) > usual
            failed |= statistics.median(ratios.get("whole", [1.0])) > 1 + whole
    print("limits exceeded" if failed else "within limits")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
