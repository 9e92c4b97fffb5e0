"""Which checkpoints stay: the newest few, and one each time training passes another N tokens. Pure rules, no
disk.

Age is the order of saving (`sequence`), not the step number: after going back to an earlier step the
checkpoints of the abandoned future are the old ones, although their steps are higher.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """What the rules know about one complete checkpoint.

    Attributes:
        step: optimizer steps done.
        tokens: training tokens seen, cumulative.
        sequence: order of saving within the folder, 1 for the first.
        permanent: decided when it was saved, and kept through later changes of the recipe.
        usable: False when reading it failed.
    """

    step: int
    tokens: int
    sequence: int
    permanent: bool = False
    usable: bool = True


def is_permanent(step: int, tokens: int, existing: Iterable[Entry], every: int | None) -> bool:
    """Whether the checkpoint about to be saved is the first one at or after a multiple of `every` tokens.

    Args:
        step, tokens: of the new checkpoint.
        existing: the complete checkpoints; only those of earlier steps count as "before".
        every: tokens between permanent checkpoints; None for none at all.
    """
    if every is None:
        return False
    before = max((entry.tokens for entry in existing if entry.step < step), default=0)
    return tokens // every > before // every


def expired(entries: Sequence[Entry], keep: int) -> list[Entry]:
    """The checkpoints to delete, oldest first: neither permanent nor among the `keep` (>= 1) newest usable
    rolling ones.

    A rolling checkpoint that could not be read does not take up a place.
    """
    rolling = sorted((entry for entry in entries if not entry.permanent), key=lambda entry: entry.sequence)
    kept = {entry.sequence for entry in [entry for entry in rolling if entry.usable][-keep:]}
    return [entry for entry in rolling if entry.sequence not in kept]
