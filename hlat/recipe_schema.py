"""The JSON schema of recipes, for completion and checks in editors (`# yaml-language-server: $schema=...`)."""

from __future__ import annotations

import inspect
import json
from typing import Any

from hlat.model.presets import PRESETS
from hlat.recipe import Recipe
from hlat.recipe_check import own_options
from hlat.registry import lookup, names
from hlat.section import PluginSection

# Defaults that depend on other keys; their descriptions say how.
_DERIVED = (("RunSection", "name"), ("RunSection", "dir"), ("DataSection", "seq_len"))


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, with the options of HLAT's own plug-ins.

    Nothing is required: a preset or a `base` may supply it.
    """
    schema = Recipe.model_json_schema(by_alias=True)
    sections = schema["$defs"]
    for part in (schema, sections["ModelConfig"], sections["DataSection"]):
        part.pop("required", None)
    for section, key in _DERIVED:
        sections[section]["properties"][key].pop("default", None)
    base = {"type": "string", "title": "Base", "description": "Recipe this one starts from: a path or the name of a shipped one."}
    schema["properties"] = {"base": base, **schema["properties"]}
    sections["ModelConfig"]["properties"]["preset"]["examples"] = list(PRESETS)
    for kind, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, PluginSection):
            _add_plugins(kind, field.annotation, sections[field.annotation.__name__])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def schema_text() -> str:
    """The content of recipes/schema.json."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"


def _add_plugins(kind: str, section: type[PluginSection], schema: dict[str, Any]) -> None:
    """Add the names of HLAT's own plug-ins of a kind and, as properties of any type, their options."""
    own = {name: lookup(kind, name) for name in names(kind)}
    own = {name: plugin for name, plugin in own.items() if str(plugin.__module__).startswith("hlat.")}
    schema["properties"]["name"]["examples"] = list(own)
    for name, plugin in own.items():
        for option, parameter in own_options(kind, plugin, section).items():
            default = "" if parameter.default is inspect.Parameter.empty else f", default {_plain(parameter.default)}"
            entry = schema["properties"].setdefault(option, {"description": "Option of "})
            entry["description"] += f"{'; of ' if 'default' in entry['description'] else ''}{name}{default}"


def _plain(value: Any) -> str:
    return json.dumps(value, default=str)
