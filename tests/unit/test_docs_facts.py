"""Facts that pages state in passing: versions, sizes of models, the layout of the published run."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from hlat.recipe import load

sys.path.insert(0, str(Path(__file__).parent))
from docs_pages import ROOT, number, text

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = ROOT / "README.md"
SMALL = ("model.layers=2", "model.hidden=128", "model.ffn=352")


def parameters(name: str, *overrides: str) -> int:
    """Parameters of a recipe's model."""
    import torch

    from hlat.model.decoder import Decoder

    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(load(name, [*overrides]).model).parameters())


def test_versions_that_are_supported() -> None:
    told = re.search(r"if HLAT supports it \((2\.\d+) to (2\.(\d+))\)", text(README))
    assert told is not None
    assert f"torch>={told[1]},<2.{int(told[3]) + 1}" in PROJECT["dependencies"]
    least = PROJECT["requires-python"].removeprefix(">=")
    for page in (README, ROOT / "docs/quickstart.md"):
        assert f"Python {least} or newer" in text(page)


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_size_of_the_first_model(page: str) -> None:
    assert "5-million-parameter" in text(ROOT / page) and round(parameters("tiny") / 1e6) == 5


def test_the_size_of_the_small_model() -> None:
    told = re.search(r'"([\d,]+) parameters, ([\d,]+) of them trained"', text(ROOT / "docs/finetune.md"))
    assert told is not None and number(told[1]) == parameters("tiny", *SMALL)


def test_the_published_run() -> None:
    """docs/trainium.md: cores, layout and batch of HLAT-7B on 16 nodes."""
    from hlat.backend.neuron.profile import CORES

    recipe = load("hlat-7b")
    layout = recipe.layout(16 * CORES)
    told = re.search(
        r"^(\d+) cores, tensor parallel (\d+), (\d+) replicas, (\d+) micro-batches a step, ([\d,]+) tokens",
        text(ROOT / "docs/trainium.md"),
        re.MULTILINE,
    )
    assert told is not None
    wanted = (16 * CORES, layout.tp, layout.dp, recipe.accumulate(16 * CORES), recipe.tokens_per_step)
    assert tuple(map(number, told.groups())) == wanted
