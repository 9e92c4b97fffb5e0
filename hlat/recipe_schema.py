"""The JSON schema of recipes, for editors (`# yaml-language-server: $schema=...`)."""

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
    schema: dict[str, Any] = _canonical(Recipe.model_json_schema(by_alias=True))
    sections = schema["$defs"]
    for part in (schema, sections["ModelConfig"], sections["DataSection"]):
        part.pop("required", None)
    for section, key in _DERIVED:
        sections[section]["properties"][key].pop("default", None)
    what = "Recipe this one starts from: a path relative to this file, or the name of a shipped recipe."
    for key, field in schema["properties"].items():
        if "$ref" in field:  # a section: its own description and its keys' defaults are enough
            schema["properties"][key] = {"$ref": field["$ref"]}
    base = {"type": "string", "title": "Base", "description": what}
    schema["properties"] = {"base": base, **schema["properties"]}
    sections["ModelConfig"]["properties"]["preset"]["examples"] = list(PRESETS)
    for kind, info in Recipe.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, PluginSection):
            _add_plugins(kind, info.annotation, sections[info.annotation.__name__])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def schema_text() -> str:
    """The content of recipes/schema.json."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"


def _canonical(value: Any) -> Any:
    """The same schema whichever version of pydantic wrote it: they differ in how they spell some things."""
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, dict):
        return value
    result = {key: _canonical(item) for key, item in value.items()}
    if len(result.get("allOf", [])) == 1:
        result.update(result.pop("allOf")[0])
    if "const" in result and result.get("enum") == [result["const"]]:
        del result["enum"]
    return dict(sorted(result.items())) if "type" in result or "$ref" in result else result


def _add_plugins(kind: str, section: type[PluginSection], schema: dict[str, Any]) -> None:
    """Add the names of HLAT's own plug-ins of a kind and, as properties of any type, their options."""
    own = {name: lookup(kind, name) for name in names(kind)}
    own = {name: plugin for name, plugin in own.items() if str(plugin.__module__).startswith("hlat.")}
    schema["properties"]["name"]["examples"] = list(own)
    for name, plugin in own.items():
        for option, parameter in own_options(kind, plugin, section).items():
            needed = parameter.default is inspect.Parameter.empty
            text = f"{name}: {'needed' if needed else 'default ' + _plain(parameter.default)}"
            entry = schema["properties"].setdefault(option, {"description": "Option of "})
            entry["description"] += text if entry["description"].endswith("of ") else f"; of {text}"


def _plain(value: Any) -> str:
    return json.dumps(value, default=str)
