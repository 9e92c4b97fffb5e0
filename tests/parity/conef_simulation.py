"""Compressed reductions of several ranks computed again by one process, from definitions.

    python conef_simulation.py FOLDER      # after the ranks of conef_ranks.py: NAME.sim.json for some cases

Whole gradients of each replica are cut and reduced as the ranks' buckets say.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from conef_ranks import CASES, ROWS, ChainData, make_recipe

from hlat.reduce.compressors import Block
from hlat.reduce.grid import Grid, shuffled, signs
from hlat.reduce.stores import SIGN_SEED
from hlat.train.run import build_run

SIMULATED = ("dp2", "dp2-exact", "dp2-adamw", "dp4", "dp2-tp2", "dp2-pp2")


class Reference:
    """One bucket's error feedback over all replicas, element by element from its definition.

    The form that decompresses, compensates and sketches anew:  p = g + (1 - beta) U(S),  D = Q(p),
    S <- S + Sk(p - D) - (1 - beta) Sk(U(S)).
    """

    def __init__(self, length: int, path: str, replicas: int, size: float | None) -> None:
        self.grid = grid = Grid.fit(length, replicas)
        self.block = Block(grid, 0.1, zlib.crc32(path.encode()) & 0x7FFFFFFF)
        element = torch.arange(grid.shard)
        unit, column = element // grid.unit, element % grid.unit
        if size is None:
            self.cell, self.sign, self.feedback = element, torch.ones(grid.shard), 1.0
        else:
            share = round(1 / size)
            rows = max(1, grid.units // share)
            row = (unit // share).clamp(max=rows - 1)
            self.cell = row * grid.unit + column
            self.sign = signs(2 * share, grid.unit, SIGN_SEED)[unit - row * share, column]
            self.feedback = size
        self.cells = torch.zeros(replicas, grid.shards, int(self.cell.max()) + 1, dtype=torch.float64)
        self.count = 0

    def reduce(self, grads: list[torch.Tensor]) -> torch.Tensor:
        grid, size = self.grid, self.block.size
        number = int(shuffled(torch.tensor(self.count), self.block.blocks, self.block.salt))
        start = min(number * size, grid.units - size) * grid.unit
        self.count += 1
        total = torch.zeros(grid.shards, grid.shard, dtype=torch.float64)
        for cells, grad in zip(self.cells, grads, strict=True):
            spread = self.feedback * self.sign * cells[:, self.cell]
            fed = grid.view(grad).reshape(grid.shards, -1).double() + spread
            sent = torch.zeros_like(fed)
            chosen = slice(start, start + size * grid.unit)
            sent[:, chosen] = fed[:, chosen].float().double()
            rest = fed - sent - spread
            cells += torch.zeros_like(cells).index_add(1, self.cell, rest * self.sign)
            total += sent
        return total.view(-1)[: grid.length].float()


def simulate(folder: Path, name: str) -> dict[str, Any]:
    """A data x model parallel case in one process: whole gradients of each replica, cut and reduced as the
    ranks' buckets say.
    """
    world = 2 if name in CASES[2] else 4
    chosen = CASES[world][name]
    ranks = [json.loads((folder / f"{name}.{r}.json").read_text()) for r in range(world)]
    models = [rank["geometry"] for rank in ranks if rank["place"][0] == 0]
    dp = 1 + max(rank["place"][0] for rank in ranks)
    plain = ["parallel.dp=1", "parallel.tp=1", "parallel.pp=1", "reduce={name: dense}"]
    recipe = make_recipe(folder, [*chosen["overrides"], *plain], f"sim-{name}")
    run = build_run(recipe, ChainData(recipe))
    size = None if "exact" in name else 0.2
    made = [
        [Reference(b["length"], b["path"], dp, size) if len(b["specs"][0][1]) > 1 else None for b in model]
        for model in models
    ]
    losses, norms = [], []
    for step in range(chosen["steps"]):
        run.set_learning_rate()
        parts = [run.data.batches(step, ROWS // dp, 1, rank, dp) for rank in range(dp)]
        tokens = torch.stack([b.targets_count() for part in parts for b in part]).sum()
        loss, wholes = torch.zeros(()), []
        for part in parts:
            loss = loss + run.engine.forward_backward(part, tokens)
            wholes.append({s.name: s.view(b.grad).clone() for b in run.buckets for s in b.specs})
        total = {n: torch.stack([whole[n] for whole in wholes]).sum(0) for n in wholes[0]}
        if step >= 3:
            for model, references in zip(models, made, strict=True):
                for bucket, reference in zip(model, references, strict=True):
                    if reference is not None:
                        put(bucket, reference.reduce([cut(bucket, whole) for whole in wholes]), total)
        shards = []
        for bucket in run.buckets:
            flat = torch.zeros(bucket.length)
            for spec in bucket.specs:
                spec.view(flat).copy_(total[spec.name])
            shards.append(flat)
        loss, norm, clip = run.agree(loss, shards)
        run.update(shards, run.guard(loss, norm), clip)
        run.step += 1
        losses.append(float(loss))
        norms.append(float(norm))
    return {"losses": losses, "norms": norms}


def box(offset: list[int], size: list[int]) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))


def cut(bucket: dict[str, Any], whole: dict[str, torch.Tensor]) -> torch.Tensor:
    flat = torch.zeros(bucket["length"])
    for name, offset, size, at in bucket["specs"]:
        part = whole[name][box(offset, size)].reshape(-1)
        flat[at : at + part.numel()] = part
    return flat


def put(bucket: dict[str, Any], flat: torch.Tensor, total: dict[str, torch.Tensor]) -> None:
    for name, offset, size, at in bucket["specs"]:
        count = torch.Size(size).numel()
        total[name][box(offset, size)] = flat[at : at + count].view(size)


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[1])
    for sim in SIMULATED:
        (where / f"{sim}.sim.json").write_text(json.dumps(simulate(where, sim)))
