"""What compressing the gradient and its error costs in held-out loss, on a small language model.

    python tests/bench/conef_study.py --out study.json                  # LSTM, SGD: the setting of the paper
    python tests/bench/conef_study.py --model decoder --steps 200       # HLAT's decoder with AdamW

Bytes of the standard library's source, four replicas, 10 % of each bucket sent after 10 dense steps. The
replicas are worked through one after the other in this process, by the reducers' own compressors and stores:
what four processes would compute. Prints held-out loss over the seeds, its difference from exact error
feedback, and the bytes of error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
eval: {rows: 128}
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
    return memories[0].without_padding(memories[0].grid.flat(results[0][0]))


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


class CharLSTM(nn.Module):
    """Bytes -> embedding 64 -> LSTM 160 -> logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(256, 64), nn.LSTM(64, 160, batch_first=True)
        self.head = nn.Linear(160, 256)

    def loss(self, rows: Tensor) -> Tensor:
        """int64 (B, S + 1) -> mean loss a byte."""
        hidden, _ = self.lstm(self.embed(rows[:, :-1]))
        return F.cross_entropy(self.head(hidden).flatten(0, 1), rows[:, 1:].flatten())


def corpus() -> tuple[Tensor, Tensor]:
    """Training and held-out bytes: every twentieth file of the standard library is held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts: list[list[bytes]] = [[], []]
    for i, file in enumerate(files):
        parts[i % 20 == 7].append(file.read_bytes())
    return tuple(torch.frombuffer(bytearray(b"".join(p)), dtype=torch.uint8).long() for p in parts)  # type: ignore


def windows(text: Tensor, count: int, generator: torch.Generator, length: int = 32) -> Tensor:
    """Random windows (count, length + 1)."""
    starts = torch.randint(0, text.numel() - length - 1, (count, 1), generator=generator)
    return text[starts + torch.arange(length + 1)]


def train_lstm(method: str, seed: int, steps: int) -> dict[str, float]:
    """SGD with Nesterov momentum 0.9, lr 2 (a quarter of it for the last 30 %), clipped at 0.25 after
    decompression; 8 rows of 32 bytes a replica.
    """
    torch.manual_seed(seed)
    model, (text, held), made = CharLSTM(), corpus(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0, momentum=0.9, nesterov=True)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    places, offset = [], 0
    for p in matrices:
        places.append((offset, p.shape[0], p.numel() // p.shape[0]))
        offset += p.numel()
    choice, length = METHODS[method], -(-offset // 1024) * 1024
    cells: list[Memory] = []
    if choice is not None:
        makers = choice.compressor_maker(), choice.store_maker()
        place = length, places, "embed.weight", torch.device("cpu"), RANKS
        cells = [make_memory(*place, *makers, choice.ratio) for _ in range(RANKS)]
    began = time.perf_counter()
    for step_number in range(steps):
        optimizer.param_groups[0]["lr"] = 2.0 if step_number < 0.7 * steps else 0.5
        flats, total = [], [torch.zeros_like(p) for p in model.parameters()]
        for rows in windows(text, 8 * RANKS, made).split(8):
            grads = torch.autograd.grad(model.loss(rows) / RANKS, list(model.parameters()))
            for into, grad in zip(total, grads, strict=True):
                into += grad
            kept = [g.reshape(-1) for g in grads if g.dim() > 1]
            flats.append(torch.cat([*kept, torch.zeros(length - offset)]))
        for p, grad in zip(model.parameters(), total, strict=True):
            p.grad = grad
        if cells and step_number >= START:
            reduced = simulate(cells, flats, step_number)
            for p, (at, n, m) in zip(matrices, places, strict=True):
                p.grad = reduced[at : at + n * m].view(p.shape)
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
    with torch.no_grad():
        loss = model.loss(windows(held, 2000, torch.Generator().manual_seed(0)))
    error = cells[0].error_bytes() if cells else 0
    return {"held_out": float(loss), "error_bytes": error, "seconds": time.perf_counter() - began}


def main() -> None:
    """Train all, print as they come, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=["lstm", "decoder"], default="lstm")
    parser.add_argument("--steps", type=int, default=450)
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
            if args.model == "lstm":
                result = train_lstm(method, seed, args.steps)
            else:
                result = train(method, args.optimizer, seed, args.steps, args.overrides)
            found[method].append(result)
            print(f"seed {seed} {method:12} {result}", flush=True)
            if args.out:
                args.out.write_text(json.dumps(found, indent=1))
    exact = found.get("ef")
    what = "lstm, sgd" if args.model == "lstm" else f"decoder, {args.optimizer}"
    print(f"{what}, {args.steps} steps, seeds {args.seeds}: held-out loss, minus ef, error bytes")
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
