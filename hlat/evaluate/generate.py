"""Text generation with a static key/value cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hlat.checkpoint.hf_generation import FILE
from hlat.errors import UserError
from hlat.evaluate.rules import Rules, Step
from hlat.evaluate.sampling import NOT_FINITE, Sampling, draw, drawable, only

if TYPE_CHECKING:
    from hlat.data.tokenizer import Tokenizer
    from hlat.model.decoder import Decoder


class Diverged(UserError):
    """Weights that give no finite logits."""


def diverged(what: str, where: str = "") -> Diverged:
    """The error, with what to do."""
    return Diverged(what, where=where, fix="take a checkpoint before it diverged")


def room_after(prompt: Sequence[int], longest: int) -> int:
    """Tokens that can be made after a prompt before the model's context is full."""
    return max(0, longest - len(prompt))


def check_prompt(prompt: Sequence[int], longest: int) -> None:
    """Raise UserError for a prompt without tokens, or with more than the model takes."""
    if not prompt:
        raise UserError("the prompt has no tokens", where="--prompt", fix="write some text")
    if len(prompt) > longest:
        what = f"the prompt has {len(prompt):,} tokens, the model takes {longest:,}"
        raise UserError(what, where="--prompt", fix="shorten it")


@torch.no_grad()
def generate(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Collection[int] = (),
    known: int | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    rules: Mapping[str, Any] | None = None,
) -> Iterator[int]:
    """Ids that continue a prompt, one by one as they are made.

    Ends after max_new_tokens, before the first id of `stop`, or where the model's max_seq_len is reached.

    Args:
        model: a whole model; it runs in its weights' dtype on their device.
        prompt: at least one id.
        temperature: 0 = greedy.
        top_k, top_p, min_p, typical_p: see `Sampling`.
        seed: of the draws; the same seed gives the same text.
        stop: end-of-text ids.
        known: ids of the tokenizer, where the embedding is padded to more; the others are never made.
        rules: what else holds for the next token, as `Rules` takes it.

    Raises:
        UserError: a prompt that is empty or longer than the model's max_seq_len; rules that leave no token.
        Diverged: weights that give no finite logits.
    """
    check_prompt(prompt, model.config.max_seq_len)
    # The last position that is fed is the one before the last token made.
    count = min(max_new_tokens, room_after(prompt, model.config.max_seq_len))
    device = next(model.parameters()).device
    vocab = model.config.vocab
    allowed = drawable(vocab, vocab if known is None else known, stop, device)
    generator = torch.Generator(device=device).manual_seed(seed)
    sampling = Sampling(temperature, top_k, top_p, min_p, typical_p, generator)
    held, said = Rules(rules or {}, stop), list(prompt)
    cache = model.new_cache(1, len(prompt) + max(count - 1, 0))
    ids = torch.tensor([list(prompt)], device=device)
    positions = torch.arange(len(prompt), device=device)[None]
    for number in range(count):
        hidden = model.hidden(ids, positions, None, cache)[:, -1]
        assert model.head is not None
        logits = only(model.head(hidden), allowed)
        step = Step(said, len(prompt), last=number == max_new_tokens - 1)
        chosen = draw(held.apply(logits, [step]) if held else logits, sampling)
        token = int(chosen)
        if token == NOT_FINITE:
            raise _nothing_to_choose(logits)
        if token in stop:
            return
        yield token
        said.append(token)
        ids, positions = chosen[None], positions[:, -1:] + 1


def _nothing_to_choose(logits: Tensor) -> UserError:
    if not logits.amax().isfinite():
        return diverged("the model's logits are not finite")
    return UserError("the rules leave no token to choose", where=FILE, fix="remove some of what they forbid")


def stream_text(tokenizer: Tokenizer, prompt: Sequence[int], new_ids: Iterator[int]) -> Iterator[str]:
    """Pieces of text as the ids come; together they are the decoded continuation.

    A character whose bytes are spread over several ids appears with the last of them.
    """
    ids = list(prompt)
    done = len(tokenizer.decode(ids))
    text = ""
    for token in new_ids:
        if token >= tokenizer.vocab_size:
            continue  # the model's vocabulary may be padded beyond the tokenizer's
        ids.append(token)
        text = tokenizer.decode(ids)
        whole = len(text.rstrip("\ufffd"))
        if whole > done:
            yield text[done:whole]
            done = whole
    if len(text) > done:
        yield text[done:]
