"""The benchmark model and its batches, shared by the scripts in this folder."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from hlat.backend.native import NativeBackend
from hlat.data.batch import Batch
from hlat.recipe import Recipe, load
from hlat.train.run import Run, build_run

RECIPE = """
run: {name: bench, steps: 1000, seed: 1}
model: {layers: 6, hidden: 384, heads: 6, kv_heads: 6, ffn: 1024, vocab: 8192, max_seq_len: 512, norm_eps:
    1.0e-5}
data: {sources: [{dataset: python-stdlib}], tokenizer: bytes, seq_len: 512, micro_batch: 8, global_batch: 8,
    document_mask: false}
precision: {compute: bf16}
optim: {name: adamw, lr: 1.0e-3, betas: [0.9, 0.95], eps: 1.0e-8, weight_decay: 0.1}
schedule: {name: constant}
"""
ROWS = 64  # distinct rows; steps go round them


def recipe(*overrides: str) -> Recipe:
    """6 layers, hidden 384, vocabulary 8192; a step is 8 rows of 512 tokens."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.yaml"
        path.write_text(RECIPE)
        return load(path, overrides)


def rows(chosen: Recipe) -> torch.Tensor:
    """int64 (ROWS, S) random ids, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, chosen.model.vocab, (ROWS, chosen.data.seq_len), generator=generator)


class FixedData:
    """Hands out the rows in order. The last position has no target, as in `transformers`' shifted labels."""

    fingerprint = "bench"

    def __init__(self, chosen: Recipe) -> None:
        self.rows, self.batch = rows(chosen), chosen.data.global_batch

    def batches(
        self, step: int, micro_batch: int, accumulate: int, rank: int = 0, world: int = 1
    ) -> list[Batch]:
        """The step's micro-batches."""
        start, size = step * self.batch % ROWS, self.batch // world
        ids = self.rows[start + rank * size : start + (rank + 1) * size]
        targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)
        parts = zip(ids.split(micro_batch), targets.split(micro_batch), strict=True)
        return [Batch(i, t) for i, t in parts]


def build(*overrides: str, compiled: bool) -> Run:
    """The benchmark run on fixed rows."""
    chosen = recipe(*overrides)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return build_run(chosen, FixedData(chosen), NativeBackend(chosen.layout(world)), compiled=compiled)
