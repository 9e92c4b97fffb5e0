"""MeZO and MeZO-SVRG on least squares: how large a step each bears, and how low it comes.

    python tests/bench/mezo_least_squares.py [--equal-queries]

1,000 examples of 100 features with label noise 1, batches of 32, mu 1e-3, 4,000 steps, excess of the loss
over its minimum, three seeds, fp64. With --equal-queries MeZO gets as many examples through the model as
MeZO-SVRG in its 4,000 steps, which are 66,500 steps, at each of its learning rates; full-batch descent 2,128.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from hlat.method import MeZO, MeZOSVRG

EXAMPLES, FEATURES, BATCH, STEPS, SEEDS = 1000, 100, 32, 4000, (0, 1, 2)
QUERIES = STEPS // 2 * (2 * EXAMPLES + 4 * BATCH)
Make = Callable[[Iterable[Any], int], Any]

CASES: dict[str, Make] = {
    **{f"MeZO, lr {lr:g}": lambda p, s, lr=lr: MeZO(p, lr, seed=s) for lr in (1e-4, 1e-3, 2e-3, 4e-3)},  # type: ignore[misc]
    **{
        f"SVRG, lr_anchor {lr:g}, lr_inner {lr / 100:g}": lambda p, s, lr=lr: MeZOSVRG(
            p, lr, lr / 100, seed=s
        )  # type: ignore[misc]
        for lr in (1e-3, 2e-3, 4e-3)
    },
    "SVRG, both rates 2e-3": lambda p, s: MeZOSVRG(p, 2e-3, 2e-3, seed=s),
    "the same, two z": lambda p, s: MeZOSVRG(p, 2e-3, 2e-3, seed=s, shared_z=False),
    "the same, compat authors": lambda p, s: MeZOSVRG(p, 2e-3, 2e-3, seed=s, compat="authors"),
}
MEZO_RATES = (1e-4, 5e-5, 2e-4, 4e-4)


class Problem:
    """Features, labels and the lowest mean squared error of a seed."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        x, w, e = normal(EXAMPLES, FEATURES), normal(FEATURES), normal(EXAMPLES)
        y = x @ w + e
        best = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
        self.lowest = float((x @ best - y).square().mean())
        self.x, self.y, self.seed = x.to(dtype), y.to(dtype), seed

    def excess(self, make: Make, steps: int = STEPS, full_batch: bool = False) -> float:
        """Loss above the minimum after training from zero."""
        w = torch.nn.Parameter(torch.zeros(FEATURES, dtype=self.x.dtype))
        optimizer, generator = make([w], self.seed), torch.Generator().manual_seed(100 + self.seed)

        def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (x @ w - y).square().mean()

        def whole() -> torch.Tensor:
            return loss(self.x, self.y)

        for _ in range(steps):
            chosen = torch.randint(0, EXAMPLES, (BATCH,), generator=generator)
            x, y = self.x[chosen], self.y[chosen]
            optimizer.step(whole if full_batch else lambda x=x, y=y: loss(x, y), whole)
        return float(loss(self.x.double(), self.y.double()).detach()) - self.lowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--equal-queries", action="store_true", help="give MeZO as many queries as MeZO-SVRG")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    args = parser.parse_args()
    torch.set_num_threads(1)
    problems = [Problem(seed, getattr(torch, args.dtype)) for seed in SEEDS]
    cases: dict[str, tuple[Make, int, bool]] = {name: (make, STEPS, False) for name, make in CASES.items()}
    if args.equal_queries:
        cases = {
            f"MeZO, lr {lr:g}": (lambda p, s, lr=lr: MeZO(p, lr, seed=s), QUERIES // (2 * BATCH), False)  # type: ignore[misc]
            for lr in MEZO_RATES
        }
        steps = QUERIES // (2 * EXAMPLES)
        cases["full batch, lr 4e-3"] = lambda p, s: MeZO(p, 4e-3, seed=s), steps, True
    for name, (make, steps, full) in cases.items():
        began = time.monotonic()
        values = [problem.excess(make, steps, full) for problem in problems]
        shown = "  ".join(f"{value:9.2e}" for value in values)
        print(f"{name:42} {steps:6} steps  {shown}   {time.monotonic() - began:5.0f} s", flush=True)


if __name__ == "__main__":
    main()
