"""Compressed reducers as a recipe names them: `ef`, `conef`, `powersgd`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
from pydantic import Field

from hlat.backend.groups import Group
from hlat.reduce.choice import Choice, CompressorName, ErrorName
from hlat.reduce.feedback import Compressed
from hlat.registry import register

if TYPE_CHECKING:
    from hlat.recipe import Recipe

Share = Annotated[float, Field(gt=0, le=1)]
Half = Annotated[float, Field(gt=0, le=0.5)]
Damping = Annotated[float, Field(ge=0, lt=1)]
Below = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=0)]
Rank = Annotated[int, Field(ge=1)]


class _Chosen(Compressed):
    def __init__(
        self,
        dtype: torch.dtype,
        group: Group,
        name: str,
        choice: Choice,
        start_step: int,
        reset_below: float,
    ) -> None:
        choice.check(group.size)
        super().__init__(
            dtype,
            group,
            choice.compressor_maker(),
            choice.store_maker(),
            ratio=choice.ratio,
            start_step=start_step,
            reset_below=reset_below,
            summary=f"{name}: {choice}, dense for {start_step} steps",
        )

    @classmethod
    def idle(cls, options: Mapping[str, Any]) -> dict[str, str]:
        """Options that these others leave nothing to do, and why."""
        kind, error = options.get("compressor", "lowrank"), options.get("error", "exact")
        found = {}
        if kind != "lowrank":
            found["rank"] = f"compressor {kind} makes no products of two matrices"
        if error != "sketch":
            found["size"] = f"error {error} is no sketch"
        return found

    @classmethod
    def refuse(cls, recipe: Recipe) -> None:
        """Raise UserError for options that do not go together, as making one does."""
        dp, make = recipe.parallel.dp, cast("type[Any]", cls)
        make(torch.float32, Group(range(1 if dp == "auto" else dp), 0), **recipe.reduce.options)


@register("reduce", "ef")
class EF(_Chosen):
    """Classic error feedback: send a compressed gradient plus error, keep the rest exactly (4 bytes an
    element on every rank).

    Args:
        compressor: what is sent: block (a random block of each shard), topk (the units with most energy),
            lowrank (PowerSGD), sign, int8.
        ratio: share of the elements that block and topk send.
        rank: of lowrank.
        start_step: steps that are reduced densely first.
        reset_below: forget the error when the learning rate falls to this share of the step before, or less;
            0: never.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        group: Group,
        *,
        compressor: CompressorName = "block",
        ratio: Share = 0.1,
        rank: Rank = 4,
        start_step: Count = 10,
        reset_below: Below = 0.0,
    ) -> None:
        choice = Choice(compressor, ratio, rank, "exact")
        super().__init__(dtype, group, "ef", choice, start_step, reset_below)


@register("reduce", "conef")
class ConEF(_Chosen):
    """Contractive error feedback (arXiv 2312.08538): the error is compressed too, by default as a count
    sketch of `size`.

    Args:
        compressor, ratio, rank, start_step, reset_below: as in `EF`; also unbiased_block, with error none.
        error: how it is kept: sketch, exact, int8 (25 %), fp16 (50 %), none.
        size: of the sketch, as a share of the exact error.
        beta: damping of the sketch; default 1 - size.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        group: Group,
        *,
        compressor: CompressorName = "block",
        ratio: Share = 0.1,
        rank: Rank = 4,
        error: ErrorName = "sketch",
        size: Half = 0.2,
        beta: Damping | None = None,
        start_step: Count = 10,
        reset_below: Below = 0.0,
    ) -> None:
        choice = Choice(compressor, ratio, rank, error, size, beta)
        super().__init__(dtype, group, "conef", choice, start_step, reset_below)


@register("reduce", "powersgd")
class PowerSGD(_Chosen):
    """Each matrix of the gradient as a product of two thin ones (arXiv 1905.13727), with exact error
    feedback.

    Args:
        rank: columns of the thin matrices.
        start_step, reset_below: as in `EF`.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        group: Group,
        *,
        rank: Rank = 4,
        start_step: Count = 10,
        reset_below: Below = 0.0,
    ) -> None:
        choice = Choice("lowrank", rank=rank, error="exact")
        super().__init__(dtype, group, "powersgd", choice, start_step, reset_below)
