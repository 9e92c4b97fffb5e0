"""What a run says of sums that it keeps in bf16: that they are rounded stochastically, or what is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hlat.optim.rounding import LARGE_STEPS, STEPS, Average, share_summed, times_too_large
from hlat.recipe_precision import narrow_sums
from hlat.train.update import needs_backward

if TYPE_CHECKING:
    from hlat.train.run import Run


_WHAT = {"master": "weights", "states": "moments", "accumulate": "sums of gradients"}


def rounding_lines(run: Run) -> list[str]:
    """One line where sums in bf16 are rounded stochastically, one for each kind of sum that is rounded to
    nearest; none where all of them are fp32.
    """
    precision = run.recipe.precision
    kept = narrow_sums(precision.compute, precision.master, precision.states, precision.accumulate)
    if not kept or not needs_backward(run.recipe):
        return []
    if precision.rounding == "stochastic":
        what = " and ".join(_WHAT[name] for name in kept)
        return [f"note: {what} in bf16 are rounded stochastically; to nearest they would lose small changes"]
    lines = {"master": _weights, "states": _moments, "accumulate": _gradients}
    found = (lines[name](run) for name in kept)
    said = "warning: precision.rounding is nearest (stochastic avoids this)"
    return [f"{said}: {text}" for text in found if text]


def _weights(run: Run) -> str:
    rate = max(bucket.group.lr for bucket in run.buckets) if run.buckets else run.recipe.optim.lr
    return (
        "weights in bf16 without masters (precision.master) lose every update below 1/512 of their size: at "
        f"optim.lr {rate:g} a weight above {512 * rate:.2g} does not follow steps of the size of the rate"
    )


def _moments(run: Run) -> str:
    averages: dict[str, Average] = getattr(run.optimizer, "averages", dict)()
    if not averages:
        return ""
    first, *others = (f"{slot} ({a}) {_times(times_too_large(a))}" for slot, a in averages.items())
    found = ", ".join([f"{first} what it should be", *others])
    return (
        "moments in bf16 (precision.states) lose every change below 1/512 of their value: where gradients "
        f"fall to a tenth after {LARGE_STEPS} steps, at step {STEPS:,} {found}"
    )


def _times(factor: float) -> str:
    return f"{factor:.2g} times" if factor >= 10 else f"{factor:.1f} times"


def _gradients(run: Run) -> str:
    count = run.recipe.accumulate(run.backend.world)
    if count == 1:
        return ""
    return (
        f"sums of gradients in bf16 (precision.accumulate) over {count} micro-batches lose every gradient "
        f"below 1/512 of the sum: of {count} equal ones {100 * share_summed(count):.3g} % arrive"
    )
