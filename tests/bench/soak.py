"""A long run with each optimizer and each reducer: does anything grow, drift, or get lost?

    python tests/bench/soak.py [--steps 20000] [--kills 5] [--names adamw,mada,conef,...] [--out soak.json]

The decoder of the soak test (tests/soak.py; 6,500 parameters, two epochs of made-up text, default guard,
evaluations, checkpoints), in one process for an optimizer and in two over gloo for a reducer. Printed is,
for 1 %, 50 % and 100 % of the steps: loss and milliseconds a step around them, updates skipped until there,
memory and open files of the (first) process. With --kills each run is done once more, killed by SIGKILL at
so many random moments and started again, and compared with the undisturbed one: rows but for times, weights
and states bitwise. What is not right is named, and ends this with 1. Nothing is judged by time.

--out gets command, date, versions, seeds and all figures after each run.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import soak

import hlat
from hlat.registry import names

RATES = {"sgd": 3e-2, "lion": 3e-4, "muon": 3e-3, "yogi": 3e-3}  # others: the recipe's
MARKS = (0.01, 0.5, 1.0)


def kinds() -> dict[str, tuple[list[str], int]]:
    """Name -> overrides and ranks: every optimizer and every reducer there is."""
    optimizers = {
        name: ([f"optim={{name: {name}, lr: {RATES.get(name, 1e-3)}}}"], 1) for name in names("optim")
    }
    return optimizers | {name: ([f"reduce={{name: {name}}}"], 2) for name in names("reduce")}


def figures(run: Path, samples: list[soak.Sample], steps: int) -> list[dict[str, Any]]:
    """What is printed, for each of the marks."""
    rows = soak.rows_of(run)
    around = max(10, steps // 50)
    found = []
    for mark in MARKS:
        step = max(1, int(mark * steps))
        near = [row for row in rows if step - around < row["step"] <= step]
        held = min(samples, key=lambda sample: abs(sample.step - step))
        losses = [row["loss"] for row in near if row["loss"] is not None]
        found.append(
            {
                "step": step,
                "loss": statistics.fmean(losses) if losses else None,
                "skipped": sum(row["skipped"] for row in rows if row["step"] <= step),
                "memory": held.memory,
                "files": held.files,
                "seconds": statistics.median(row["step_seconds"] for row in near),
            }
        )
    return found


def measure(name: str, steps: int, kills: int, seed: int) -> dict[str, Any]:
    """Run one of the kinds. `faults` of the result is empty when all is right."""
    overrides, ranks = kinds()[name]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hlat-soak-") as folder:
        place = soak.Soak(Path(folder) / "soak", steps, overrides, ranks)
        result: dict[str, Any] = {"overrides": overrides, "ranks": ranks, "marks": [], "faults": []}
        try:
            run = place.train("whole")
            samples = place.samples("whole")
            result["marks"] = figures(run, samples, steps)
            result["faults"] += soak.faults(place, run, samples)
            if kills:
                killed = place.train_killed("killed", kills=kills, seed=seed)
                result["faults"] += [f"killed: {line}" for line in soak.differences(run, killed)]
        except RuntimeError as error:
            result["faults"].append(str(error))
    return {**result, "minutes": round((time.monotonic() - began) / 60, 2)}


def show(name: str, result: dict[str, Any]) -> None:
    """A line for each mark, and one for each fault."""
    for mark in result["marks"]:
        loss = "-" if mark["loss"] is None else f"{mark['loss']:.4f}"
        print(
            f"{name:12}{mark['step']:>9,}{loss:>9}{mark['skipped']:>9}{mark['memory'] / 1e6:>9.1f} MB"
            f"{mark['files']:>7}{1000 * mark['seconds']:>9.2f} ms",
            flush=True,
        )
    for fault in result["faults"]:
        print(f"{name:12}NOT RIGHT: {fault}", flush=True)


def main() -> int:
    """Run what is asked for; 1 where something is not right."""
    known = kinds()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000, help="of each run, at least 1,000")
    parser.add_argument("--kills", type=int, default=0, help="in a second run, compared with the first")
    parser.add_argument("--names", default=",".join(known), help="optimizers and reducers (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--out", type=Path, default=Path("soak.json"))
    args = parser.parse_args()
    wanted = args.names.split(",")
    if unknown := [name for name in wanted if name not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    if args.steps < 1000 or args.kills < 0:
        parser.error("--steps is at least 1000, --kills at least 0")
    head = {
        "command": shlex.join(["python", "tests/bench/soak.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {
            "hlat": hlat.__version__, "torch": torch.__version__, "python": platform.python_version()
        },
        "seeds": {"run": soak.SEED, "text": soak.SEED, "kills": args.seed},
        "steps": args.steps,
        "kills": args.kills,
    }  # fmt: skip
    print(f"{'':12}{'step':>9}{'loss':>9}{'skipped':>9}{'memory':>12}{'files':>7}{'a step':>12}")
    results: dict[str, Any] = {}
    for name in wanted:
        results[name] = measure(name, args.steps, args.kills, args.seed)
        show(name, results[name])
        args.out.write_text(json.dumps({**head, "runs": results}, indent=1) + "\n")
    wrong = [name for name, result in results.items() if result["faults"]]
    print(f"not right: {', '.join(wrong)}" if wrong else "all is right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
