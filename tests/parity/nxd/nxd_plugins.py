"""Jobs of the NxD tests that train with optimizers and reducers other than the defaults."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nxd_jobs as jobs
import torch.distributed as dist

from hlat.backend.native import NativeBackend
from hlat.train.run import Run, build_run
from hlat.train.step import train_step


def rows(run: Run, steps: int) -> list[dict[str, float]]:
    """All metrics of each step, fetched at the end."""
    kept = [train_step(run) for _ in range(steps)]
    return [{name: float(value.cpu()) for name, value in row.items()} for row in kept]


def metrics(folder: Path, overrides: Sequence[str], steps: int) -> list[dict[str, float]]:
    """Of a run on NxD."""
    return rows(jobs.make_run(folder, overrides), steps)


def native_metrics(folder: Path, overrides: Sequence[str], steps: int) -> list[dict[str, float]]:
    """Of a native run on the same ranks, in the same layout. In the CPU mode alone: it needs gloo."""
    recipe = jobs.make_recipe(folder, [*overrides, "backend=native"])
    backend = NativeBackend(recipe.layout(dist.get_world_size()), kv_heads=recipe.model.kv_heads)
    return rows(build_run(recipe, jobs.shared.RaggedData(recipe), backend), steps)
