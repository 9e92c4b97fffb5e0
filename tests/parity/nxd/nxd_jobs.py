"""What the ranks do in the NxD tests: each function is a job, called on all ranks with a folder of its own
and the arguments of its case.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hlat.backend.nxd import NxdBackend
from hlat.recipe import Recipe
from hlat.recipe import load as load_recipe
from hlat.train import state
from hlat.train.run import Run, build_run

SHARED = Path(__file__).resolve().parents[2] / "conftest.py"
spec = importlib.util.spec_from_file_location("shared", SHARED)
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)


def make_recipe(folder: Path, overrides: Sequence[str]) -> Recipe:
    folder.mkdir(exist_ok=True)
    path = folder / f"rank-{dist.get_rank()}.yaml"
    path.write_text(shared.TINY)
    return load_recipe(path, ["backend=nxd", "model.vocab=96", *overrides])


def make_run(folder: Path, overrides: Sequence[str]) -> Run:
    recipe = make_recipe(folder, overrides)
    backend = NxdBackend(recipe.layout(dist.get_world_size()), kv_heads=recipe.model.kv_heads)
    groups = backend.groups
    # The stand-ins make process groups at first use, which all ranks must do in the same order.
    for group in (groups.world, groups.tp, groups.dp, groups.pp, groups.tie):
        group.all_reduce(torch.zeros(1, device=backend.device))
    return build_run(recipe, shared.RaggedData(recipe), backend)


def everywhere(run: Run, fine: bool) -> bool:
    """Whether something is true on all ranks."""
    bad = torch.tensor(float(not fine), device=run.backend.device)
    return float(run.backend.all_reduce(bad)) == 0


def train(folder: Path, overrides: Sequence[str], steps: int = 4) -> list[Any]:
    """Loss and gradient norm of each step."""
    return shared.train(make_run(folder, overrides), steps)
