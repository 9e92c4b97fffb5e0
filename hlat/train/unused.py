"""Keys that a recipe sets and that do nothing in it because of another; `hlat recipes check` notes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hlat.registry import lookup

if TYPE_CHECKING:
    from hlat.recipe import Recipe


def unused(recipe: Recipe, written: Mapping[str, Any]) -> list[str]:
    """A line "key: why it does nothing" for each key of the recipe's mapping that has no effect.

    A value of `parallel` that is the default asks for nothing and is not noted. With `dp: auto` the number of
    ranks is not known: then none is noted that more replicas would need.

    Args:
        recipe: valid.
        written: what it, its bases and the command line say, sections as mappings.
    """
    rules = {**_without_backward(recipe, written), **_of_figures(recipe), **_of_ranks(recipe)}
    return [f"{key}: {rules[key]}" for key in _keys(written) if key in rules]


def _keys(written: Mapping[str, Any]) -> Iterator[str]:
    for section, values in written.items():
        if isinstance(values, Mapping):
            yield from (f"{section}.{key}" for key in values)


def _without_backward(recipe: Recipe, written: Mapping[str, Any]) -> dict[str, str]:
    if getattr(lookup("method", recipe.method.name), "needs_backward", True):
        return {}
    why = f"does nothing: method {recipe.method.name!r} uses no optimizer, its rates are its own options"
    return {key: why for key in _keys(written) if key.startswith("optim.")}


def _of_figures(recipe: Recipe) -> dict[str, str]:
    """What belongs to a curve, tasks or held-out documents that the recipe does not have."""
    found = {}
    if recipe.schedule.name == "constant":
        found["schedule.floor"] = "does nothing: the schedule 'constant' does not fall"
    if not recipe.eval.tasks:
        found["eval.limit"] = "does nothing without eval.tasks"
    if recipe.data.holdout == 0 and recipe.data.examples is None and not recipe.eval.tasks:
        why = "does nothing: nothing is held out (data.holdout 0), and there are no tasks"
        found.update(dict.fromkeys(("eval.rows", "eval.every"), why))
    return found


def _of_ranks(recipe: Recipe) -> dict[str, str]:
    """What belongs to a kind of parallelism that the recipe does not use."""
    section, found = recipe.parallel, {}
    if section.tp == 1:
        found["sequence"] = "does nothing with parallel.tp 1"
    if section.pp == 1:
        found.update(dict.fromkeys(("schedule", "cuts"), "does nothing with parallel.pp 1"))
    if section.dp == 1:
        found.update(dict.fromkeys(("zero1", "verify_every"), "does nothing with parallel.dp 1"))
    if section.tp == section.pp == section.dp == 1:
        found.update(dict.fromkeys(("timeout", "first_timeout"), "does nothing: one rank waits for no other"))
    fields = type(section).model_fields
    return {f"parallel.{k}": why for k, why in found.items() if getattr(section, k) != fields[k].default}
