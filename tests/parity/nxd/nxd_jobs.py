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


def resume(folder: Path, overrides: Sequence[str], steps: int = 4) -> dict[str, bool]:
    """Train, save half way in HLAT's own format, restore into a new run, train on: is all of it the same?"""
    from hlat.checkpoint.store import CheckpointStore

    half = steps // 2
    run = make_run(folder, overrides)
    first = shared.train(run, half)
    store = CheckpointStore(folder / "checkpoints", keep=2)
    store.save(run.step, state.tensors(run), state.meta(run), 0, wait=True)
    rest = shared.train(run, steps - half)
    again = make_run(folder, overrides)
    state.restore(again, store.newest())
    repeated = shared.train(again, steps - half)
    return {
        "losses": repeated == rest and first != rest,
        "tensors": everywhere(run, same_tensors(run, again)),
        "weights": everywhere(run, all(torch.equal(a.cpu(), b.cpu()) for a, b in weights(run, again))),
    }


def weights(a: Run, b: Run) -> Any:
    return zip(a.model.parameters(), b.model.parameters(), strict=True)


def same_tensors(a: Run, b: Run) -> bool:
    """Whether all that a checkpoint of either would hold is bitwise the same."""
    ours, theirs = flat_state(a), flat_state(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def flat_state(run: Run) -> dict[str, torch.Tensor]:
    out = {}
    for i, bucket in enumerate(run.buckets):
        out[f"master.{i}"] = bucket.master.detach().cpu()
        for slot, value in run.optimizer.state[bucket.master].items():
            out[f"{slot}.{i}"] = value.detach().cpu()
    for owner in (run.guard, run.reducer):
        out |= {f"{type(owner).__name__}.{name}": value.cpu() for name, value in owner.state().items()}
    return out


def graphs(folder: Path, overrides: Sequence[str], steps: int = 20) -> dict[str, Any]:
    """Compiled graphs after each step, with a new learning rate in each, evaluation and saves in between."""
    from hlat.backend.nxd.graphs import count
    from hlat.checkpoint.store import CheckpointStore
    from hlat.train.evaluate import eval_mode
    from hlat.train.step import train_step

    run = make_run(folder, [*overrides, "schedule={name: cosine, warmup_steps: 5}", "run.steps=100"])
    lines: list[str] = []
    run.backend.graphs.say = lines.append
    store, counts, kept = CheckpointStore(folder / "checkpoints", keep=1), [], []
    for step in range(steps):
        kept.append(train_step(run))
        if step % 4 == 0:
            with eval_mode(run.model):
                batch = run.next_batches()[0]
                kept.append({"eval": run.engine.forward([batch], torch.ones((), device=run.backend.device))})
                run.backend.mark_step("eval")
        if step % 5 == 0:
            store.save(run.step, state.tensors(run), state.meta(run), 0, wait=True)
            [float(value.cpu()) for row in kept for value in row.values()]
            kept.clear()
        counts.append(count().graphs)
    return {"counts": counts, "lines": lines, "unexpected": run.backend.graphs.unexpected}


def nxd_files(folder: Path, overrides: Sequence[str], steps: int = 4) -> dict[str, Any]:
    """The same with NxD's own files; what they become in HLAT's format, and what HLAT writes itself."""
    from hlat.checkpoint.nxd import open_nxd, read_nxd
    from hlat.checkpoint.store import CheckpointStore
    from hlat.train import nxd_checkpoint

    half = steps // 2
    run = make_run(folder, overrides)
    shared.train(run, half)
    tag = nxd_checkpoint.save(run, folder / "nxd")
    store = CheckpointStore(folder / "checkpoints", keep=2)
    store.save(run.step, state.tensors(run), state.meta(run), 0, wait=True)
    rest = shared.train(run, steps - half)
    again = make_run(folder, overrides)
    nxd_checkpoint.restore(again, folder / "nxd")
    repeated = shared.train(again, steps - half)
    checkpoint = store.newest()
    files = open_nxd(folder / "nxd" / tag)
    wholes = read_nxd(files)
    other = {name: torch.zeros_like(value) for name, value in wholes.items()}
    checkpoint.load_into(other)
    return {
        "losses": repeated == rest,
        "tensors": everywhere(run, same_tensors(run, again)),
        "converted": all(torch.equal(wholes[name], other[name]) for name in other),
        "names": checkpoint.names() == sorted(wholes),
        "step": files.step,
        "folder": str(folder / "nxd" / tag),
    }


def across(folder: Path, overrides: Sequence[str], other: Sequence[str]) -> dict[str, Any]:
    """Checkpoints in HLAT's format from the native backend to NxD and back, by how far the next two steps are
    apart; and NxD's own files in another layout.
    """
    from hlat.checkpoint.store import CheckpointStore
    from hlat.errors import UserError
    from hlat.train import nxd_checkpoint

    alone = [word for word in overrides if not word.startswith(("parallel", "data.micro_batch"))]
    recipe = make_recipe(folder, [*alone, "backend=native"])
    result = {}

    def native() -> Run:
        return build_run(recipe, shared.RaggedData(recipe))

    def nxd() -> Run:
        return make_run(folder, overrides)

    for name, first, second in (("to_nxd", native, nxd), ("to_native", nxd, native)):
        one, store = first(), CheckpointStore(folder / name, keep=1)
        shared.train(one, 2)
        store.save(one.step, state.tensors(one), state.meta(one), 0, wait=True)
        two = second()
        state.restore(two, store.newest())
        pairs = zip(shared.train(one, 2), shared.train(two, 2), strict=True)
        result[name] = max(abs(a - b) / abs(b) for x, y in pairs for a, b in zip(x, y, strict=True))
    saved = nxd()
    nxd_checkpoint.save(saved, folder / "nxd")
    try:
        nxd_checkpoint.restore(make_run(folder, other), folder / "nxd")
    except UserError as error:
        result["refused"] = str(error)
    return result
