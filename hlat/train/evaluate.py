"""Held-out evaluation inside a run, and what the end of a run shows: a sample, and what compressors make of the same text."""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from hlat.train.run import Run


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; the former mode after."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def evaluate(run: Run) -> dict[str, Any]:
    """Mean loss (nats a token) and bits per byte on the held-out documents, with the weights the model computes with.

    The same rows every time: the first `eval.batches` batches of `data.micro_batch` rows.
    """
    section, data = run.recipe.eval, run.data
    one = torch.ones((), device=run.backend.device)
    total = torch.zeros((), dtype=torch.float64, device=run.backend.device)
    tokens = torch.zeros((), dtype=torch.int64, device=run.backend.device)
    text_bytes = 0.0
    with eval_mode(run.model):
        for batch in data.holdout_batches(run.recipe.data.micro_batch, section.batches):
            text_bytes += batch.text_bytes
            batch = batch.to(run.backend.device)
            total += run.objective.loss(run.model, batch, one).double()
            tokens += batch.targets_count()
            run.backend.mark_step()
    nats, count = float(total), int(tokens)
    return {
        "loss": nats / max(1, count),
        "bits_per_byte": nats / math.log(2) / text_bytes if text_bytes else None,
        "held_out_tokens": count,
        "held_out_bytes": int(text_bytes),
    }


def compressors(text: bytes) -> dict[str, float]:
    """Bits per byte of gzip -9 and xz -9 on a text, the yardstick every reader has at home."""
    if not text:
        return {}
    return {
        "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }
