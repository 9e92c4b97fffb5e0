"""The counter-example to Adam (Reddi, Kale and Kumar, ICLR 2018), and what MADA learns on it.

    python tests/bench/counter_example.py [--steps 2000000]

f_t(x) = 1010 x in every 101st step and -10 x in the others, on [-1, 1]: over 101 steps the sum is 10 x, so -1
is best. Adam forgets the rare large gradient and goes to +1. One number, in plain Python floats (a minute or
two for 2 million steps); tests/unit/test_counter_example.py holds it against hlat.optim.MADA.
"""

from __future__ import annotations

import argparse
import math
import sys

LR, BETA1, BETA2, EPS = 1e-3, 0.9, 0.99, 1e-6
HYPER_LR, MOMENTUM, CLIP = 0.1, 0.9, 10.0
START = {"beta3": 0.0, "rho": 1.0, "c": 1.0}  # Adam; those three are learned, beta1 and beta2 fixed
TOP = {"beta3": 0.99, "rho": 1.0, "c": 1.0}


def gradient(t: int) -> float:
    """Of f_t, t = 1, 2, …"""
    return 1010.0 if t % 101 == 1 else -10.0


def clamp(x: float, low: float = -1.0, high: float = 1.0) -> float:
    return min(max(x, low), high)


def adam(steps: int, amsgrad: bool = False) -> tuple[float, float]:
    """Last x of Adam or AMSGrad, and the average regret."""
    x = m = v = largest = regret = 0.0
    power1 = power2 = 1.0
    for t in range(1, steps + 1):
        g = gradient(t)
        regret += g * (x + 1.0)
        power1, power2 = power1 * BETA1, power2 * BETA2
        m = BETA1 * m + (1 - BETA1) * g
        v = BETA2 * v + (1 - BETA2) * g * g
        largest = max(largest, v) if amsgrad else v
        x = clamp(x - LR * (m / (1 - power1)) / (math.sqrt(largest / (1 - power2)) + EPS))
    return x, regret / steps


class Mada:
    """MADA for one number, beta3, rho and c learned, gamma 1; the equations of docs/methods/mada.md."""

    def __init__(self, *, zero_previous: bool = False) -> None:
        self.h, self.run = dict(START), dict.fromkeys(START, 0.0)
        self.m = self.v = self.mean = self.n = self.g_prev = 0.0
        self.t = 0
        self.power1 = self.power2 = 1.0
        self.slopes = dict.fromkeys(START, 0.0)  # of the last step
        self.zero_previous = zero_previous

    def step(self, g: float) -> float:
        """How far to go down: learns from this gradient about the last step, then takes the next."""
        if self.t:
            for name, slope in self.slopes.items():
                self.run[name] = MOMENTUM * self.run[name] + clamp(-LR * g * slope, -CLIP, CLIP)
                self.h[name] = clamp(self.h[name] - HYPER_LR * self.run[name], 0.0, TOP[name])
        self.t += 1
        self.power1, self.power2 = self.power1 * BETA1, self.power2 * BETA2
        b3, rho, c = self.h["beta3"], self.h["rho"], self.h["c"]
        over1, over2 = 1 / (1 - self.power1), 1 / (1 - self.power2)
        d = g - self.g_prev
        ghat = g + b3 * d
        square = ghat * ghat
        sign = float((square > self.v) - (square < self.v))
        v_old, n_old = self.v, self.n
        self.m = BETA1 * self.m + (1 - BETA1) * g
        self.v = BETA2 * v_old + (1 - BETA2) * (c * square + (1 - c) * (v_old + square * sign))
        self.n = b3 * n_old + (1 - b3) * d
        self.mean += (self.v - self.mean) / self.t
        root = math.sqrt((rho * self.v + (1 - rho) * self.mean) * over2)
        below, above = root + EPS, self.m * over1 + b3 * self.n
        k = -above * over2 / (2 * max(root, 1e-12) * below * below)
        share = rho * (1 - BETA2)
        self.slopes["rho"] = k * (self.v - self.mean)
        self.slopes["c"] = k * share * (square - v_old - square * sign)
        self.slopes["beta3"] = (self.n + b3 * (n_old - d)) / below + k * share * (
            (c + (1 - c) * sign) * 2 * ghat * d
        )
        self.g_prev = 0.0 if self.zero_previous else g
        return above / below


def mada(steps: int, *, zero_previous: bool = False) -> tuple[float, float, dict[str, float]]:
    """Last x, average regret and coefficients. `zero_previous`: with the released code's slip."""
    optimizer = Mada(zero_previous=zero_previous)
    x = regret = 0.0
    for t in range(1, steps + 1):
        g = gradient(t)
        regret += g * (x + 1.0)
        x = clamp(x - LR * optimizer.step(g))
    return x, regret / steps, optimizer.h


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2_000_000)
    steps = parser.parse_args().steps
    plain, largest, learned = adam(steps), adam(steps, amsgrad=True), mada(steps)
    slip = mada(steps, zero_previous=True)
    print(f"{steps:,} steps; the best x is -1")
    for name, (x, regret) in (("Adam", plain), ("AMSGrad", largest)):
        print(f"{name:28} x {x:+.3f}  average regret {regret:.3f}")
    for name, (x, regret, h) in (("MADA", learned), ("MADA, previous gradient zero", slip)):
        values = "  ".join(f"{key} {value:.4f}" for key, value in h.items())
        print(f"{name:28} x {x:+.3f}  average regret {regret:.3f}  {values}")
    holds = plain[0] > 0.99 and largest[0] < -0.9 and learned[0] < -0.8
    print("Adam at +1, AMSGrad below -0.9, MADA below -0.8:", "holds" if holds else "DOES NOT HOLD")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
