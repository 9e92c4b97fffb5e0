"""Rules that change the scores of the next token whether it is drawn or not, as `transformers` has them.

They are those of generation_config.json (and of tasks): penalties for what was said, tokens and sequences
that may not follow, lengths. Sums and orders are those of `transformers`' processors, so greedy texts agree
token by token.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hlat.checkpoint.hf_generation import rules_of

_NEVER = float("-inf")


@dataclass(frozen=True)
class Step:
    """Where a text is: its ids so far, the prompt's among them, how many those are, and whether this is the
    last token that will be made.
    """

    ids: Sequence[int]
    prompt: int
    last: bool

    @property
    def made(self) -> int:
        """Tokens made so far."""
        return len(self.ids) - self.prompt


class Rules:
    """The rules that settings ask for.

    Args:
        settings: by their names in generation_config.json, of the types of `GenerationFields`; others are
            left aside.
        stops: ids that end a text.
    """

    def __init__(self, settings: Mapping[str, Any], stops: Collection[int] = ()) -> None:
        given = rules_of(settings)
        self.penalty = float(given.get("repetition_penalty", 1.0))
        self.ngram = int(given.get("no_repeat_ngram_size", 0))
        self.min_new = int(given.get("min_new_tokens", 0))
        # A least number of new tokens, also of 0, takes the place of the least length of all.
        self.min_length = 0 if "min_new_tokens" in given else int(given.get("min_length", 0))
        words = [tuple(word) for word in given.get("bad_words_ids", ())]
        self.words = [word for word in words if len(word) > 1 or word[0] not in stops]
        self.first: int | None = given.get("forced_bos_token_id")
        forced = given.get("forced_eos_token_id")
        self.end: list[int] = [] if forced is None else list(forced if isinstance(forced, list) else [forced])
        self.suppressed = list(given.get("suppress_tokens", ()))
        self.at_first = list(given.get("begin_suppress_tokens", ()))
        self.stops = list(stops)

    def __bool__(self) -> bool:
        """Whether there is any."""
        lengths = self.min_length or self.min_new
        bans = self.words or self.suppressed or self.at_first or self.ngram
        return bool(self.penalty != 1.0 or bans or lengths or self.first is not None or self.end)

    def apply(self, logits_BV: Tensor, steps: Sequence[Step]) -> Tensor:
        """The scores of each row's next token, fp32 or wider (B, V); rows that are not finite stay so."""
        scores = logits_BV.float() if logits_BV.dtype.itemsize < 4 else logits_BV.clone()
        for row, step in zip(scores, steps, strict=True):
            if not row.amax().isfinite():
                continue
            if self.penalty != 1.0:
                self._penalise(row, step)
            banned = [*self._repeating(step), *self._words(step), *self._too_early(step)]
            self._ban(row, banned)
            self._force(row, step)
            self._ban(row, self.suppressed)
            if step.made == (1 if self.first is not None and step.prompt == 1 else 0):
                self._ban(row, self.at_first)
        return scores

    def _penalise(self, row_V: Tensor, step: Step) -> None:
        known = sorted({index for index in step.ids if index < len(row_V)})
        seen = torch.tensor(known, device=row_V.device)
        score = row_V[seen]
        row_V[seen] = torch.where(score < 0, score * self.penalty, score / self.penalty)

    def _repeating(self, step: Step) -> list[int]:
        """Ids that would end a sequence of `ngram` tokens for a second time."""
        size, ids = self.ngram, step.ids
        if size < 1 or len(ids) + 1 < size:
            return []
        ending = tuple(ids[len(ids) + 1 - size :])
        starts = range(len(ids) - size + 1)
        return [ids[at + size - 1] for at in starts if tuple(ids[at : at + size - 1]) == ending]

    def _words(self, step: Step) -> list[int]:
        """Last ids of the forbidden sequences whose beginning is there."""
        ids = list(step.ids)
        return [word[-1] for word in self.words if len(word) <= len(ids) + 1 and _ends_with(ids, word[:-1])]

    def _too_early(self, step: Step) -> list[int]:
        early = len(step.ids) < self.min_length or step.made < self.min_new
        return self.stops if early else []

    def _force(self, row_V: Tensor, step: Step) -> None:
        forced = self.end if step.last else []
        if self.first is not None and len(step.ids) == 1:
            forced = [self.first]
        if forced := [index for index in forced if 0 <= index < len(row_V)]:
            row_V.fill_(_NEVER)
            row_V[forced] = 0.0

    @staticmethod
    def _ban(row_V: Tensor, ids: Sequence[int]) -> None:
        if known := [index for index in ids if 0 <= index < len(row_V)]:
            row_V[known] = _NEVER


def _ends_with(ids: list[int], ending: tuple[int, ...]) -> bool:
    return not ending or tuple(ids[-len(ending) :]) == ending
