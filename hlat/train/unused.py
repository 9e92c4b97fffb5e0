"""Keys that a recipe sets and that do nothing in it because of another; `hlat recipes check` and `hlat train`
note them.

A plug-in may say it of its own options: `idle(options)` gives {option: why}.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hlat.optim.groups import idle_overrides
from hlat.registry import lookup
from hlat.section import PluginSection
from hlat.train.run import overrides_of, trained_groups
from hlat.train.update import needs_backward

if TYPE_CHECKING:
    from hlat.recipe import Recipe

Rules = dict[str, str]


def unused(recipe: Recipe, written: Mapping[str, Any]) -> list[str]:
    """A line "key: why it does nothing" for each key of the recipe's mapping that has no effect.

    A value of `parallel` or `precision` that is the default asks for nothing and is not noted. With `dp:
    auto` the number of ranks is not known: then none is noted that more replicas would need.

    Args:
        recipe: valid.
        written: what it, its bases and the command line say, sections as mappings.
    """
    keys = list(_keys(written))
    rules = {**_of_plugins(recipe), **_of_figures(recipe), **_of_ranks(recipe), **_of_weights(recipe)}
    rules |= {**_of_data(recipe), **_of_precision(recipe), **_of_optimizer(recipe, keys)}
    return [f"{key}: {rules[key]}" for key in keys if key in rules]


def _keys(written: Any, path: str = "") -> Iterator[str]:
    """Every key of nested mappings and lists of them, as data.sources[0].weight."""
    if path:
        yield path
    if isinstance(written, Mapping):
        for key, value in written.items():
            yield from _keys(value, f"{path}.{key}" if path else str(key))
    elif isinstance(written, list | tuple):
        for number, value in enumerate(written):
            if isinstance(value, Mapping):
                yield from _keys(value, f"{path}[{number}]")


def _not_default(section: str, values: Any, rules: Rules) -> Rules:
    """The rules, by dotted key, for those fields of a section that have not their default."""
    fields = type(values).model_fields
    return {f"{section}.{k}": why for k, why in rules.items() if getattr(values, k) != fields[k].default}


def _of_optimizer(recipe: Recipe, keys: list[str]) -> Rules:
    name = recipe.method.name
    if not needs_backward(recipe):
        why = f"does nothing: method {name!r} uses no optimizer, its rates are its own options"
        return {key: why for key in keys if key.startswith("optim.") and key.count(".") == 1}
    overrides = overrides_of(recipe)
    found = {
        f"optim.groups[{i}]": f"{overrides[i].match!r} has nothing to do: {why}"
        for i, why in idle_overrides(trained_groups(recipe), overrides)
    }
    if recipe.optim.weight_decay == 0:
        found["optim.decay"] = "does nothing with optim.weight_decay 0"
    return found


def _of_plugins(recipe: Recipe) -> Rules:
    """What plug-ins say of their own options."""
    found = {}
    for kind, section in recipe:
        if isinstance(section, PluginSection):
            ask = getattr(lookup(kind, section.name), "idle", None)
            idle: Rules = ask(section.options) if ask else {}
            found.update({f"{kind}.{k}": f"does nothing: {why}" for k, why in idle.items()})
    return found


def _of_precision(recipe: Recipe) -> Rules:
    found: Rules = {}
    if not needs_backward(recipe):
        why = f"does nothing: method {recipe.method.name!r} has neither gradients nor moments"
        found = dict.fromkeys(("states", "accumulate", "reduce"), why)
    if recipe.precision.compute == "fp32":
        found["master"] = "does nothing: weights in fp32 are their own masters"
    return _not_default("precision", recipe.precision, found)


def _of_weights(recipe: Recipe) -> Rules:
    """What belongs to weights that are not made here, or to a compiler that another one replaces."""
    found: Rules = {}
    if recipe.init.from_ is not None and not recipe.model.classes:
        why = "does nothing: the weights are those of init.from"
        found = dict.fromkeys(("model.init_std", "model.scaled_init"), why)
    if recipe.backend == "nxd" and recipe.compile != "auto":
        found["compile"] = "does nothing: on backend nxd torch-xla compiles"
    return found


def _of_data(recipe: Recipe) -> Rules:
    data = recipe.data
    if data.examples is None:
        alone = len(data.sources) == 1
        return {"data.sources[0].weight": "does nothing: one source is the whole mixture"} if alone else {}
    if not (data.examples.eval_path or data.examples.eval_dataset):
        return {}
    why = "does nothing: the held-out examples are those of data.examples.eval_"
    why += "path" if data.examples.eval_path else "dataset"
    return {"data.holdout": why, "data.examples.group_field": why}


def _of_figures(recipe: Recipe) -> Rules:
    """What belongs to a curve, tasks or held-out documents that the recipe does not have."""
    found = {}
    if recipe.schedule.name == "constant":
        found["schedule.floor"] = "does nothing: the schedule 'constant' does not fall"
        if recipe.schedule.horizon_steps is not None:
            found["schedule.horizon_steps"] = "does nothing: the schedule 'constant' has no end"
    if not recipe.eval.tasks:
        found["eval.limit"] = "does nothing without eval.tasks"
    if recipe.data.holdout == 0 and recipe.data.examples is None and not recipe.eval.tasks:
        why = "does nothing: nothing is held out (data.holdout 0), and there are no tasks"
        found.update(dict.fromkeys(("eval.rows", "eval.every"), why))
    return found


def _of_ranks(recipe: Recipe) -> Rules:
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
    return _not_default("parallel", section, found)
