"""Where one training step's time goes, and how far it is from its matrix products alone.

    python tests/bench/breakdown.py

Prints each part timed alone at the step's shapes in the same process (best of several repetitions), the whole
step, and the ratio of the step to the linear layers' products (forward, and both backward ones).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from model import build, recipe

from hlat.data import open_data
from hlat.model.attention import CoreAttention
from hlat.objective.causal_lm import CHUNK_ELEMENTS, softmax_gradient
from hlat.optim.base import guarded_step
from hlat.train.step import train_step


def clock(call: Callable[[], object], repetitions: int = 9) -> float:
    """Median seconds of a call, after two unmeasured ones."""
    call(), call()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def products(run) -> float:
    """Seconds of all linear layers' products of a step: forward, gradient of the input, gradient of the
    weight.
    """
    model, tokens = run.recipe.model, run.recipe.tokens_per_step
    query, key = model.heads * model.head_dim, model.kv_heads * model.head_dim
    layer = [(model.hidden, query), (model.hidden, key), (model.hidden, key), (query, model.hidden)]
    layer += [(model.hidden, model.ffn), (model.hidden, model.ffn), (model.ffn, model.hidden)]
    total = 0.0
    cache: dict[tuple[int, int], float] = {}
    for shape in [*layer * model.layers, (model.hidden, model.vocab)]:
        if shape not in cache:
            cache[shape] = _product(tokens, *shape)
        total += cache[shape]
    return total


def _product(tokens: int, inner: int, outer: int) -> float:
    x, w, g = (
        torch.randn(s, dtype=torch.bfloat16) for s in ((tokens, inner), (outer, inner), (tokens, outer))
    )
    y, dx, dw = torch.empty_like(g), torch.empty_like(x), torch.empty_like(w)

    def call() -> None:
        torch.mm(x, w.T, out=y)
        torch.mm(g, w, out=dx)
        torch.mm(g.T, x, out=dw)

    return clock(call)


def attention(run) -> float:
    """Seconds of core attention, forward and backward, in all layers."""
    model, data = run.recipe.model, run.recipe.data
    core = torch.compile(CoreAttention(model.attention), dynamic=False)
    shape = (data.micro_batch, data.seq_len)
    q = torch.randn(*shape, model.heads, model.head_dim, dtype=torch.bfloat16, requires_grad=True)
    k, v = (
        torch.randn(*shape, model.kv_heads, model.head_dim, dtype=torch.bfloat16, requires_grad=True)
        for _ in "kv"
    )
    g = torch.randn_like(q)
    return clock(lambda: torch.autograd.grad(core(q, k, v), (q, k, v), g)) * model.layers


def loss_kernel(run) -> float:
    """Seconds of softmax, loss and gradient of the logits, without the head's products."""
    tokens, vocab = run.recipe.tokens_per_step, run.recipe.model.vocab
    chunks = max(1, tokens * vocab // CHUNK_ELEMENTS)
    logits, targets = (
        torch.randn(tokens // chunks, vocab, dtype=torch.bfloat16),
        torch.randint(0, vocab, (tokens // chunks,)),
    )
    kernel = torch.compile(softmax_gradient, dynamic=False)
    return clock(lambda: kernel(logits, targets, torch.tensor(1.0))) * chunks


def norms(run) -> float:
    """Seconds of all RMSNorms, forward and backward."""
    model, data = run.recipe.model, run.recipe.data
    norm = torch.compile(run.model.norm, dynamic=False)
    x = torch.randn(data.micro_batch, data.seq_len, model.hidden, dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn_like(x)
    return clock(lambda: torch.autograd.grad(norm(x), (x, run.model.norm.weight), g)) * (2 * model.layers + 1)


def optimizer(run) -> float:
    """Seconds of gradient norm, update and publication."""
    keep = torch.tensor(True)

    def call() -> None:
        shards = run.reduce()
        _, _, clip = run.agree(torch.zeros(()), shards)
        for bucket, shard in zip(run.buckets, shards, strict=True):
            bucket.master.grad = shard
        guarded_step(run.optimizer, keep, clip)
        run.publish()

    return clock(call)


def loader(run) -> float:
    """Seconds to read a step's batches from the tokenized standard library."""
    data = open_data(recipe("data.tokenizer=train:bpe-8192"), quiet=True)
    rows = run.recipe.data.global_batch
    steps = iter(range(1000))
    return clock(lambda: data.batches(next(steps), rows, 1), 50)


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(2)
    run = build(compiled=True)
    for _ in range(3):
        train_step(run)
    parts = {
        "linear layers (products)": products(run),
        "attention": attention(run),
        "loss and its gradient": loss_kernel(run),
        "norms": norms(run),
        "gradient norm, optimizer, publish": optimizer(run),
        "data loader": loader(run),
    }
    step = clock(lambda: train_step(run)["loss"].item(), 15)
    parts["the rest (rotation, SwiGLU, residuals, gradient sums)"] = step - sum(parts.values())
    for name, seconds in parts.items():
        print(f"{name:55} {1e3 * seconds:7.1f} ms {100 * seconds / step:5.1f} %")
    print(f"{'step':55} {1e3 * step:7.1f} ms")
    print(f"step / products: {step / parts['linear layers (products)']:.2f}")


if __name__ == "__main__":
    main()
