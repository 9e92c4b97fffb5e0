"""The arithmetic of MADA as pure functions of tensors: one step, and how it depends on each coefficient.

Everything is elementwise, so tensors may have any shape and float dtype. Coefficients are tensors () or
Python floats. Equations: arXiv 2401.08893, in the order of the authors' code; the derivatives are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = ("beta1", "beta2", "beta3", "rho", "c", "gamma")
LION_BETA1, LION_BETA2 = 0.95, 0.98  # fixed in the authors' code, "suggested for GPT-2"
SMALLEST_ROOT = 1e-12  # a second moment that has underflowed to 0 must not make 0 / 0 of a derivative
AUTHORS_V0 = 1e-15  # their first second moment: keeps the root differentiable for autograd

Coefficients = Mapping[str, Any]  # name -> tensor () or float
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Terms:
    """Which parts of the update are there at all; those that fixed coefficients switch off cost nothing.

    adaptive: the Adam-like direction (gamma is not fixed at 0). lion: the sign direction (gamma is not fixed
    at 1). mean: AVGrad's average of second moments (rho not fixed at 1). yogi: c not fixed at 1. difference:
    Adan's gradient difference (beta3 not fixed at 0).
    authors: do as the released code does: no previous gradient in the difference, the average of Lion updated
    before it is used, the first difference moment set to the squared gradient.
    """

    adaptive: bool = True
    lion: bool = True
    mean: bool = True
    yogi: bool = True
    difference: bool = True
    authors: bool = False


def at_step(h: Coefficients, t: Tensor) -> dict[str, Any]:
    """The six coefficients with what follows from them and the step's number `t` (), from 1: once for all
    elements, as no power belongs in an elementwise kernel.

    rest: 1 - h, by name. over1, over2: bias corrections 1 / (1 - beta^t). pull1, pull2: their derivatives,
    t beta^(t-1) / (1 - beta^t)^2 and t beta^(t-1) / (1 - beta^t). over_t: 1 / t. first: bool, whether t is 1.
    """
    over1, over2 = 1 / (1 - h["beta1"] ** t), 1 / (1 - h["beta2"] ** t)
    return {
        **h,
        "rest": {name: 1 - value for name, value in h.items()},
        "over1": over1,
        "over2": over2,
        "pull1": t * h["beta1"] ** (t - 1) * over1 * over1,
        "pull2": t * h["beta2"] ** (t - 1) * over2,
        "over_t": 1 / t,
        "first": t == 1,
    }


def advance(
    old: State, g: Tensor, h: Coefficients, terms: Terms
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The moments of step t from those of step t - 1.

    Args:
        old: `m` and `v`, `mean`, `n`, `lion` as far as `terms` asks for them, and `g_prev`, the gradient of
            the step before (with `difference`, unless `authors`).
        g: gradient of this step, after clipping.
        h: the coefficients `at_step` t.

    Returns:
        The new moments, and what else the direction and the derivatives need: `d`, `ghat`, `square`, `sign`,
        `target`, `u`.
    """
    new: dict[str, Tensor] = {}
    extra: dict[str, Tensor] = {}
    if terms.lion:
        new["lion"] = LION_BETA2 * old["lion"] + (1 - LION_BETA2) * g
        base = new["lion"] if terms.authors else old["lion"]
        extra["u"] = LION_BETA1 * base + (1 - LION_BETA1) * g
    if not terms.adaptive:
        return new, extra
    ghat, v, rest = g, old["v"], h["rest"]
    if terms.authors:
        v = torch.where(h["first"], AUTHORS_V0, v)
    if terms.difference:
        extra["d"] = d = g if terms.authors else g - old["g_prev"]
        ghat = g + h["beta3"] * d
        n = torch.where(h["first"], g * g, old["n"]) if terms.authors else old["n"]
        new["n"] = h["beta3"] * n + rest["beta3"] * d
    extra["ghat"], extra["square"] = ghat, ghat * ghat
    extra["target"] = extra["square"]
    if terms.yogi:
        extra["sign"] = torch.sign(extra["square"] - v)
        yogi = v + extra["square"] * extra["sign"]
        extra["target"] = h["c"] * extra["square"] + rest["c"] * yogi
    new["m"] = h["beta1"] * old["m"] + rest["beta1"] * g
    new["v"] = h["beta2"] * v + rest["beta2"] * extra["target"]
    if terms.mean:
        new["mean"] = old["mean"] + (new["v"] - old["mean"]) * h["over_t"]
    return new, extra


def direction(
    new: State, extra: State, h: Coefficients, terms: Terms, eps: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the learning rate multiplies, from the moments of step t; and its parts: `psi`, `root`,
    `denominator`, `numerator`.
    """
    if not terms.adaptive:
        return torch.sign(extra["u"]), {}
    psi = new["v"]
    if terms.mean:
        psi = h["rho"] * new["v"] + h["rest"]["rho"] * new["mean"]
    root = (psi * h["over2"]).sqrt()
    denominator = root + eps
    numerator = new["m"] * h["over1"]
    if terms.difference:
        numerator = numerator + h["beta3"] * new["n"]
    parts = {"psi": psi, "root": root, "denominator": denominator, "numerator": numerator}
    move = numerator / denominator
    if terms.lion:
        move = h["gamma"] * move + h["rest"]["gamma"] * torch.sign(extra["u"])
    return move, parts


def sensitivities(
    old: State,
    g: Tensor,
    h: Coefficients,
    terms: Terms,
    eps: float,
    names: Iterable[str] = COEFFICIENTS,
    *,
    through_mean: bool = False,
) -> dict[str, Tensor]:
    """The derivative of step t's direction with respect to each named coefficient, elementwise.

    The moments of step t - 1 are constants (one-step truncation), signs have derivative 0.

    Args:
        old, g, h, terms, eps: as in `advance` and `direction`.
        names: coefficients wanted; the terms they belong to must be there.
        through_mean: also through AVGrad's average, which depends on v; the authors stop the derivative
            there.
    """
    new, extra = advance(old, g, h, terms)
    _, part = direction(new, extra, h, terms, eps)
    _, beta2, beta3, rho, c, gamma = (h[name] for name in COEFFICIENTS)
    inverse = 1 / part["denominator"]
    # gamma times the derivative of 1 / (sqrt(psi / B2) + eps) with respect to psi, times the numerator
    slope = part["numerator"] * inverse * inverse / part["root"].clamp(min=SMALLEST_ROOT)
    slope = slope * (-0.5 * gamma * h["over2"])
    share = (rho + (1 - rho) * h["over_t"]) if through_mean and terms.mean else rho
    v = torch.where(h["first"], AUTHORS_V0, old["v"]) if terms.authors else old["v"]
    out: dict[str, Tensor] = {}
    for name in names:
        if name == "gamma":
            out[name] = part["numerator"] * inverse - torch.sign(extra["u"])
        elif name == "beta1":
            inner = (old["m"] - g) * h["over1"] + new["m"] * h["pull1"]
            out[name] = inner * inverse * gamma
        elif name == "rho":
            out[name] = slope * (new["v"] - new["mean"])
        elif name == "c":
            inner = extra["square"] - v - extra["square"] * extra["sign"]
            out[name] = slope * inner * (share * (1 - beta2))
        elif name == "beta2":
            inner = share * (v - extra["target"]) + part["psi"] * h["pull2"]
            out[name] = slope * inner
        else:
            n = torch.where(h["first"], g * g, old["n"]) if terms.authors else old["n"]
            first = (new["n"] + beta3 * (n - extra["d"])) * inverse * gamma
            second = extra["ghat"] * extra["d"] * (2 * share * (1 - beta2))
            if terms.yogi:
                second = second * (c + (1 - c) * extra["sign"])
            out[name] = first + slope * second
    return out
