"""The recipe's section on number formats."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from hlat.section import Section

Dtype = Literal["fp32", "bf16"]


def narrow_sums(compute: str, master: str, states: str, accumulate: str) -> tuple[str, ...]:
    """The keys of `precision` that keep a running sum in bf16: of updates, of moments, of gradients."""
    own_masters = master == "none" and compute == "bf16"
    kept = {"master": own_masters, "states": states == "bf16", "accumulate": accumulate == "bf16"}
    return tuple(name for name, narrow in kept.items() if narrow)


class PrecisionSection(Section):
    """Which number format each part of a step uses."""

    compute: Dtype = "bf16"
    """Forward and backward matrix products. A CPU without bf16 instructions makes them in fp32 and rounds."""
    master: Literal["fp32", "none"] = "fp32"
    """Master copy of the weights; none: the compute weights are updated themselves."""
    states: Dtype = "fp32"
    """Optimizer moments."""
    accumulate: Dtype = "fp32"
    """Gradient accumulation over micro-batches."""
    reduce: Dtype = "fp32"
    """Gradient reduction over ranks."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How fp32 results become bf16 weights, moments and sums of gradients. Default: stochastic where master
    is none, or states or accumulate bf16, since to nearest a sum in bf16 loses small changes for good.
    """

    @model_validator(mode="before")
    @classmethod
    def _rounding_that_keeps_sums(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "rounding" in data:
            return data
        chosen = {name: data.get(name, field.default) for name, field in cls.model_fields.items()}
        kept_in_bf16 = narrow_sums(
            chosen["compute"], chosen["master"], chosen["states"], chosen["accumulate"]
        )
        return {**data, "rounding": "stochastic"} if kept_in_bf16 else data
