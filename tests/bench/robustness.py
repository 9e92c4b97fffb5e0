"""How much a badly chosen beta costs each optimizer: a 3 x 3 grid of starts on a small decoder.

    python tests/bench/robustness.py                        # everything, about an hour on one core
    python tests/bench/robustness.py --steps 300 --seeds 1 --rows "adamw;mada"
    python tests/bench/robustness.py --table                # only the table of what is there

Text is the standard library of the Python that runs this, bytes as tokens, 5 % of the files held out. A
result is a line of the file `--out`; what is in it is not run again, so the study can be stopped and
continued, and several can share the file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hlat.data.batch import Batch
from hlat.recipe import load
from hlat.train.run import build_run
from hlat.train.step import train_step

RECIPE = """
run: {name: robustness, steps: 1000}
model: {layers: 2, hidden: 64, heads: 4, kv_heads: 4, ffn: 176, vocab: 256, max_seq_len: 64}
data: {sources: [{dataset: python-stdlib}], seq_len: 64, micro_batch: 16, global_batch: 16}
precision: {compute: fp32}
optim: {name: adamw, lr: 2.0e-3, weight_decay: 0.1, clip_norm: 1.0}
schedule: {name: cosine, warmup_steps: 50, floor: 0.1}
compile: false
"""
GRID = list(itertools.product((0.01, 0.5, 0.9), (0.501, 0.8, 0.99)))
HELD_OUT_ROWS = 512


def grid(name: str, options: str) -> list[str]:
    """A row's optimizers, one for each start."""
    return [f"{{name: {name}, {options.format(b1=b1, b2=b2)}}}" for b1, b2 in GRID]


ROWS: dict[str, list[str]] = {
    "adamw": grid("adamw", "betas: [{b1}, {b2}], eps: 1.0e-6"),
    "mada": grid("mada", "beta1: {b1}, beta2: {b2}"),
    "mada, rho 0": grid("mada", "beta1: {b1}, beta2: {b2}, rho: 0.0"),
    "hyperadam": grid("hyperadam", "beta1: {b1}, beta2: {b2}"),
    "avgrad": grid("avgrad", "betas: [{b1}, {b2}]"),
    "adan": [f"{{name: adan, lr: {lr}}}" for lr in (1e-3, 2e-3, 4e-3)],
    "lion": [f"{{name: lion, lr: {lr}}}" for lr in (2e-4, 5e-4, 1e-3)],
    "adamw .9 .95": ["{name: adamw, betas: [0.9, 0.95], eps: 1.0e-6}"],
    "mada .9 .95": ["{name: mada}"],
    "mada .9 .95, rho 0": ["{name: mada, rho: 0.0}"],
}


def read_text(limit: int = 3 << 20) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 training and held-out bytes; every twentieth file is held out."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    size = 0
    for number, file in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        text = file.read_bytes()
        size += len(text)
        parts[number % 20 == 7].append(text)
        if size > limit:
            break
    return tuple(torch.frombuffer(bytearray(b"".join(p)), dtype=torch.uint8) for p in parts)  # type: ignore[return-value]


class Text:
    """Random windows of the training bytes; a batch is a pure function of seed and step."""

    fingerprint = "stdlib"

    def __init__(self, train: torch.Tensor, held_out: torch.Tensor, seed: int, length: int) -> None:
        self.train, self.held_out, self.seed, self.length = train, held_out, seed, length

    def batches(self, step: int, micro: int, count: int, rank: int = 0, world: int = 1) -> list[Batch]:
        make = torch.Generator().manual_seed(1_000_000 * self.seed + step)
        return [self._rows(self.train, micro, make) for _ in range(count)]

    def _rows(self, data: torch.Tensor, count: int, make: torch.Generator) -> Batch:
        starts = torch.randint(0, len(data) - self.length - 1, (count, 1), generator=make)
        rows = data[starts + torch.arange(self.length + 1)].long()
        return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())

    def evaluation(self) -> list[Batch]:
        """The same held-out rows for every run."""
        make = torch.Generator().manual_seed(0)
        return [self._rows(self.held_out, 64, make) for _ in range(HELD_OUT_ROWS // 64)]


def train(optim: str, seed: int, steps: int, text: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
    """Held-out loss after a run, mean training loss of its last tenth, coefficients at its end."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "robustness.yaml"
        path.write_text(RECIPE)
        recipe = load(path, [f"optim={optim}", f"run.steps={steps}", f"run.seed={seed}"])
    data = Text(*text, seed=seed, length=recipe.data.seq_len)
    run = build_run(recipe, data)
    losses = [train_step(run)["loss"] for _ in range(steps)]
    tail = torch.stack(losses[-max(1, steps // 10) :]).mean()
    held_out = [run.engine.forward([batch], batch.targets_count()) for batch in data.evaluation()]
    out = {"loss": float(torch.stack(held_out).mean()), "train": float(tail)}
    if hasattr(run.optimizer, "coefficients"):
        out["coefficients"] = run.optimizer.coefficients()
    return out


def known(path: Path) -> dict[tuple[str, int, int], dict[str, Any]]:
    """Results so far: (optimizer, seed, steps) -> result."""
    lines = path.read_text().splitlines() if path.exists() else []
    entries = [json.loads(line) for line in lines]
    return {(e["optim"], e["seed"], e["steps"]): e for e in entries}


def table(results: dict[tuple[str, int, int], dict[str, Any]], steps: int, seeds: int) -> dict[str, Any]:
    """Print each row's mean, worst, best and spread over all starts and seeds; return them."""
    summary: dict[str, Any] = {}
    print(f"{'':22}{'runs':>6}{'mean':>9}{'worst':>9}{'best':>9}{'spread':>9}")
    for name, optims in ROWS.items():
        keys = [(optim, seed, steps) for optim in optims for seed in range(seeds)]
        losses = [results[key]["loss"] for key in keys if key in results]
        if losses:
            # Spread over starts: of the means over seeds.
            means = [
                statistics.fmean(found)
                for optim in optims
                if (found := [results[k]["loss"] for k in keys if k[0] == optim and k in results])
            ]
            spread = statistics.pstdev(means)
            summary[name] = {"mean": statistics.fmean(losses), "worst": max(losses), "spread": spread}
            best = min(losses)
            row = summary[name]
            figures = f"{row['mean']:9.4f}{row['worst']:9.4f}{best:9.4f}{spread:9.4f}"
            print(f"{name:22}{len(losses):6}{figures}")
    for name in ("mada", "mada, rho 0"):
        if not {"adamw", name} <= set(summary):
            continue
        ours, theirs = summary[name], summary["adamw"]
        for what in ("mean", "worst"):
            holds = "holds" if ours[what] < theirs[what] else "DOES NOT HOLD"
            print(f"{name}: {what} below adamw's: {holds} ({ours[what] - theirs[what]:+.4f})")
        ratio = ours["spread"] / max(theirs["spread"], 1e-9)
        holds = "holds" if ratio <= 0.7 else "DOES NOT HOLD"
        print(f"{name}: spread at most 0.7 of adamw's: {holds} ({ratio:.2f})")
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rows", default=";".join(ROWS), help="names, with ; between them (default: all)")
    parser.add_argument("--out", type=Path, default=Path("robustness.jsonl"))
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()
    rows = args.rows.split(";")
    torch.set_num_threads(1)
    text = read_text()
    columns = list(zip(*(ROWS[name] + [""] * (9 - len(ROWS[name])) for name in rows), strict=True))
    order = [(seed, optim) for seed in range(args.seeds) for column in columns for optim in column if optim]
    for seed, optim in [] if args.table else order:  # start by start, so that a part of it compares already
        if (optim, seed, args.steps) in known(args.out):
            continue
        began = time.monotonic()
        entry = {"optim": optim, "seed": seed, "steps": args.steps, **train(optim, seed, args.steps, text)}
        with open(args.out, "a") as file:
            file.write(json.dumps(entry) + "\n")
        seconds = time.monotonic() - began
        print(f"{seed} {optim}: {entry['loss']:.4f} in {seconds:.0f} s", file=sys.stderr, flush=True)
    table(known(args.out), args.steps, args.seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
