"""Write the reference part of docs/recipes.md from the recipe's schema.

    python docs/recipe_reference.py

The part between the two markers is replaced; tests/unit/test_front_door.py fails when it is not current.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("recipes.md")
SLIP = 1_000_000  # a bound above it is there for slips of the finger, and says nothing of the key
BEGIN, END = "<!-- reference: begin (python docs/recipe_reference.py) -->", "<!-- reference: end -->"
PLUGIN_SECTIONS = ("optim", "schedule", "reduce", "method", "objective", "guard")


def cell(text: object) -> str:
    """Text that cannot break a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def value(item: Any) -> str:
    """A default as it is written in YAML."""
    if item is None:
        return "null"
    if isinstance(item, bool):
        return str(item).lower()
    if isinstance(item, list | tuple):
        return f"[{', '.join(value(part) for part in item)}]"
    return str(item)


def kind(schema: dict[str, Any]) -> str:
    """The type of a key in a few words: 'integer ≥ 1', '`fp32`, `bf16`', 'list of sections'."""
    if "anyOf" in schema:
        return " or ".join(kind(part) for part in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{item}`" for item in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "$ref" in schema:
        return "section"
    words = {
        "string": "text",
        "number": "number",
        "integer": "integer",
        "boolean": "true or false",
        "null": "null",
        "object": "mapping of texts",
    }
    name = schema.get("type", "")
    if len(schema.get("prefixItems", ())) == 2:
        return "pair"
    if name == "array":
        return f"list of {kind(schema.get('items', {})) or 'any'}s"
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [
        f"{sign} {schema[key]:g}" for key, sign in limits.items() if key in schema and schema[key] <= SLIP
    ]
    return " ".join([words.get(name, name), *bounds])


def rows(properties: dict[str, Any], required: list[str], prefix: str) -> list[str]:
    """One table row for each key of a section."""
    lines = []
    for key, schema in properties.items():
        default = f"`{value(schema['default'])}`" if "default" in schema else ""
        if key in required:
            default = "from the preset" if prefix == "model." else "required"
        lines.append(
            f"| `{prefix}{key}` | {cell(kind(schema))} | {default} | {cell(schema.get('description', ''))} |"
        )
    return lines


def plugins(section: str) -> list[str]:
    """What can be named in an open section, with the options of each."""
    from hlat.recipe import Recipe
    from hlat.recipe_check import own_options
    from hlat.registry import lookup, names

    model = Recipe.model_fields[section].annotation
    lines = []
    for name in names(section):
        plugin = lookup(section, name)
        if not str(plugin.__module__).startswith("hlat."):
            continue  # another package's: it is installed here by chance
        options = own_options(section, plugin, model)  # type: ignore[arg-type]
        listed = ", ".join(f"`{key}: {value(item.default)}`" for key, item in options.items())
        summary = (plugin.__doc__ or "").strip().split("\n\n")[0]
        lines.append(f"- `{name}`: {' '.join(summary.split())}{f' Options: {listed}.' if listed else ''}")
    return ["", "Names:", "", *lines] if lines else []


def reference() -> str:
    """The tables, one for each section of a recipe, in Markdown."""
    from hlat.recipe import Recipe

    schema = Recipe.model_json_schema(by_alias=True)
    sections = schema["$defs"]
    head = ["| key | type | default | meaning |", "|---|---|---|---|"]
    lines: list[str] = []
    loose: dict[str, Any] = {}
    for key, entry in schema["properties"].items():
        target = entry.get("$ref", "").rpartition("/")[2]
        if not target:
            loose[key] = entry
            continue
        section = sections[target]
        summary = section.get("description", "").partition(" Raises ")[0]  # that part is for programmers
        lines += [f"### {key}", "", cell(summary), "", *head]
        lines += rows(section["properties"], section.get("required", []), f"{key}.")
        if target == "DataSection":
            source = sections["SourceSection"]
            lines += rows(source["properties"], source.get("required", []), "data.sources[].")
            lines += rows(sections["ExamplesSection"]["properties"], [], "data.examples.")
        if target == "OptimSection":
            group = sections["GroupSection"]
            lines += rows(group["properties"], group.get("required", []), "optim.groups[].")
        lines += plugins(key) if key in PLUGIN_SECTIONS else []
        lines.append("")
    lines += [
        "### top level",
        "",
        "Keys that stand beside the sections.",
        "",
        *head,
        *rows(loose, [], ""),
        "",
    ]
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its reference part made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{reference()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
