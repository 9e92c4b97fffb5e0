"""Shared by all tests: a small recipe and a source of ragged synthetic batches."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hlat.data.batch import Batch
from hlat.recipe import Recipe, load
from hlat.train.run import Run, build_run

TINY = """
run: {name: test, steps: 5, seed: 7}
model: {layers: 2, hidden: 32, heads: 4, kv_heads: 2, ffn: 64, vocab: 97, max_seq_len: 32}
data: {sources: [{dataset: python-stdlib}], seq_len: 32, micro_batch: 8, global_batch: 8}
precision: {compute: fp32}
optim: {name: adamw, lr: 1e-3}
schedule: {name: constant}
compile: false
"""


@pytest.fixture(scope="session", autouse=True)
def signals() -> None:
    """Under nohup, or behind a shell's `&`, signals that a run respects would be ignored by the tests and all
    they start.
    """
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


class RaggedData:
    """Rows of random ids cut into documents of random length; a batch is a pure function of the step."""

    fingerprint = "ragged"

    def __init__(self, recipe: Recipe, ignored: float = 0.3) -> None:
        self.vocab, self.rows, self.length = recipe.model.vocab, recipe.data.global_batch, recipe.data.seq_len
        self.document_mask, self.ignored = recipe.data.document_mask, ignored

    def batches(
        self, step: int, micro_batch: int, accumulate: int, rank: int = 0, world: int = 1
    ) -> list[Batch]:
        generator = torch.Generator().manual_seed(1000 + step)
        shape = (self.rows, self.length)
        ids = torch.randint(0, self.vocab, (self.rows, self.length + 1), generator=generator)
        targets = ids[:, 1:].clone()
        # Very uneven: some rows have hardly a target, so that a mean of means would be far off.
        share = torch.rand(self.rows, 1, generator=generator) ** 4
        targets[torch.rand(shape, generator=generator) < self.ignored + (1 - self.ignored) * share] = -100
        starts = torch.rand(shape, generator=generator) < 0.15
        starts[:, 0] = True
        documents = starts.cumsum(1).int()
        index = torch.arange(self.length).expand(shape)
        positions = index - torch.where(starts, index, 0).cummax(1).values
        ids = ids[:, :-1].contiguous()
        per_rank = self.rows // world
        out = []
        for i in range(accumulate):
            rows = slice(rank * per_rank + i * micro_batch, rank * per_rank + (i + 1) * micro_batch)
            masks = (positions[rows], documents[rows]) if self.document_mask else (None, None)
            out.append(Batch(ids[rows], targets[rows], *masks))
        return out


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m nxd` other test files are not even read: they need packages that an environment for NxD may
    lack.
    """
    if config.option.markexpr != "nxd" or collection_path.suffix != ".py":
        return None
    return True if "mark.nxd" not in collection_path.read_text(encoding="utf-8") else None


@pytest.fixture
def tiny_recipe(tmp_path) -> Callable[..., Recipe]:
    """A function that loads the small recipe with overrides."""

    def make(*overrides: str) -> Recipe:
        path = tmp_path / "tiny-test.yaml"
        path.write_text(TINY)
        return load(path, overrides)

    return make


@pytest.fixture
def tiny_run(tiny_recipe) -> Callable[..., Run]:
    """A function that builds a run of the small recipe on synthetic data."""

    def make(*overrides: str, compiled: bool = False) -> Run:
        recipe = tiny_recipe(*overrides)
        return build_run(recipe, RaggedData(recipe), compiled=compiled)

    return make


def train(run: Run, steps: int, each: Callable[[Run], None] = lambda run: None) -> list[tuple[float, float]]:
    """Train some steps; (loss, gradient norm) of each."""
    from hlat.train.step import train_step

    out = []
    for _ in range(steps):
        values = train_step(run)
        each(run)
        out.append((float(values["loss"]), float(values["grad_norm"])))
    return out


@pytest.fixture
def train_steps() -> Callable[..., Sequence[tuple[float, float]]]:
    """`train` as a fixture, since test modules do not import each other."""
    return train


@pytest.fixture(scope="session")
def load_module() -> Callable[[Path], ModuleType]:
    """A function that makes a module of a Python file beside a test, since test modules are no package."""

    def load_file(path: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # dataclasses look there
        spec.loader.exec_module(module)
        return module

    return load_file
