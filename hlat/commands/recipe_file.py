"""Reading a recipe on behalf of a command: what `hlat.recipe.load` does, and the model of `init.from`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hlat.model.config import SHAPE
from hlat.recipe import Recipe
from hlat.recipe_check import build
from hlat.recipe_io import read_recipe


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe as `hlat.recipe.load` reads it. If it has `init.from` and an incomplete model section, the
    missing fields are those of the weights.

    Raises UserError, also when these weights cannot be opened.
    """
    values, where = read_recipe(path, overrides)
    init, model = values.get("init"), values.get("model") or {}
    start = init.get("from") if isinstance(init, dict) else None
    if isinstance(start, str) and isinstance(model, dict) and _incomplete(model):
        from hlat.train.initial import model_fields

        values = {**values, "model": {**model_fields(start), **model}}
    return build(values, where)


def _incomplete(model: dict[str, Any]) -> bool:
    return model.get("preset") is None and any(name not in model for name in SHAPE)
