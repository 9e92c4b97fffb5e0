"""Held-out evaluation inside a run, and what the end of a run shows: a sample, and what compressors make of
the same text.
"""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from hlat.backend.precision import DTYPES
from hlat.evaluate.perplexity import Score, sum_losses

if TYPE_CHECKING:
    from pathlib import Path

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
    """Mean loss (nats a token) and bits per byte on the held-out documents, with the weights the model
    computes with; for a classification mean loss and accuracy (0 to 1) on the held-out examples. Where what
    the model computes is not finite they are NaN. Every rank calls it and gets the same numbers.

    The same `eval.rows` rows every time, in every layout, in batches of `data.micro_batch`. The replicas take
    them in turn; one without a batch in the last round waits for the others.
    """
    data, rows = run.data, run.recipe.eval.rows
    layout, place = run.backend.layout, run.backend.place
    turns = enumerate(data.holdout_batches(run.recipe.data.micro_batch, rows))
    own = (batch for number, batch in turns if number % layout.dp == place.dp)
    counts = hasattr(run.objective, "start_counting")
    if counts:
        run.objective.start_counting(run.backend.device)
    with eval_mode(run.model):
        total, tokens = sum_losses(
            own,
            lambda batch, one: run.engine.forward([batch], one),
            run.backend.device,
            lambda: run.backend.mark_step("eval"),
        )
    # The loss is there once for each tensor-parallel rank of the last stage, the batch on every rank.
    total, tokens = total * (place.tp == 0), tokens * (place.tp == place.pp == 0)
    total, tokens = run.backend.all_reduce(total), run.backend.all_reduce(tokens)
    if counts:
        correct = int(run.backend.all_reduce(run.objective.counted() * (place.tp == 0)))
        unsound = getattr(run.objective, "unsound", torch.zeros_like(tokens))  # another package's has none
        unsound = int(run.backend.all_reduce(unsound * (place.tp == 0)))
        examples = sum(data.holdout_labels(rows).values())
        loss, accuracy = float(total) / max(1, int(tokens)), correct / max(1, examples)
        if unsound or not math.isfinite(loss):
            loss = accuracy = math.nan
        return {"loss": loss, "accuracy": accuracy, "held_out_examples": examples}
    score = Score(float(total), int(tokens), data.holdout_bytes(rows))
    return {
        "loss": score.loss,
        "bits_per_byte": score.bits_per_byte,
        "held_out_tokens": score.tokens,
        "held_out_bytes": score.bytes,
    }


def sample(run: Run, checkpoint: Path, tokens: int) -> str:
    """Text the model writes from the start of a document, at temperature 0.8, or after the first held-out
    prompt, greedily; always the same for the same weights.

    Args:
        run: gives the tokenizer, the format to compute in and the device. Its own weights are not used: one
            rank may hold only parts of them.
        checkpoint: a step folder, or the run folder for its newest one. Only the caller reads it.
        tokens: at most so many.
    """
    from hlat.checkpoint.reader import open_checkpoint
    from hlat.checkpoint.weights import load_model
    from hlat.evaluate.generate import generate, stream_text

    dtype = DTYPES[run.recipe.precision.compute]
    device = run.backend.device
    if device.type == "xla":  # a graph for every length of text: not worth a minute's compilation each
        device, dtype = torch.device("cpu"), torch.float32
    model = load_model(open_checkpoint(checkpoint), dtype, device)
    tokenizer = run.data.tokenizer
    known = tokenizer.vocab_size
    if run.recipe.data.examples is not None and run.data.holdout.documents:
        text, _ = run.data.holdout.texts[0]
        prompt = [int(i) for i in run.data.holdout.prompts[0]]
        ids = generate(model, prompt, max_new_tokens=tokens, stop={tokenizer.eos_id}, known=known)
        return text + "".join(stream_text(tokenizer, prompt, ids))
    bos = run.provenance.convention.bos
    # Every document of the stream but the first follows an end-of-document.
    prompt = [tokenizer.eos_id if bos is None else bos]
    ids = generate(
        model,
        prompt,
        max_new_tokens=tokens,
        temperature=0.8,
        top_p=0.95,
        stop={tokenizer.eos_id},
        known=known,
    )
    return "".join(stream_text(tokenizer, prompt, ids))


def compressors(text: bytes) -> dict[str, float]:
    """Bits per byte of gzip -9 and xz -9 on a text, the yardstick every reader has at home."""
    if not text:
        return {}
    return {
        "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }
