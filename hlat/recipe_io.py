"""From files to one mapping: `base:` chains, merging, overrides, and where each value came from.

Merging is deep: mappings merge key by key, everything else (lists too) is replaced. Two keys choose what
their section means, so a changed choice starts that section anew instead of inheriting values made for the
other one:

* `name` of optim, schedule, reduce, method, objective, guard: the options of the other plug-in are dropped.
  What all plug-ins of the kind share is inherited (optim: lr, weight_decay, decay, clip_norm, groups;
  schedule: warmup_steps, horizon_steps, floor).
* `model.preset`: the base's other model fields are dropped.
* `data.sources` or `data.examples`: the base's other one is dropped, and its tokenizer.

`run.name` and `run.dir` are never inherited, so that two recipes do not share a run folder by accident.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hlat.errors import UserError
from hlat.observe.redact import line_with_secret
from hlat.paths import expand, kind_of
from hlat.recipe_errors import Where, in_brackets
from hlat.recipe_yaml import dump_yaml, parse_recipe, parse_yaml, read_bytes, recipe_text
from hlat.registry import did_you_mean
from hlat.section import PluginSection

__all__ = ["dump_yaml", "find_recipe", "merge", "read_recipe", "shipped_recipes"]

COMMAND_LINE = "command line"
_LONGEST_CHAIN = 20  # recipes that are each the base of the one before


def read_recipe(
    path: str | Path, overrides: Sequence[str] = (), keep: Callable[[bytes], None] = lambda data: None
) -> tuple[dict[str, Any], Where]:
    """The merged mapping of a recipe, its bases and the overrides; not validated. Every file is read once.

    Args:
        keep: gets the bytes of the recipe's own file: those that the mapping was made of.

    Raises UserError.
    """
    file = find_recipe(path)
    origins: dict[str, str] = {}
    values = _read_chain(file, origins, (), keep)
    over = parse_overrides(overrides, origins)
    _refuse_list_items(values, over, "")
    values = merge(values, over)
    _refuse_secrets(values, origins, file)
    run = values.setdefault("run", {})
    if isinstance(run, dict):
        run.setdefault("name", _safe_name(file.stem))

    def where(key: str, about: str = "") -> str:
        given = [k for k, at in origins.items() if at == COMMAND_LINE]
        if about and not any(key == k or key.startswith(f"{k}.") for k in given):
            named = set(re.findall(r"\w+", about))
            key = next((k for k in given if k.rpartition(".")[2] in named), key)
        parts = key.split(".")
        prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        place = next((origins[prefix] for prefix in prefixes if prefix in origins), "")
        place = place or next((at for k, at in origins.items() if key and k.startswith(f"{key}.")), str(file))
        return f"{place}: {in_brackets(key)}" if key else place

    return values, where


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, by the rules of this module; neither is changed."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            result[key] = _merge_deep(_inherited(key, old, value), value)
        elif not (value is None and isinstance(old, dict)):  # an empty section changes nothing
            result[key] = _copy(value)
    return result


def _merge_deep(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        mapping = isinstance(old, dict) and isinstance(value, dict)
        result[key] = _merge_deep(old or {}, value) if mapping else _copy(value)
    return result


def _inherited(section: str, old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What of the base's section `old` remains when `new` changes its plug-in or preset."""
    from hlat.recipe import Recipe

    if section == "model":
        preset = new.get("preset")
        return old if preset is None or preset == old.get("preset") else {}
    if section == "data":
        # Text or examples: what was chosen before, and its tokenizer, belong to the other kind.
        other = {"examples": "sources", "sources": "examples"}
        dropped = {other[key] for key in other.keys() & new.keys() if old.get(other[key])}
        return {k: v for k, v in old.items() if k not in dropped and not (dropped and k == "tokenizer")}
    field = Recipe.model_fields.get(section)
    kind = None if field is None else field.annotation
    if not (isinstance(kind, type) and issubclass(kind, PluginSection)) or "name" not in new:
        return old
    if new["name"] == old.get("name", kind.model_fields["name"].default):
        return old
    return {key: value for key, value in old.items() if key in kind.model_fields and key != "name"}


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _read_chain(
    file: Path,
    origins: dict[str, str],
    above: tuple[Path, ...],
    keep: Callable[[bytes], None] = lambda data: None,
) -> dict[str, Any]:
    data = read_bytes(file)
    keep(data)
    text = recipe_text(data, file)
    values, lines = parse_recipe(text, file)
    _refuse_secret(text, str(file))
    base = values.pop("base", None)
    merged: dict[str, Any] = {}
    if base is not None:
        at = f"{file}:{lines['base']}: base"
        if not isinstance(base, str):
            fix = "give one recipe: base: tiny, or base: ../other.yaml"
            raise UserError("base is not a file name", where=at, fix=fix)
        chain = (*above, Path(os.path.realpath(file)))
        target = find_recipe(base, folder=file.parent, where=at)
        if len(chain) > _LONGEST_CHAIN:
            raise UserError(f"more than {_LONGEST_CHAIN} recipes stand on each other", where=at)
        if Path(os.path.realpath(target)) in chain:
            names = " -> ".join(p.name for p in (*chain, target))
            raise UserError(f"base leads back to itself ({names})", where=at, fix="remove one base")
        merged = _read_chain(target, origins, chain)
        if isinstance(merged.get("run"), dict):
            merged["run"] = {key: value for key, value in merged["run"].items() if key not in ("name", "dir")}
    origins.update({key: f"{file}:{line}" for key, line in lines.items()})
    return merge(merged, values)


def parse_overrides(overrides: Sequence[str], origins: dict[str, str]) -> dict[str, Any]:
    """The mapping that `section.key=value` texts describe; `origins` gets the place of each key."""
    result: dict[str, Any] = {}
    for text in overrides:
        key, equals, value_text = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            fix = "write for example optim.lr=1e-3"
            raise UserError(f"{text!r} is not key=value", where=COMMAND_LINE, fix=fix)
        if parts[0] == "base":
            fix = "name the other recipe instead"
            raise UserError("base cannot be overridden", where=COMMAND_LINE, fix=fix)
        _refuse_secret(value_text, f"{COMMAND_LINE}: {key.strip()}", show_line=False)
        value, _ = parse_yaml(value_text, f"{COMMAND_LINE}: {key.strip()}", show_line=False)
        target = result
        for part in parts[:-1]:
            inner = target.get(part)
            if not isinstance(inner, dict):
                inner = target[part] = {}
            target = inner
        target[parts[-1]] = value
        for stale in [k for k in origins if k.startswith(f"{key.strip()}.")]:
            del origins[stale]
        origins[key.strip()] = COMMAND_LINE
    return result


def _refuse_secret(text: str, where: str, show_line: bool = True) -> None:
    """A recipe is copied into the run folder, checkpoints and reports: no login or token may stand in it."""
    line = line_with_secret(text)
    if line is not None:
        fix = "give it by an environment variable, see docs/operations/security.md"
        place = f"{where}:{line}" if show_line else where
        raise UserError("a login or token stands in the recipe", where=place, fix=fix)


def _refuse_secrets(values: Any, origins: dict[str, str], file: Path, key: str = "") -> None:
    """What was written with escapes, or over several lines, is a secret only once it has been read."""
    if isinstance(values, dict | list):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        for name, value in items:
            _refuse_secrets(value, origins, file, f"{key}.{name}" if key else str(name))
    elif isinstance(values, str | int) and line_with_secret(str(values)) is not None:
        place = next((origins[k] for k in (key, key.rpartition(".")[0]) if k in origins), str(file))
        _refuse_secret(str(values), f"{place}: {in_brackets(key)}", show_line=False)


def _refuse_list_items(values: Any, over: Any, path: str) -> None:
    """`data.sources.0.weight=2` would replace the list by a mapping: say so."""
    if isinstance(values, list) and isinstance(over, dict):
        fix = f"give it whole: {path}=[...]"
        raise UserError("one item of a list cannot be overridden", where=f"{COMMAND_LINE}: {path}", fix=fix)
    if isinstance(values, dict) and isinstance(over, dict):
        for key in values.keys() & over.keys():
            _refuse_list_items(values[key], over[key], f"{path}.{key}" if path else key)


def find_recipe(name: str | Path, folder: Path | None = None, where: str = "") -> Path:
    """The file a recipe name means: a path (relative to `folder`), else a shipped recipe by its name.

    Raises UserError with the nearest shipped name when there is neither.
    """
    at, kind, unusable = where or "recipe", "missing", None
    path = expand(name, at)
    path = path if folder is None else folder / path
    try:
        kind = kind_of(path, at)
    except UserError as error:
        unusable = error
    if kind not in ("missing", "folder"):  # a pipe or a device is refused where it is read
        return path
    key = Path(name).with_suffix("").as_posix() if path.suffix == ".yaml" else str(name)
    shipped = shipped_recipes()
    for known, file in shipped.items():
        if key in (known, f"recipes/{known}", known.rpartition("/")[2]):
            return file
    if unusable is not None:
        raise unusable
    if kind == "folder":
        return path
    short = [known.rpartition("/")[2] for known in shipped]
    raise UserError(f"no such recipe: {path}", where=where, fix=did_you_mean(Path(key).name, short))


def shipped_recipes() -> dict[str, Path]:
    """Every recipe that comes with HLAT, by name ("tiny", "pretrain/hlat-7b"), top-level ones first."""
    folder = recipes_folder()
    if folder is None:
        return {}
    files = sorted(folder.rglob("*.yaml"), key=lambda p: (len(p.parts), p))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def recipes_folder() -> Path | None:
    """`recipes/` of the checkout HLAT runs from, else the installed package `hlat_recipes`, else None."""
    return shipped_folder("recipes", "hlat_recipes")


def shipped_folder(folder: str, package: str) -> Path | None:
    """A folder of data files: that of the checkout HLAT runs from, else the installed package, else None."""
    root = Path(__file__).resolve().parents[1]
    if (root / "pyproject.toml").is_file() and (root / folder).is_dir():
        return root / folder
    from importlib.resources import files

    try:
        installed = Path(str(files(package)))
    except ModuleNotFoundError:
        return None
    return installed if installed.is_dir() else None


def _safe_name(stem: str) -> str:
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in stem)
    return kept if kept and kept[0].isalnum() else f"run{kept}"
