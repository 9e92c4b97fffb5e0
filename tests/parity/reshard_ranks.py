"""What one of several ranks runs for the resharding tests: the cases of a file one after the other, each in
as many ranks as it says.

    python reshard_ranks.py CASES.json FOLDER RANK

A case is {"name", "world", "overrides", "from"}. It builds a run, loads the checkpoints in FOLDER/<from> (or
trains two steps where "from" is empty), saves to FOLDER/<name>/before, evaluates, trains two more steps and
saves to FOLDER/<name>/after. What it saw goes to <name>.<rank>.json, or a traceback to <name>.<rank>.error.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from hlat.backend.native import NativeBackend
from hlat.checkpoint.layout import Snapshot
from hlat.checkpoint.piece import Piece
from hlat.checkpoint.store import Checkpoint, CheckpointStore
from hlat.data.batch import Batch
from hlat.recipe import load
from hlat.train import state
from hlat.train.describe import banner
from hlat.train.evaluate import evaluate
from hlat.train.run import Run, build_run
from hlat.train.step import train_step

SECONDS = 60  # of waiting for another rank
SPEC = importlib.util.spec_from_file_location("shared", Path(__file__).parents[1] / "conftest.py")
assert SPEC is not None and SPEC.loader is not None
SHARED = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(SHARED)


class Data(SHARED.RaggedData):  # type: ignore[misc,name-defined]
    """Ragged batches, and three held-out ones: a number that two replicas do not share evenly."""

    holdout = SimpleNamespace(documents=3)

    def holdout_batches(self, size: int, count: int | None = None) -> Iterator[Batch]:
        for number in range(3):
            yield self.batches(10_000 + number, size, 1)[0]

    def holdout_bytes(self, rows: int | None = None) -> int:
        return 1000

    def report_lines(self) -> list[str]:
        return []


def build(case: dict[str, Any], folder: Path, rank: int) -> Run:
    path = folder / f"recipe-{rank}.yaml"
    path.write_text(SHARED.TINY)
    recipe = load(path, case["overrides"])
    layout = recipe.layout(case["world"])
    return build_run(recipe, Data(recipe), NativeBackend(layout, kv_heads=recipe.model.kv_heads))


def spoil(run: Run) -> None:
    """Fill all that a checkpoint holds with rubbish, so that what is not loaded shows."""
    for tensor in state.tensors(run).values():
        for view in [view for _, view in tensor.blocks] if isinstance(tensor, Piece) else [tensor]:
            view.fill_(torch.nan if view.is_floating_point() else 77)


def save(run: Run, root: Path) -> None:
    """In the background, while the tensors change, as in training."""
    store = CheckpointStore(root, keep=1, async_=True)
    named = state.tensors(run)
    store.save(run.step, named, state.meta(run), tokens=0)
    store.wait()


def run_case(case: dict[str, Any], folder: Path, rank: int) -> dict[str, Any]:
    run, home, out = build(case, folder, rank), folder / case["name"], {}
    checkpoint: Checkpoint | None = None
    if case["from"]:
        spoil(run)
        checkpoint = CheckpointStore(folder / case["from"], keep=1).newest()
        assert checkpoint is not None
        state.restore(run, checkpoint)
    else:
        for _ in range(2):
            train_step(run)
    out["banner"] = banner(run, home, checkpoint, "off", None)
    save(run, home / "before")
    out["staged"] = Snapshot(state.tensors(run), None).bytes()
    out["held_out"] = evaluate(run)
    out["losses"] = [float(train_step(run)["loss"]) for _ in range(2)]
    save(run, home / "after")
    return out


def main(cases: Path, folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    for case in json.loads(cases.read_text()):
        if rank >= case["world"]:
            continue
        base = folder / f"{case['name']}.{rank}"
        try:
            if case["world"] > 1:
                store = dist.FileStore(f"{folder / case['name']}.store", case["world"])
                wait = timedelta(seconds=SECONDS)
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
