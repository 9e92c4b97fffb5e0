"""What is fuzzed: for each reader good files, how they are damaged, and what reading them right gives.

A target makes its good files once, draws damage to them as a folder's content, and reads such a folder as
the product does. `read` raises UserError for what it refuses, AssertionError for a wrong answer; anything
else that it raises is a fault of the reader.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from mutations import ODD, Files, changed_bytes, changed_value, pick
from target import Target
from target_data import DocumentTarget, TokenFolderTarget, TokenizerTarget
from target_weights import CheckpointTarget, GGUFTarget, HuggingFaceTarget


class RecipeTarget(Target):
    """A recipe and overrides. What loads, loads again from its resolved form to the same."""

    KEYS = (
        "optim.lr", "model.hidden", "model.layers", "data.seq_len", "run.steps", "run.name", "data.holdout",
        "parallel.tp", "checkpoint.every", "eval", "data.sources", "guard", "optim", "x", "model.preset",
        "base", "precision.compute", "log.every", "parallel.timeout", "checkpoint.remote", "data.tokenizer",
    )  # fmt: skip

    def __init__(self) -> None:
        from hlat.recipe import load
        from hlat.recipe_io import shipped_recipes

        self.seeds = [load(file).to_dict() for file in shipped_recipes().values()]
        self.texts = [file.read_bytes() for file in shipped_recipes().values()]

    def draw(self, draw: Callable[..., Any]) -> Files:
        from hlat.recipe_yaml import dump_yaml

        if draw(st.booleans()):
            value = pick(draw, self.seeds)
            for _ in range(draw(st.integers(1, 3))):
                value = changed_value(draw, value)
            try:
                content = dump_yaml(value).encode("utf-8", "surrogatepass")
            except RecursionError:
                content = b"[" * 2000
        else:
            content = pick(draw, self.texts)
            for _ in range(draw(st.integers(1, 3))):
                content = changed_bytes(draw, content)
        overrides = []
        for _ in range(draw(st.integers(0, 2))):
            value = draw(st.sampled_from(ODD))
            text = value if isinstance(value, str) else json.dumps(value)
            overrides.append(f"{draw(st.sampled_from(self.KEYS))}={text}")
        return {"recipe.yaml": content, "overrides.json": json.dumps(overrides).encode()}

    def read(self, folder: Path) -> None:
        from hlat.commands.recipes import summary
        from hlat.recipe import load
        from hlat.recipe_yaml import dump_yaml

        overrides = json.loads((folder / "overrides.json").read_bytes())
        recipe = load(folder / "recipe.yaml", overrides)
        assert all(isinstance(line, str) for line in summary(recipe))
        assert 0 < recipe.model.parameter_count() < 2**63 and recipe.tokens_per_step > 0
        again = folder / "resolved.yaml"
        again.write_text(dump_yaml(recipe.to_dict()), encoding="utf-8")
        assert load(again).to_dict() == recipe.to_dict(), "a resolved recipe gives another recipe"


TARGETS: dict[str, type[Target]] = {
    "recipe": RecipeTarget,
    "checkpoint": CheckpointTarget,
    "huggingface": HuggingFaceTarget,
    "gguf": GGUFTarget,
    "tokens": TokenFolderTarget,
    "tokenizer": TokenizerTarget,
    "documents": DocumentTarget,
}
