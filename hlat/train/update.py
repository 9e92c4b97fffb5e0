"""What moves the parameters of a run, and how fast: the choices a recipe makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hlat.backend.base import Backend
from hlat.errors import UserError
from hlat.optim.schedule import Schedule, make_schedule
from hlat.parallel.buckets import Bucket
from hlat.recipe import Recipe
from hlat.recipe_sections import OptimSection, ScheduleSection
from hlat.registry import lookup


def needs_backward(recipe: Recipe) -> bool:
    """Whether the recipe's method takes gradients. One that does not makes what moves the parameters itself,
    by `make_optimizer(recipe, buckets, device)`.
    """
    return bool(getattr(lookup("method", recipe.method.name), "needs_backward", True))


def optimizer_of(recipe: Recipe, buckets: Sequence[Bucket], backend: Backend) -> torch.optim.Optimizer:
    """The recipe's optimizer over the master shards.

    Beside its options a group says what its shard is: `pieces` (each parameter's spec, where in the shard it
    lies, and how many of its elements come before), and `counted`: False where another rank holds the same
    elements and counts them in sums over the world.
    """
    section, layout, place = recipe.optim, backend.layout, backend.place
    groups = [
        {
            "params": [bucket.master],
            "lr": torch.zeros((), device=backend.device),
            "peak_lr": bucket.group.lr,
            "weight_decay": bucket.group.weight_decay,
            "first": bucket.first,
            "matrix": bucket.group.matrix,
            "pieces": tuple(bucket.runs()),
            "counted": bucket.primary and (layout.zero1 or place.dp == 0),
        }
        for bucket in buckets
    ]
    # Nothing of what a pipeline rank holds may be trained, and torch's optimizers want a parameter.
    nothing = [{"params": [nn.Parameter(torch.zeros(0, device=backend.device))]}]
    optimizer = _make(section, groups or nothing)
    if hasattr(optimizer, "all_reduce"):
        optimizer.all_reduce = backend.all_reduce
    return optimizer


def check_optimizer(recipe: Recipe) -> None:
    """Raise UserError for options that the recipe's optimizer refuses: it is made for a parameter of its
    own.
    """
    group = {"params": [nn.Parameter(torch.zeros(1))], "lr": torch.zeros(()), "weight_decay": 0.0}
    _make(recipe.optim, [group])


def _make(section: OptimSection, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    try:
        made: torch.optim.Optimizer = lookup("optim", section.name)(groups, **section.options)
    except ValueError as error:
        raise UserError(str(error), where="optim", fix=f"see the options of {section.name!r}") from error
    return made


def schedule_of(recipe: Recipe) -> Schedule:
    """The recipe's schedule."""
    return make_schedule_of(recipe.schedule, recipe.horizon_steps)


def make_schedule_of(section: ScheduleSection, horizon_steps: int) -> Schedule:
    """The schedule that a section describes, ending at `horizon_steps`."""
    return make_schedule(
        section.name,
        warmup_steps=section.warmup_steps,
        horizon_steps=horizon_steps,
        floor=section.floor,
        **section.options,
    )


def first_other_rate(saved: dict[str, Any], recipe: Recipe, steps: int) -> int | None:
    """The first of so many steps, from 1, that had another learning rate in a saved run than it has by this
    recipe's schedule; None where they are all the same.

    Args:
        saved: the resolved recipe of that run.
        recipe: what it is to go on with.
        steps: done so far.
    """
    section = saved.get("schedule", {})
    try:
        former = ScheduleSection.model_validate(section)
        horizon = former.horizon_steps or int(saved.get("run", {})["steps"])
        before, now = make_schedule_of(former, horizon), schedule_of(recipe)
    except (KeyError, TypeError, ValueError, UserError):  # of a plug-in that is no longer there
        return 1
    return next((step + 1 for step in range(steps) if before(step) != now(step)), None)


def same_rates_if_longer(recipe: Recipe, steps: int) -> bool:
    """Whether the rates of the first steps would have been the same with twice as many steps in the run."""
    longer = make_schedule_of(recipe.schedule, recipe.schedule.horizon_steps or 2 * recipe.run.steps)
    now = schedule_of(recipe)
    return all(now(step) == longer(step) for step in range(steps))
