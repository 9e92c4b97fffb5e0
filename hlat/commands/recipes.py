"""`hlat recipes`: list, show, compare and check recipes, and write their JSON schema."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.syntax import Syntax
from rich.text import Text

from hlat.errors import UserError
from hlat.observe.terminal import escaped, one_line, unguarded
from hlat.paths import expand, file_to_write

if TYPE_CHECKING:
    from hlat.recipe import Recipe


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="recipes that ship with HLAT")
    show = actions.add_parser("show", help="a recipe with every value resolved; the output is a recipe")
    show.add_argument("recipe", help="file, name or run folder")
    show.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="changes, as for hlat train"
    )
    show.add_argument("--changed", action="store_true", help="only values that differ from the defaults")
    compare = actions.add_parser("diff", help="every resolved value in which two recipes differ")
    compare.add_argument("a", help="file, name or run folder")
    compare.add_argument("b", help="file, name or run folder")
    check = actions.add_parser("check", help="validate recipes; exit code 2 at the first bad one")
    check.add_argument(
        "recipes",
        nargs="*",
        default=[],
        metavar="recipe",
        help="default: all that ship; key=value changes each, as for hlat train",
    )
    schema = actions.add_parser("schema", help="write the JSON schema that editors complete recipes with")
    schema.add_argument(
        "--out", type=file_to_write, metavar="FILE", help="where to (default: standard output)"
    )


def main(args: argparse.Namespace) -> int:
    """Run one action. Raises UserError for a recipe that is wrong."""
    actions = {"list": _list, "show": _show, "diff": _diff, "check": _check, "schema": _schema}
    return actions[args.action](args, Console(file=unguarded(sys.stdout)))


def description(file: Path) -> str:
    """The first comment line of a recipe that is not for the editor, without the #."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "yaml-language-server" not in line:
            return line.lstrip("# ").strip()
    return ""


def summary(recipe: Any) -> list[str]:
    """Size and length of the run a recipe describes, in a few lines."""
    tokens = recipe.tokens_per_step
    total = tokens * recipe.run.steps
    data, parameters = recipe.data, recipe.model.parameter_count()
    return [
        f"{parameters:,} parameters",
        f"{tokens:,} tokens a step ({data.global_batch} rows of {data.seq_len})",
        f"{total:,} tokens in {recipe.run.steps:,} steps ({total / parameters:.1f} a parameter)",
        f"fingerprint {recipe.fingerprint()[:16]}",
    ]


def _list(args: argparse.Namespace, console: Console) -> int:
    from hlat.recipe_io import shipped_recipes

    shipped = shipped_recipes()
    width = max(map(len, shipped), default=0)
    for name, file in shipped.items():
        _print(console, Text.assemble((f"{name:<{width}}", "bold cyan"), "  ", one_line(description(file))))
    return 0


def _show(args: argparse.Namespace, console: Console) -> int:
    from hlat.recipe_io import dump_yaml

    recipe = _load(args.recipe, args.overrides)
    text = "".join(f"# {line}\n" for line in summary(recipe))
    text += dump_yaml(_without_defaults(recipe)) if args.changed else recipe.to_yaml()
    if console.is_terminal:
        console.print(Syntax(escaped(text.rstrip()), "yaml", background_color="default", word_wrap=True))
    else:
        print(text, end="", file=unguarded(sys.stdout))  # for a file: it must stay the same recipe
    return 0


def _diff(args: argparse.Namespace, console: Console) -> int:
    from hlat.recipe import diff

    rows = diff(_load(args.a), _load(args.b))
    if not rows:
        _print(console, Text("the same recipe"))
    width = max((len(key) for key, _, _ in rows), default=0)
    for key, a, b in rows:
        values = ((_plain(a), "red"), " -> ", (_plain(b), "green"))
        _print(console, Text.assemble((f"{key:<{width}}", "bold"), "  ", *values))
    return 0


def _check(args: argparse.Namespace, console: Console) -> int:
    from hlat.data.presence import missing_paths
    from hlat.recipe_io import shipped_recipes
    from hlat.train.runnable import check_runnable
    from hlat.train.unused import unused

    overrides = [word for word in args.recipes if "=" in word and not Path(word).exists()]
    for name in [word for word in args.recipes if word not in overrides] or shipped_recipes():
        recipe = _load(name, overrides)
        try:
            check_runnable(recipe)
        except UserError as error:  # of several recipes it must be said which
            where = ": ".join(part for part in (name, error.where) if part)
            raise UserError(error.what, where=where, fix=error.fix) from error
        what = f"{recipe.model.parameter_count():,} parameters, {recipe.tokens_per_step:,} tokens a step"
        _print(console, Text.assemble(("ok", "bold green"), one_line(f"  {name}: {what}")))
        for line in missing_paths(recipe):
            _print(console, Text.assemble(("    not here", "yellow"), one_line(f"  {line}")))
        for line in unused(recipe, _written(name, overrides)):
            _print(console, Text.assemble(("    note:", "yellow"), one_line(f" {line}")))
    return 0


def _schema(args: argparse.Namespace, console: Console) -> int:
    from hlat.observe.jsonl import replace_file
    from hlat.recipe_schema import schema_text

    if args.out is None:
        print(schema_text(), end="")
        return 0
    try:
        replace_file(args.out, schema_text().encode())
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(args.out)) from None
    return 0


def _load(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by its file or name, or that of a run by its folder."""
    from hlat.commands.recipe_file import load

    return load(_resolved(name) or name, overrides)


def _resolved(name: str) -> Path | None:
    """Of a run folder the recipe with every value."""
    file = expand(name, "recipe") / "resolved.yaml"
    return file if file.is_file() else None


def _written(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What somebody has written. The recipe of a run folder has every value: of that, the overrides."""
    from hlat.recipe_io import parse_overrides, read_recipe

    if _resolved(name) is None:
        return read_recipe(name, overrides)[0]
    return parse_overrides(overrides, {})


def _without_defaults(recipe: Any) -> dict[str, Any]:
    """What a recipe adds to one that states only its model, data sources and plug-ins."""
    from hlat.recipe import Recipe

    full = recipe.to_dict()
    minimal: dict[str, Any] = {"run": {"name": recipe.run.name}, "data": {"sources": full["data"]["sources"]}}
    minimal["model"] = {"preset": recipe.model.preset} if recipe.model.preset else full["model"]
    named = ("optim", "schedule", "reduce", "method", "objective", "guard")
    minimal.update({kind: {"name": full[kind]["name"]} for kind in named})
    plain = Recipe.from_dict(minimal).to_dict()
    changed: dict[str, Any] = {}
    for section, values in full.items():
        if not isinstance(values, dict):
            kept = values if values != plain[section] else None
        else:
            default = plain[section]
            kept = {k: v for k, v in values.items() if k in minimal.get(section, {}) or v != default.get(k)}
            usual = Recipe.model_fields[section].default
            if section in named and kept == {"name": usual.name}:
                kept = {}
        if kept:
            changed[section] = kept
    return changed


def _plain(value: Any) -> str:
    return escaped(json.dumps(value, ensure_ascii=False))


def _print(console: Console, text: Text) -> None:
    console.print(text, soft_wrap=True, highlight=False)
