"""From pydantic's list of errors to one line a person can act on."""

from __future__ import annotations

import difflib
import json
import math
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import ValidationError

from hlat.errors import UserError
from hlat.section import Section

Where = Callable[..., str]
"""(dotted key, about="") -> "file:line: key" ("" -> the file), for error messages. `about`: what is said of
several keys that do not fit together; if it names one that the command line has changed, the place is that.
"""
_LIMITS = {
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:.15g}",
    "string_too_short": "a text that is not empty",
    "too_short": "a list with at least {min_length} entry",
    "string_pattern_mismatch": "letters, digits, dot, dash and underscore, starting with a letter or digit",
    "finite_number": "a finite number",
}
_MISSING = {
    "model": "for example model: {preset: tiny}",
    "data": "give data.sources or data.examples",
}
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}
_FLAGS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


def user_error(error: ValidationError, where: Where) -> UserError:
    """The first thing wrong with a recipe as a UserError that says how many more there are."""
    found = _by_key(error)
    (key, first), more = next(iter(found.items())), len(found) - 1
    what, fix = _explain(first, key)
    what += f" (and {more} more error{'s' * (more > 1)})" if more else ""
    return UserError(what, where=where(key, what if first["type"] == "recipe" else ""), fix=fix)


def expected(error: Any, hint: Any, value: Any) -> tuple[str, str]:
    """(what, fix) for a value of the wrong type or out of range, given the type hint of its place."""
    limit = _LIMITS.get(error["type"])
    if limit:
        return f"must be {limit.format(**error.get('ctx', {}))}, got {_show(value)}", ""
    return f"expected {_describe(hint)}, got {_show(value)}", _advice(hint, value)


def in_brackets(key: str) -> str:
    """A dotted key as people write it: `data.sources.0.path` is data.sources[0].path."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", key)


def annotation(key: str) -> Any:
    """The type of the recipe field a dotted key names; None if there is none. Of an optional section, the
    section.
    """
    from hlat.recipe import Recipe

    hint: Any = Recipe
    for part in key.split(".") if key else []:
        hint = _inside(hint, part)
    return hint


def is_section(hint: Any) -> bool:
    """Whether a field holds a section of keys."""
    return isinstance(hint, type) and issubclass(hint, Section)


def keys_of(section: type[Section]) -> list[str]:
    """The keys of a section as a recipe spells them."""
    return [field.alias or name for name, field in section.model_fields.items()]


def _by_key(error: ValidationError) -> dict[str, Any]:
    """One error for each key: misspelt keys first, as they explain others; none that follows from another."""
    found = [(_key(e), e) for e in error.errors()]
    misspelt = {key.rpartition(".")[0] for key, e in found if e["type"] == "extra_forbidden"}
    result: dict[str, Any] = {}
    for key, e in sorted(found, key=lambda item: item[1]["type"] != "extra_forbidden"):
        if e["type"] == "missing" and key.rpartition(".")[0] in misspelt:
            continue
        if e["type"] == "too_short" and any(other.startswith(f"{key}.") for other, _ in found):
            continue
        if key not in result or e["type"] in _LIMITS:  # of a union's branches, the one whose type fitted
            result[key] = e
    return result


def _key(error: Any) -> str:
    """The dotted key of an error; pydantic's names of union branches are left out."""
    parts: list[str] = []
    for part in map(str, error["loc"]):
        if error["type"] != "extra_forbidden" and annotation(".".join([*parts, part])) is None:
            break
        parts.append(part)
    inner = error.get("ctx", {}).get("key") if error["type"] == "recipe" else ""
    return ".".join([*parts, *([inner] if inner else [])])


def _explain(error: Any, key: str) -> tuple[str, str]:
    kind, hint = error["type"], annotation(key)
    if kind == "recipe":
        return error["msg"], str(error["ctx"]["fix"])
    if kind == "extra_forbidden":
        return _unknown(error["loc"])
    if kind == "missing":
        return f"this {'section' if is_section(hint) else 'key'} is missing", _MISSING.get(key, "")
    return expected(error, hint, error["input"])


def _unknown(loc: tuple[int | str, ...]) -> tuple[str, str]:
    name, parent = str(loc[-1]), ".".join(map(str, loc[:-1]))
    if "." in name:
        return f"unknown key {name!r}", "dotted keys are for the command line: in a file, nest them"
    known = keys_of(annotation(parent)) + ([] if parent else ["base"])
    from hlat.recipe import Recipe

    sections = [other for other in Recipe.model_fields if is_section(annotation(other)) and other != parent]
    elsewhere = [f"{other}.{name}" for other in sections if name in keys_of(annotation(other))]
    return f"unknown key {name!r}", nearest(name, known, elsewhere)


def nearest(name: str, known: list[str], elsewhere: Sequence[str] = ()) -> str:
    """What an unknown key was meant to be: a similar key, the same key elsewhere, else all known keys."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    part = [key for key in known if name.startswith(f"{key}_") or key.startswith(f"{name}_")]
    found = [*close, *elsewhere, *sorted(part, key=len, reverse=True)]
    return f"did you mean {found[0]!r}?" if found else f"known: {', '.join(known)}"


def _inside(hint: Any, part: str) -> Any:
    """The type one step down: a field of a section, an element of a tuple."""
    if is_section(hint):
        fields = {field.alias or name: field for name, field in hint.model_fields.items()}
        return _section_of(fields[part].annotation) if part in fields else None
    if get_origin(hint) is tuple and part.isdigit():
        return get_args(hint)[0]
    if get_origin(hint) is dict:
        return get_args(hint)[1]
    return None


def _section_of(hint: Any) -> Any:
    """The section in `Section | None`; any other type as it is."""
    inner = get_args(hint) if get_origin(hint) in (typing.Union, types.UnionType) else ()
    return next((choice for choice in inner if is_section(choice)), hint)


def _describe(hint: Any) -> str:
    return _either(list(dict.fromkeys(_choices(hint))))


def _choices(hint: Any) -> list[str]:
    origin = get_origin(hint)
    if origin is Annotated:
        return _choices(get_args(hint)[0])
    if origin is Literal:
        return [str(value) for value in get_args(hint)]
    if origin in (typing.Union, types.UnionType):
        return [text for inner in get_args(hint) for text in _choices(inner)]
    if origin in (tuple, list):
        inner = get_args(hint)
        count = "" if origin is list or Ellipsis in inner else f"{len(inner)} "
        if get_origin(inner[0]) is Literal:
            return [f"a list of some of {_describe(inner[0])}"]
        return [f"a list of {count}{_plural(inner[0])}"]
    if is_section(hint):
        return ["a mapping of keys to values"]
    if origin is dict:
        key, value = get_args(hint)
        return [f"a mapping of {_describe(key)} to {_describe(value)}"]
    return [_WORDS.get(hint, "another kind of value")]


def _plural(hint: Any) -> str:
    """What a list holds: of sections whose own name may stand for them, names too."""
    if not is_section(hint):
        return f"{_choices(hint)[0].removeprefix('a ')}s"
    return "names or mappings" if hasattr(hint, "by_name") else "mappings"


def _either(choices: list[str]) -> str:
    return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"


def _advice(hint: Any, value: Any) -> str:
    choices = _choices(hint)
    if choices[0].startswith("a list"):
        return "" if isinstance(value, dict | list | tuple) else "put it in [ ]"
    if value is None:
        return "write none" if "none" in choices else ""
    if isinstance(value, dict) and choices[0] == "a text":
        return "put a text that begins with { in quotes"
    if not isinstance(value, str):
        quote = choices[0] == "a text" and isinstance(value, int | float)
        return f"put it in quotes: '{value}'" if quote else ""
    if "true or false" in choices and value.lower() in _FLAGS:
        return f"write {_FLAGS[value.lower()]}"
    if value == "none" and "null" in choices:
        return "write null"
    if any("number" in choice for choice in choices) and _is_number(value):
        return "remove the quotes"
    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else ""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _show(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
