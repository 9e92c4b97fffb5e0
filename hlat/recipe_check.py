"""Turning a mapping into a `Recipe`: validation, then the options of the plug-ins it names."""

from __future__ import annotations

import inspect
import json
import typing
from inspect import Parameter
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from hlat.errors import UserError
from hlat.recipe import Recipe
from hlat.recipe_errors import Where, annotation, expected, in_brackets, is_section, nearest, user_error
from hlat.registry import lookup, options_of
from hlat.section import PluginSection

# Keyword arguments of plug-ins that are set elsewhere in the recipe, so they are not options of the section.
_ELSEWHERE = {
    "optim": {"state_dtype": "precision.states", "rounding": "precision.rounding", "seed": "run.seed"},
}


def build(values: dict[str, Any], where: Where) -> Recipe:
    """The recipe a mapping describes, plug-in options checked and their defaults filled in.

    Args:
        values: sections as plain values.
        where: "file:line: key" of a dotted key.

    Raises:
        UserError: the first thing wrong, and how many more there are.
    """
    sections = [key for key in values if is_section(annotation(key))]
    values = {**values, **{key: {} for key in sections if values[key] is None}}
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise user_error(error, where) from None
    plugins = {kind: section for kind, section in recipe if isinstance(section, PluginSection)}
    update: dict[str, Any] = {kind: _completed(kind, own, where, kind) for kind, own in plugins.items()}
    sinks = [_completed("sink", own, where, f"log.sinks.{n}") for n, own in enumerate(recipe.log.sinks)]
    update["log"] = recipe.log.model_copy(update={"sinks": tuple(sinks)})
    return recipe.model_copy(update=update)


def _completed(kind: str, section: PluginSection, where: Where, key: str) -> PluginSection:
    """A section with the options of its plug-in, defaults included; see `check_options`."""
    shared = {name: getattr(section, name) for name in type(section).model_fields}
    return type(section).model_validate({**shared, **check_options(kind, section, where, key)})


def check_options(kind: str, section: PluginSection, where: Where, key: str) -> dict[str, Any]:
    """The options of the plug-in of a section at `key`, defaults included.

    Raises UserError for an unknown plug-in, an unknown or missing option, or an option of the wrong type.
    """
    plugin = lookup(kind, section.name, where(f"{key}.name"))
    known = own_options(kind, plugin, type(section))
    for name in section.options:
        if name not in known:
            setter = _ELSEWHERE.get(kind, {}).get(name)
            shared = [field for field in type(section).model_fields if field != "name"]
            keys = [*shared, *known]
            fix = f"set {setter} instead" if setter else nearest(name, keys) if keys else "it has no options"
            what = f"unknown key {name!r} for {section.name!r}"
            raise UserError(what, where=where(f"{key}.{name}"), fix=fix)
    hints = _hints(plugin)
    result: dict[str, Any] = {}
    for name, parameter in known.items():
        if name in section.options:
            result[name] = _typed(section.options[name], hints.get(name), where(f"{key}.{name}"))
        elif parameter.default is Parameter.empty:
            what = f"{kind} {section.name!r} needs the option {name!r}"
            raise UserError(what, where=where(key), fix=f"set {in_brackets(key)}.{name}")
        elif _is_plain(parameter.default):
            result[name] = parameter.default
    return result


def option_default(kind: str, plugin: str, option: str) -> Any:
    """The default of a plug-in's option; None if the plug-in or the option is unknown."""
    try:
        parameter = options_of(lookup(kind, plugin)).get(option)
    except UserError:
        return None
    default = None if parameter is None or parameter.default is Parameter.empty else parameter.default
    return json.loads(json.dumps(default)) if _is_plain(default) else None


def own_options(kind: str, plugin: Any, section: type[PluginSection]) -> dict[str, Parameter]:
    """The keyword arguments of a plug-in that are options of its section: not set elsewhere in the recipe."""
    taken = {*section.model_fields, *_ELSEWHERE.get(kind, {})}
    return {name: p for name, p in options_of(plugin).items() if name not in taken}


def _hints(plugin: Any) -> dict[str, Any]:
    try:
        function = plugin.__init__ if inspect.isclass(plugin) else plugin
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}  # annotations that cannot be resolved: the plug-in checks its values itself


def _typed(value: Any, hint: Any, where: str) -> Any:
    """`value` checked against a type hint as JSON would be: lists fit tuples, nothing else is converted."""
    if hint is None:
        return value
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))
    except Exception:  # a hint that pydantic has no schema for
        return value
    try:
        return adapter.validate_json(json.dumps(_whole(value, hint)))
    except ValidationError as error:
        what, fix = expected(error.errors()[0], hint, value)
        raise UserError(what, where=where, fix=fix) from None


def _whole(value: Any, hint: Any) -> Any:
    takes_float = hint is float or float in typing.get_args(hint)
    return int(value) if isinstance(value, float) and value.is_integer() and not takes_float else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | int | float)
