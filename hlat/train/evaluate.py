"""Held-out evaluation inside a run, and what the end of a run shows: a sample, and what compressors make of
the same text.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from hlat.evaluate.perplexity import Score

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
    """Mean loss (nats a token) and bits per byte on the held-out documents, with the weights the model
    computes with.

    The same rows every time: the first `eval.batches` batches of `data.micro_batch` rows.
    """
    data, size, count = run.data, run.recipe.data.micro_batch, run.recipe.eval.batches
    one = torch.ones((), device=run.backend.device)
    total = torch.zeros((), dtype=torch.float64, device=run.backend.device)
    tokens = torch.zeros((), dtype=torch.int64, device=run.backend.device)
    with eval_mode(run.model):
        for batch in data.holdout_batches(size, count):
            batch = batch.to(run.backend.device)
            total += run.objective.loss(run.model, batch, one).double()
            tokens += batch.targets_count()
            run.backend.mark_step()
    score = Score(float(total), int(tokens), data.holdout_bytes(size, count))
    return {
        "loss": score.loss,
        "bits_per_byte": score.bits_per_byte,
        "held_out_tokens": score.tokens,
        "held_out_bytes": score.bytes,
    }


def sample(run: Run, tokens: int) -> str:
    """Text the model writes from the start of a document, at temperature 0.8; always the same for the same
    weights.
    """
    from hlat.evaluate.generate import generate, stream_text
    from hlat.model.decoder import Decoder

    with torch.device("meta"):  # the same weights in a module that is not compiled for the training shapes
        model = Decoder(run.recipe.model)
    model.load_state_dict(run.model.state_dict(), assign=True)
    model.rope.to_empty(device=run.backend.device)
    tokenizer = run.data.tokenizer
    prompt = [tokenizer.eos_id]  # every document of the stream but the first follows an end-of-document
    ids = generate(
        model.eval(), prompt, max_new_tokens=tokens, temperature=0.8, top_p=0.95, stop={tokenizer.eos_id}
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
