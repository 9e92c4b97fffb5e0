"""What one of several ranks runs for the optimizers' parity tests: the cases of a file one after the other.

    python optimizer_ranks.py CASES.json FOLDER RANK

A case is {"name", "world", "overrides", "steps", "from", "save", "fault"}. It builds a run, loads the
checkpoint of the case `from` if there is one, trains, and saves after `save` steps. Coefficients, losses and
sums of the masters go to NAME.RANK.json, or a traceback to NAME.RANK.error.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hlat.backend.native import NativeBackend
from hlat.checkpoint.piece import Piece
from hlat.checkpoint.store import CheckpointStore
from hlat.recipe import load
from hlat.train import state
from hlat.train.run import Run, build_run
from hlat.train.step import train_step

SPEC = importlib.util.spec_from_file_location("shared", Path(__file__).parents[1] / "conftest.py")
assert SPEC is not None and SPEC.loader is not None
SHARED = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(SHARED)


def build(case: dict[str, Any], folder: Path, rank: int) -> Run:
    path = folder / f"recipe-{rank}.yaml"
    path.write_text(SHARED.TINY)
    recipe = load(path, case["overrides"])
    backend = NativeBackend(recipe.layout(case["world"]), kv_heads=recipe.model.kv_heads)
    return build_run(recipe, SHARED.RaggedData(recipe), backend)


def spoil(run: Run) -> None:
    """Fill all that a checkpoint holds with rubbish, so that what is not loaded shows."""
    for tensor in state.tensors(run).values():
        for view in [view for _, view in tensor.blocks] if isinstance(tensor, Piece) else [tensor]:
            view.fill_(torch.nan if view.is_floating_point() else 77)


def plant(run: Run, fault: str) -> None:
    """A mistake that the comparison of layouts must see."""
    if fault == "count copies":
        for group in run.optimizer.param_groups:
            group["counted"] = True
    elif fault == "no sum":
        run.optimizer.all_reduce = None  # type: ignore[attr-defined]


def run_case(case: dict[str, Any], folder: Path, rank: int) -> dict[str, Any]:
    run = build(case, folder, rank)
    plant(run, case.get("fault", ""))
    if case.get("from"):
        spoil(run)
        checkpoint = CheckpointStore(folder / case["from"], keep=1).newest()
        assert checkpoint is not None
        state.restore(run, checkpoint)
    out: dict[str, Any] = {"coefficients": [], "losses": [], "first": run.step}
    while run.step < case["steps"]:
        values = train_step(run)
        out["losses"].append(float(values["loss"]))
        own = {key.removeprefix("optim/"): value for key, value in values.items() if key.startswith("optim/")}
        out["coefficients"].append({name: float(value) for name, value in own.items()})
        if run.step == case.get("save"):
            store = CheckpointStore(folder / case["name"], keep=1)
            store.save(run.step, state.tensors(run), state.meta(run), tokens=0, wait=True)
    sums = [float(bucket.master.detach().double().abs().sum()) for bucket in run.buckets]
    return {**out, "sums": sums}


def main(cases: Path, folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    for case in json.loads(cases.read_text()):
        if rank >= case["world"]:
            continue
        base = folder / f"{case['name']}.{rank}"
        try:
            if case["world"] > 1:
                store = dist.FileStore(f"{folder / case['name']}.store", case["world"])
                wait = timedelta(seconds=60)
                dist.init_process_group(
                    "gloo", store=store, rank=rank, world_size=case["world"], timeout=wait
                )
            base.with_name(f"{base.name}.part").write_text(json.dumps(run_case(case, folder, rank)))
            os.replace(f"{base}.part", f"{base}.json")
        except Exception:
            Path(f"{base}.error").write_text(traceback.format_exc())
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
