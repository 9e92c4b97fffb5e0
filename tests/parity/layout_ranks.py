"""What one rank of a parity group runs: the cases of a file, one after the other, results into a folder.

    RANK=0 WORLD_SIZE=2 python layout_ranks.py CASES.json FOLDER

A case is {"name", "overrides", "recipe", "steps", "fault", "plant", "compiled", "measure", "evaluate"}. Each
gets a process group of its own, so that a rank that fails ends only that case: its closed connections tell
the others. A result is CASE.RANK.safetensors (pieces of the first gradient, first and last weights) and
CASE.RANK.json, written last; in place of them CASE.RANK.error holds a traceback.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch._dynamo.utils import counters

sys.path.insert(0, str(Path(__file__).parents[1]))  # before this folder, which has a conftest of its own

from conftest import TINY, RaggedData
from layout_faults import FAULTS, plant
from layout_meter import Meter, storage_bytes

from hlat.backend.native import NativeBackend
from hlat.data import open_data
from hlat.recipe import load
from hlat.train.evaluate import evaluate
from hlat.train.initial import initial_from
from hlat.train.run import Run, build_run
from hlat.train.step import train_step

SECONDS = 60  # of waiting for another rank


class Patches:
    """Replaces attributes and puts them back."""

    def __init__(self) -> None:
        self._former: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Let `owner.name` be `value` until `undo`."""
        self._former.append((owner, name, vars(owner)[name]))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Everything as it was."""
        for owner, name, value in reversed(self._former):
            setattr(owner, name, value)
        self._former.clear()


class Pieces:
    """The parts of parameters that this rank keeps, for another process to put together."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.tensors: dict[str, torch.Tensor] = {}
        self.places: list[dict[str, Any]] = []

    def add(self, kind: str, run: Run, flats: list[torch.Tensor]) -> None:
        """Keep copies of the runs of parameters in `flats`, one 1-D tensor for each bucket's share."""
        if not self.wanted:
            return
        for bucket, flat in zip(run.buckets, flats, strict=True):
            for spec, where, skip in bucket.runs():
                key = f"{kind}/{spec.path}"
                self.tensors[key] = flat.detach()[where].to("cpu", copy=True)
                part = spec.part
                place = {"shape": part.shape, "offset": part.offset, "size": part.size, "skip": skip}
                self.places.append({"key": key, "kind": kind, "name": spec.name, **place})


def masters(run: Run) -> list[torch.Tensor]:
    return [bucket.master.detach() for bucket in run.buckets]


def join(case: dict[str, Any], folder: Path, rank: int, world: int) -> None:
    """Join the process group of a case. Nccl where every rank has a GPU of its own, gloo otherwise."""
    kind = "nccl" if torch.cuda.is_available() else "gloo"
    store = dist.FileStore(str(folder / f"{case['name']}.store"), world)
    dist.init_process_group(
        kind, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=SECONDS)
    )


def build(case: dict[str, Any], folder: Path, rank: int, world: int) -> Run:
    path = folder / f"recipe-{rank}.yaml"
    path.write_text(TINY)
    recipe = load(case.get("recipe") or path, case["overrides"])
    if world > 1:
        join(case, folder, rank, world)
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    backend = NativeBackend(recipe.layout(world), device=device, kv_heads=recipe.model.kv_heads)
    data = open_data(recipe) if recipe.data.examples else RaggedData(recipe)
    initial = initial_from(recipe)[0] if recipe.init.from_ else None
    return build_run(recipe, data, backend, compiled=case.get("compiled", False), initial=initial)


def train(run: Run, steps: int, pieces: Pieces, meter: Meter | None) -> dict[str, Any]:
    """Train, keep the first step's gradient, and note what each step says."""
    update: Callable[..., None] = run.update

    def noted(shards: Any, *rest: Any) -> None:
        if run.step == 0:
            pieces.add("gradient", run, list(shards))
        update(shards, *rest)

    run.update = noted  # type: ignore[method-assign]
    out: dict[str, Any] = {"losses": [], "norms": [], "skipped": [], "graphs": []}
    for _ in range(steps):
        values = train_step(run)
        out["losses"].append(float(values["loss"]))
        out["norms"].append(float(values["grad_norm"]))
        out["skipped"].append(bool(values["skipped"]))
        out["graphs"].append(counters["stats"]["unique_graphs"])
    if meter is not None:
        with meter:
            train_step(run)
        out["sent"], out["ops"] = meter.sent, meter.ops
    return out


def run_case(case: dict[str, Any], folder: Path, rank: int, world: int) -> tuple[dict[str, Any], Pieces]:
    measure = bool(case.get("measure"))
    patches, pieces = Patches(), Pieces(not measure)  # the copies would be measured too
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    try:
        if case.get("fault"):
            FAULTS[case["fault"]](patches)
        run = build(case, folder, rank, world)
        plant(run, case.get("plant", ""))
        pieces.add("start", run, masters(run))
        meter = Meter() if measure else None
        result = train(run, case.get("steps", 5), pieces, meter)
        pieces.add("end", run, masters(run))
        result["held_out"] = evaluate(run) if case.get("evaluate") else None
        result["places"] = pieces.places
        groups = run.backend.groups
        names = ("world", "dp", "pp", "tp", "kv", "tie")
        result["groups"] = {name: list(groups.named(name).ranks) for name in names}
        if measure:
            result["memory"] = storage_bytes(run)
        return result, pieces
    finally:
        patches.undo()


def main(cases: Path, folder: Path) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    for case in json.loads(cases.read_text()):
        base, began = folder / f"{case['name']}.{rank}", time.monotonic()
        try:
            result, pieces = run_case(case, folder, rank, world)
            result["seconds"] = time.monotonic() - began
            save_file(pieces.tensors, f"{base}.safetensors")
            Path(f"{base}.part").write_text(json.dumps(result))
            os.replace(f"{base}.part", f"{base}.json")
        except Exception:
            Path(f"{base}.error").write_text(traceback.format_exc())
        result = pieces = None  # type: ignore[assignment]
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
