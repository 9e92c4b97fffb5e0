"""What MADA may be given: ranges of its coefficients, and the options of the descent on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from hlat.optim.mada_step import COEFFICIENTS

Name = Literal["beta1", "beta2", "beta3", "rho", "c", "gamma"]
Share = Annotated[float, Field(ge=0, le=1)]
PerName = dict[Name, float]

# Where the authors' code clamps what it learns.
LIMITS = {
    "beta1": (0.01, 0.99),
    "beta2": (0.501, 0.99),
    "beta3": (0.0, 0.99),
    "rho": (0.0, 1.0),
    "c": (0.0, 1.0),
    "gamma": (0.0, 1.0),
}
_DEFAULTS = {"lr": 2.5e-3, "momentum": 0.5, "clip": 10.0, "start": 50}
_RANGES = {
    "lr": ("at least 0", lambda x: x >= 0),
    "momentum": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "clip": ("more than 0", lambda x: x > 0),
    "start": ("a whole number from 1", lambda x: x >= 1 and x == int(x)),
}


def check_coefficients(start: Mapping[str, float], learn: Iterable[str], compat: str) -> None:
    """Raises ValueError for a coefficient out of its range, one to learn that does not exist or has no
    effect, and an unknown `compat`.
    """
    unknown = [name for name in learn if name not in COEFFICIENTS]
    if unknown:
        raise ValueError(f"learn names {unknown[0]!r}; coefficients are {', '.join(COEFFICIENTS)}")
    for name, value in start.items():
        low, high = LIMITS[name] if name in learn else (0.0, 1.0)
        inside = low <= value <= high and not (name.startswith("beta") and value == 1.0)
        if not inside:
            what = "when learned" if name in learn else "and a beta below 1"
            raise ValueError(f"{name} must lie in [{low:g}, {high:g}] {what}, not {value:g}")
    if "gamma" not in learn and start["gamma"] == 0.0 and any(True for _ in learn):
        raise ValueError("with gamma fixed at 0 (Lion) no other coefficient has an effect to learn from")
    if compat not in ("none", "authors"):
        raise ValueError(f"compat must be 'none' or 'authors', not {compat!r}")


def hyper_options(
    learn: Iterable[str], lr: Any, momentum: Any, clip: Any, start: Any
) -> dict[str, dict[str, float]]:
    """lr, momentum, clip and start of each learned coefficient, from one number for all or a mapping by name,
    in which those left out have their default (as momentum None: 0.5, gamma 0).

    Raises:
        ValueError: a value out of its range, or a name of what is not learned.
    """
    out: dict[str, dict[str, float]] = {}
    given = {"lr": lr, "momentum": {} if momentum is None else momentum, "clip": clip, "start": start}
    for option, value in given.items():
        defaults = dict.fromkeys(learn, _DEFAULTS[option])
        if option == "momentum" and "gamma" in defaults:
            defaults["gamma"] = 0.0
        named = value if isinstance(value, Mapping) else dict.fromkeys(defaults, value)
        what, inside = _RANGES[option]
        for name, number in named.items():
            if name not in defaults:
                learned = ", ".join(defaults) or "nothing"
                raise ValueError(f"hyper_{option} names {name!r}, which is not learned; learn says {learned}")
            if not inside(number):
                raise ValueError(f"hyper_{option} must be {what}, not {number}")
        out[option] = {**defaults, **named}
    return out
