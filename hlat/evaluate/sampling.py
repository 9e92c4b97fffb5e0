"""How the next token is chosen from logits."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hlat.errors import UserError

NOT_FINITE = -1
"""What is chosen in place of a token where the logits are not finite."""


@dataclass
class Sampling:
    """Temperature 0 takes the most likely token. top_k keeps the k most likely ids and those as likely as the
    last of them, top_p then the fewest whose probability reaches p, at least one, min_p those that are at
    least this share as likely as the likeliest, typical_p the fewest of probability p whose surprise is
    nearest to what is expected: as `transformers` does. generator: of the draws, on the logits' device.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    generator: torch.Generator | None = field(default=None, repr=False)

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0


def check_sampling(
    temperature: Any, top_k: Any, top_p: Any, where: str = "", min_p: Any = None, typical_p: Any = None
) -> dict[str, Any]:
    """The options as `Sampling` takes them; what changes nothing (None, top_k 0, top_p 1 and more) becomes
    None.

    Raises UserError at `where` for what `transformers` refuses: a temperature below 0, a top_k that is no
    whole number or below 0, a top_p below 0, a min_p that is not from 0 to 1, a typical_p not above 0.
    """
    heat = 1.0 if temperature is None else _number(temperature)
    if heat is None or not heat >= 0:
        raise _refused(where, "temperature", temperature, "write 0 (the most likely token) or more")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0):
        raise _refused(where, "top_k", top_k, "write a whole number, 0 for all tokens")
    share = 1.0 if top_p is None else _number(top_p)
    if share is None or share < 0:
        raise _refused(where, "top_p", top_p, "write a number from 0 to 1")
    least = 0.0 if min_p is None else _number(min_p)
    if least is None or not 0 <= least <= 1:
        raise _refused(where, "min_p", min_p, "write a number from 0 to 1")
    mass = 1.0 if typical_p is None else _number(typical_p)
    if mass is None or mass <= 0:
        raise _refused(where, "typical_p", typical_p, "write a number above 0, at most 1")
    shares = {"top_p": None if share >= 1 else share, "typical_p": None if mass >= 1 else mass}
    return {"temperature": heat, "top_k": top_k or None, "min_p": least or None, **shares}


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number


def _refused(where: str, name: str, value: Any, fix: str) -> UserError:
    return UserError(f"{name} {value!r} is out of range", where=where, fix=fix)


def drawable(vocab: int, known: int, stops: Collection[int], device: torch.device) -> Tensor | None:
    """Ids that may be chosen, bool (vocab,): those of the tokenizer and those that end a text. The rest of a
    padded embedding stands for nothing. None where all may be.

    Args:
        vocab: rows of the model's embedding.
        known: ids of the tokenizer.
        stops: end-of-text ids.
    """
    if known >= vocab:
        return None
    allowed = torch.arange(vocab) < known
    allowed[[index for index in stops if known <= index < vocab]] = True
    return allowed.to(device)


def going_on(vocab: int, allowed_V: Tensor | None, stops: Collection[int], device: torch.device) -> Tensor:
    """The allowed ids without those that end a text, bool (vocab,)."""
    known = torch.ones(vocab, dtype=torch.bool, device=device) if allowed_V is None else allowed_V.clone()
    known[[index for index in stops if index < vocab]] = False
    return known


def only(logits_BV: Tensor, allowed_V: Tensor | None) -> Tensor:
    """The logits with -inf where an id may not be chosen."""
    return logits_BV if allowed_V is None else logits_BV.masked_fill(~allowed_V, float("-inf"))


def draw(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """One id for each row of logits (B, V), int64 (B,); NOT_FINITE where the largest of them is not."""
    logits = logits_BV.float()
    top_B = logits.amax(-1)  # NaN, if there is one
    sound_B = top_B.isfinite()
    if sampling.greedy:
        return torch.where(sound_B, logits.argmax(-1), NOT_FINITE)
    below = torch.where(sound_B[:, None], logits - top_B[:, None], 0.0)
    # 0 for the likeliest, which no temperature, however small or large, turns into something else.
    heated = torch.where((below == 0) | (below == float("-inf")), below, below / sampling.temperature)
    ranked, order = heated.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        last_B1 = ranked[:, min(sampling.top_k, ranked.shape[-1]) - 1, None]
        ranked = ranked.masked_fill(ranked < last_B1, float("-inf"))
    share = ranked.softmax(-1)
    if sampling.top_p is not None:
        beyond = share.cumsum(-1) - share >= sampling.top_p
        beyond[:, 0] = False
        share = share.masked_fill(beyond, 0.0)
    if sampling.min_p is not None:
        share = share.masked_fill(share < sampling.min_p * share[:, :1], 0.0)
    if sampling.typical_p is not None:
        share = _typical(share, sampling.typical_p)
    chosen_B = order.gather(-1, torch.multinomial(share, 1, generator=sampling.generator))[:, 0]
    return torch.where(sound_B, chosen_B, NOT_FINITE)


def _typical(share_BV: Tensor, mass: float) -> Tensor:
    """The fewest entries, at least one, of this probability whose surprise is nearest to the entropy."""
    share_BV = share_BV / share_BV.sum(-1, keepdim=True)
    surprise = -share_BV.log()
    expected = torch.where(share_BV > 0, share_BV * surprise, 0.0).sum(-1, keepdim=True)
    away, order = (surprise - expected).abs().sort(dim=-1, stable=True)
    count = (share_BV.gather(-1, order).cumsum(-1) < mass).sum(-1, keepdim=True)
    last = away.gather(-1, count.clamp(max=share_BV.shape[-1] - 1))
    return share_BV.masked_fill((surprise - expected).abs() > last, 0.0)
