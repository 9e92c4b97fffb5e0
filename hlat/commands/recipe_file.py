"""Reading a recipe on behalf of a command: what `hlat.recipe.load` does, and the model of `init.from`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hlat.model.config import SHAPE
from hlat.paths import expand
from hlat.recipe import Recipe
from hlat.recipe_check import build
from hlat.recipe_io import read_recipe
from hlat.recipe_yaml import read_yaml


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe as `hlat.recipe.load` reads it. If it has `init.from` and an incomplete model section, the
    missing fields are those of the weights, or of the run itself once it has a checkpoint.

    Raises UserError, also when these weights cannot be opened.
    """
    return load_written(path, overrides)[0]


def load_written(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Recipe, bytes, dict[str, Any]]:
    """`load`, the bytes of the file that it was made of, and the keys that file, bases and `overrides` give.
    The bytes are what a run keeps as its recipe.yaml, even if somebody writes the file anew meanwhile.
    """
    kept: list[bytes] = []
    values, where = read_recipe(path, overrides, kept.append)
    written = values
    init, model = values.get("init"), values.get("model") or {}
    start = init.get("from") if isinstance(init, dict) else None
    if isinstance(start, str) and isinstance(model, dict) and _incomplete(model):
        known = _model_of_run(values["run"])
        if known is None:
            from hlat.train.initial import model_fields

            known = model_fields(start)
        values = {**values, "model": {**known, **model}}
    return build(values, where), kept[0], written


def _incomplete(model: dict[str, Any]) -> bool:
    return model.get("preset") is None and any(name not in model for name in SHAPE)


def _model_of_run(run: Any) -> dict[str, Any] | None:
    """The model section of the run that a recipe continues: it then needs nothing of what it began with."""
    if not isinstance(run, dict):
        return None
    folder = expand(str(run.get("dir", f"runs/{run.get('name')}")), "run.dir")
    if not any(folder.glob("checkpoints/step-*")) or not (folder / "resolved.yaml").is_file():
        return None
    model = read_yaml(folder / "resolved.yaml")[0]["model"]
    return {name: value for name, value in model.items() if name not in ("preset", "classes")}
