"""What one rank of a group runs to prove compressed reductions.

    RANK=0 WORLD_SIZE=2 python conef_ranks.py FOLDER        # the cases of a group of two, one after the other

Each case leaves NAME.RANK.json in FOLDER: losses, digests of weights and errors after each step, geometry of
the buckets, metrics.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))  # before this folder: its conftest is another one

from conftest import TINY

from hlat.backend.native import NativeBackend
from hlat.checkpoint.store import CheckpointStore
from hlat.data.batch import Batch
from hlat.model.decoder import Decoder
from hlat.recipe import Recipe, load
from hlat.reduce.grid import shuffled
from hlat.train import state
from hlat.train.run import Run, build_run
from hlat.train.step import train_step

SGD = "optim={name: sgd, lr: 0.05, momentum: 0.9, weight_decay: 0.0, clip_norm: 0.5}"
CONEF = "reduce={name: conef, start_step: 3}"
ROWS = 8


def case(dp: int, *extra: str, steps: int = 40, parts: int = 1, optim: str = SGD) -> dict[str, Any]:
    """Recipe overrides of a case: `dp` replicas, each with `parts` micro-batches."""
    batch = (f"data.global_batch={ROWS}", f"data.micro_batch={ROWS // dp // parts}")
    base = ("model.layers=4", "data.document_mask=false", "guard={name: skip, sigma: 0}", optim, CONEF)
    return {"overrides": [*base, f"parallel.dp={dp}", *batch, *extra], "steps": steps}


ZERO1, TP, PP = "parallel.zero1=true", "parallel.tp=2", "parallel.pp=2"
OTHERS = {
    "topk": "reduce={name: conef, start_step: 1, compressor: topk, ratio: 0.2}",
    "sign": "reduce={name: ef, start_step: 1, compressor: sign}",
    "int8": "reduce={name: ef, start_step: 1, compressor: int8}",
    "powersgd": "reduce={name: powersgd, start_step: 1, rank: 2}",
    "rounded": "reduce={name: conef, start_step: 1, error: int8}",
    "exact": "reduce={name: ef, start_step: 3}",
}
CASES: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "dp2": case(2, steps=50),
        "dp2-zero1": case(2, ZERO1),
        "dp2-accumulate2": case(2, parts=2),
        "dp2-exact": case(2, OTHERS["exact"]),
        "dp2-identity": case(2, "reduce={name: conef, start_step: 3, error: exact}"),
        "dp2-adamw": case(2, steps=12, optim="optim={name: adamw, lr: 1e-3, eps: 1e-4}"),
        "dp2-dense": case(2, "reduce={name: dense}", steps=12),
        "dp2-ratio1": case(2, "reduce={name: conef, ratio: 1.0, start_step: 0}", steps=12),
        **{f"dp2-{k}": case(2, v, steps=8) for k, v in OTHERS.items() if k != "exact"},
        **{f"dp2-zero1-{k}": case(2, ZERO1, v, steps=8) for k, v in OTHERS.items()},
    },
    4: {
        "dp4": case(4),
        "dp4-zero1": case(4, ZERO1),
        "dp2-tp2": case(2, TP),
        "dp2-tp2-zero1": case(2, TP, ZERO1, steps=12),
        "dp2-pp2": case(2, PP, parts=2),
    },
}


class ChainData:
    """Rows that can be learnt: the next id is a function of the last, but for some noise. Targets are
    unevenly many.
    """

    fingerprint = "chain"

    def __init__(self, recipe: Recipe) -> None:
        self.vocab, self.length = recipe.model.vocab, recipe.data.seq_len

    def batches(self, step: int, size: int, count: int, rank: int = 0, world: int = 1) -> list[Batch]:
        made = torch.Generator().manual_seed(500 + step)
        ids = torch.randint(0, self.vocab, (ROWS, self.length + 1), generator=made)
        noise = torch.rand(ids.shape, generator=made) < 0.1
        for t in range(self.length):
            ids[:, t + 1] = torch.where(noise[:, t], ids[:, t + 1], (5 * ids[:, t] + 3) % self.vocab)
        targets = ids[:, 1:].clone()
        share = torch.rand(ROWS, 1, generator=made)
        targets[torch.rand(targets.shape, generator=made) < share] = -100
        first = rank * (ROWS // world)
        rows = [slice(first + i * size, first + (i + 1) * size) for i in range(count)]
        return [Batch(ids[r, :-1].contiguous(), targets[r], None, None) for r in rows]


def make_recipe(folder: Path, overrides: list[str], tag: str) -> Recipe:
    path = folder / f"recipe-{tag}.yaml"
    path.write_text(TINY)
    return load(path, overrides)


def build(folder: Path, overrides: list[str], world: int, rank: int) -> Run:
    recipe = make_recipe(folder, overrides, str(rank))
    backend = NativeBackend(recipe.layout(world), device=torch.device("cpu"), kv_heads=recipe.model.kv_heads)
    return build_run(recipe, ChainData(recipe), backend)


def digest(tensors: list[torch.Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def weights(run: Run) -> str:
    return digest([bucket.weights for bucket in run.buckets])


def local(run: Run) -> list[torch.Tensor]:
    return [tensor for name, tensor in sorted(run.reducer.state().items()) if "local" in name]


def geometry(run: Run) -> list[dict[str, Any]]:
    return [
        {
            "length": bucket.length,
            "specs": [[s.name, list(s.part.offset), list(s.part.size), s.offset] for s in bucket.specs],
            "path": bucket.specs[0].path,
        }
        for bucket in run.buckets
    ]


def held_out(run: Run, batches: int = 16) -> float:
    """Loss on rows that are not trained on, of the whole model."""
    data, place, total = run.recipe.data, run.backend.place, 0.0
    count = run.recipe.accumulate(run.backend.world)
    for i in range(batches):
        rows = run.data.batches(10_000 + i, data.micro_batch, count, place.dp, run.backend.layout.dp)
        loss = run.engine.forward(rows, run.count_targets(rows)) * float(place.tp == 0)
        total += float(run.backend.all_reduce(loss.reshape(1))) / batches
    return total


def train(run: Run, steps: int) -> dict[str, Any]:
    out: dict[str, Any] = {key: [] for key in ("losses", "norms", "weights", "errors", "skipped", "wire")}
    for _ in range(steps):
        values = train_step(run)
        out["losses"].append(float(values["loss"]))
        out["norms"].append(float(values["grad_norm"]))
        out["skipped"].append(bool(values["skipped"]))
        out["weights"].append(weights(run))
        out["errors"].append(digest(local(run)))
        out["wire"].append(float(values.get("reduce/wire_bytes", 0)))
        out["metrics"] = {k: float(v) for k, v in values.items() if k.startswith("reduce/")}
        if run.step == 40:
            out["held_out"] = held_out(run)
    place = run.backend.place
    return {**out, "place": [place.dp, place.pp, place.tp], "geometry": geometry(run)}


def resume(folder: Path, rank: int) -> dict[str, Any]:
    """Six steps, a checkpoint, six more; again from the checkpoint; then in another layout."""
    overrides = case(2, "reduce={name: conef, start_step: 3, compressor: lowrank, rank: 2}")["overrides"]
    through = build(folder, overrides, 2, rank)
    train(through, 6)
    store = CheckpointStore(folder / "checkpoints", keep=2)
    store.save(6, state.tensors(through), {**state.meta(through)}, 0, wait=True)
    wanted = train(through, 6)
    again = build(folder, overrides, 2, rank)
    found = store.newest()
    assert found is not None
    state.restore(again, found)
    loaded = digest(local(again))
    got = train(again, 6)
    same = {key: wanted[key] == got[key] for key in ("losses", "weights", "errors")}
    other = build(folder, [*overrides, ZERO1], 2, rank)  # the same shards, so the same error
    state.restore(other, found)
    kept = digest(local(other)) == loaded != digest([torch.zeros_like(t) for t in local(other)])
    turned = build(folder, [*overrides, "parallel.dp=1", TP, "data.micro_batch=8"], 2, rank)
    state.restore(turned, found)
    empty = all(not tensor.any() for n, tensor in turned.reducer.state().items() if "sketch" in n)
    loss = train(turned, 1)["losses"][0]
    said = [*turned.reducer.describe(), *again.reducer.describe()]
    return {"same": same, "kept": kept, "empty": empty, "loss": [loss, got["losses"][0]], "said": said}


def skip(folder: Path, rank: int) -> dict[str, Any]:
    """A value that is not finite, on one rank, in a place that is not sent: all skip, no error moves."""
    run = build(folder, case(2)["overrides"], 2, rank)
    train(run, 6)
    before = digest(local(run)), weights(run)
    engine, plain = run.engine, run.engine.forward_backward
    memory = next(iter(run.reducer._memories.values()))
    block = memory.compressor
    number = int(shuffled(run.reducer.count, block.blocks, block.salt))
    start = min(number * block.size, memory.grid.units - block.size) * memory.grid.unit
    place = 0 if start > 0 else block.size * memory.grid.unit

    def planted(*args: Any) -> torch.Tensor:
        ready, run.buckets[0].on_ready = run.buckets[0].on_ready, None
        loss = plain(*args)
        run.buckets[0].on_ready = ready
        if rank == 1:
            run.buckets[0].grad[place] = torch.nan
        return loss

    engine.forward_backward = planted  # type: ignore[method-assign]
    values = train_step(run)
    engine.forward_backward = plain  # type: ignore[method-assign]
    after = digest(local(run)), weights(run)
    more = train(run, 2)
    return {"skipped": bool(values["skipped"]), "same": before == after, "more": more["skipped"]}


def hook(folder: Path, rank: int) -> dict[str, Any]:
    """DDP with the hook beside HLAT's reducer: the same model, data and buckets."""
    from torch.nn.parallel import DistributedDataParallel

    from hlat.reduce import ConEFState, conef_hook

    run = build(folder, case(2, steps=1)["overrides"], 2, rank)
    torch.manual_seed(0)
    model = Decoder(run.recipe.model)
    model.load_state_dict(run.model.state_dict())
    wrapped = DistributedDataParallel(Loss(model, run.objective), bucket_cap_mb=1000)
    hooked = ConEFState(model, start_step=3)
    wrapped.register_comm_hook(hooked, conef_hook)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9)
    gaps = []
    for step in range(14):
        with torch.no_grad():  # HLAT's reduction at the same weights
            for name, parameter in run.model.named_parameters():
                parameter.copy_(model.get_parameter(name))
        batches, tokens = run.next_batches(), torch.tensor(100)
        run.reducer.begin(step, 1.0)
        run.engine.forward_backward(batches, tokens)
        shards = run.reduce()
        run.reducer.commit(torch.tensor(True))
        optimizer.zero_grad()
        (wrapped(batches[0], tokens) * 2).backward()  # DDP averages, HLAT sums
        pairs = [
            (s.view(shard), s.path) for b, shard in zip(run.buckets, shards, strict=True) for s in b.specs
        ]
        gaps.append(max(float((g - model.get_parameter(path).grad).abs().max()) for g, path in pairs))
        optimizer.step()
        run.step += 1
    metrics = run.reducer.metrics()
    own = {k: float(metrics[f"reduce/{k}"]) for k in ("wire_bytes", "error_norm", "error_bytes")}
    its = {
        "wire_bytes": hooked.wire_bytes,
        "error_norm": float(hooked.error_norm()),
        "error_bytes": hooked.error_bytes(),
    }
    return {"gaps": gaps, "own": own, "its": its, "weights": digest(list(model.parameters()))}


class Loss(torch.nn.Module):
    """A model and its loss, for DDP."""

    def __init__(self, model: Decoder, objective: Any) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.objective.loss(self.model, batch, tokens)
        return loss


def rank_main(folder: Path) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store-{world}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=100))
    special = {"resume": resume, "skip": skip, "hook": hook} if world == 2 else {}
    for name in os.environ.get("ONLY", "").split() or [*CASES[world], *special]:
        torch.manual_seed(0)
        try:
            if name in special:
                result = special[name](folder, rank)
            else:
                chosen = CASES[world][name]
                result = train(build(folder, chosen["overrides"], world, rank), chosen["steps"])
        except Exception:
            (folder / f"{name}.{rank}.error").write_text(traceback.format_exc())
            raise
        (folder / f"{name}.{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
