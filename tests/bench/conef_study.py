"""What compressing the gradient and its error costs in held-out loss, on a small language model.

    python tests/bench/conef_study.py --out study.json

A decoder on the text of the standard library, four replicas, 10 % of each bucket sent. The replicas are
worked through one after the other in this process, by the reducers' own compressors and stores: what four
processes would compute. Prints a table: held-out loss over the seeds, its difference from exact error
feedback, bytes of error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hlat.data import open_data
from hlat.recipe import load
from hlat.reduce.choice import Choice
from hlat.reduce.feedback import Memory, make_memory
from hlat.train.evaluate import evaluate
from hlat.train.run import Run, build_run

RANKS, START = 4, 10
RECIPE = """
run: {name: study, steps: 400, seed: 1}
model: {layers: 2, hidden: 64, heads: 4, kv_heads: 4, ffn: 128, vocab: 260, max_seq_len: 64}
data: {sources: [{dataset: python-stdlib}], tokenizer: bytes, seq_len: 64, micro_batch: 4, global_batch: 16,
    holdout: 0.02}
precision: {compute: fp32}
guard: {name: none}
eval: {batches: 32}
compile: false
"""
OPTIMIZERS = {
    "adamw": ["optim={name: adamw, lr: 2.0e-3, weight_decay: 0.1}", "schedule={name: cosine, floor: 0.1}"],
    "sgd": [
        "optim={name: sgd, lr: 0.5, momentum: 0.9, weight_decay: 0.0, clip_norm: 0.5}",
        "schedule={name: cosine, floor: 0.1, warmup_steps: 20}",
    ],
}
METHODS: dict[str, Choice | None] = {
    "dense": None,
    "ef": Choice(error="exact"),
    "conef 0.2": Choice(error="sketch", size=0.2),
    "conef 0.1": Choice(error="sketch", size=0.1),
    "int8 error": Choice(error="int8"),
    "no feedback": Choice(error="none"),
    "unbiased": Choice("unbiased_block", error="none"),
    "powersgd 4": Choice("lowrank", rank=4, error="exact"),
}


def simulate(memories: Sequence[Memory], grads: Sequence[Tensor], count: int) -> Tensor:
    """One bucket's reduction over replicas in one process: 1-D, what each of them would get."""
    number = torch.tensor(count)
    exchanges, asks = [], []
    feeds = [memory.feed(grad, number, torch.float32) for memory, grad in zip(memories, grads, strict=True)]
    for memory, feed in zip(memories, feeds, strict=True):
        exchanges.append(memory.compressor.exchange(feed))
        asks.append(next(exchanges[-1]))
    while True:
        tensors = torch.stack([ask.tensor for ask in asks])
        total = tensors.sum(0).to(tensors.dtype) if asks[0].op == "sum" else tensors.amax(0)
        results = []
        asks = []
        for exchange in exchanges:
            try:
                asks.append(exchange.send(total.clone()))
            except StopIteration as done:
                results.append(done.value)
        if results:
            break
    keep = torch.tensor(True)
    for memory, feed, (_, sent) in zip(memories, feeds, results, strict=True):
        memory.store.stage(feed.grad, sent)
        memory.store.commit(keep)
        memory.compressor.commit(keep)
    return memories[0].grid.flat(results[0][0])


def step(run: Run, cells: list[list[Memory] | None], compress: bool) -> float:
    """One global batch over the replicas; returns its loss."""
    section = run.recipe.data
    own = section.global_batch // RANKS // section.micro_batch
    batches = [run.data.batches(run.step, section.micro_batch, own, rank, RANKS) for rank in range(RANKS)]
    tokens = torch.stack([b.targets_count() for part in batches for b in part]).sum().clamp(min=1)
    run.set_learning_rate()
    loss, grads = torch.zeros(()), []
    for part in batches:
        loss = loss + run.engine.forward_backward(part, tokens)
        grads.append([bucket.grad.clone() for bucket in run.buckets])
    shards = []
    for i, memories in enumerate(cells):
        own_grads = [grad[i] for grad in grads]
        if memories is None or not compress:
            shards.append(torch.stack(own_grads).sum(0))
        else:
            shards.append(simulate(memories, own_grads, run.step))
    loss, norm, clip = run.agree(loss, shards)
    run.update(shards, run.guard(loss, norm), clip)
    run.step += 1
    return float(loss)


def train(method: str, optimizer: str, seed: int, steps: int, overrides: Sequence[str]) -> dict[str, float]:
    """Train one model; held-out loss and bytes of one replica's error."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.yaml"
        path.write_text(RECIPE)
        recipe = load(path, [f"run.seed={seed}", f"run.steps={steps}", *OPTIMIZERS[optimizer], *overrides])
    run = build_run(recipe, open_data(recipe))
    choice, cells = METHODS[method], []
    for bucket in run.buckets:
        if choice is None or len(bucket.specs[0].part.shape) < 2:
            cells.append(None)
            continue
        matrices = [(s.offset, s.shape[0], s.shape[1]) for s in bucket.specs]
        makers = choice.compressor_maker(), choice.store_maker()
        place = bucket.length, matrices, bucket.specs[0].path, bucket.grad.device, RANKS
        cells.append([make_memory(*place, *makers, choice.ratio) for _ in range(RANKS)])
    began, losses = time.perf_counter(), []
    for _ in range(steps):
        losses.append(step(run, cells, run.step >= START))
    held = float(evaluate(run)["loss"])
    error = sum(parts[0].error_bytes() for parts in cells if parts)
    seconds = time.perf_counter() - began
    return {
        "held_out": held,
        "train": statistics.mean(losses[-20:]),
        "error_bytes": error,
        "seconds": seconds,
    }


def main() -> None:
    """Train all, print as they come, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adamw")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {method: [] for method in args.methods}
    for seed in args.seeds:
        for method in args.methods:
            result = train(method, args.optimizer, seed, args.steps, args.overrides)
            found[method].append(result)
            print(f"seed {seed} {method:12} {result}", flush=True)
            if args.out:
                args.out.write_text(json.dumps(found, indent=1))
    exact = found.get("ef")
    print(f"{args.optimizer}, {args.steps} steps, seeds {args.seeds}: held-out loss, minus ef, error bytes")
    for method, results in found.items():
        held = statistics.mean(r["held_out"] for r in results)
        line = f"{method:12} {held:.3f}"
        if exact:
            gaps = [a["held_out"] - b["held_out"] for a, b in zip(results, exact, strict=True)]
            share = results[0]["error_bytes"] / exact[0]["error_bytes"]
            line += f"  {statistics.mean(gaps):+.3f} ({min(gaps):+.3f} to {max(gaps):+.3f})  {share:.1%}"
        print(line)


if __name__ == "__main__":
    main()
