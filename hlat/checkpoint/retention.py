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


def most_at_once(keep: int, remote: bool) -> int:
    """How many checkpoints that are not permanent a run's disk holds at most, the one being written included.

    A new one is complete before an old one goes. With `checkpoint.remote` there may be one more: that which
    is being uploaded stays until it is done.

    Args:
        keep: `checkpoint.keep`.
        remote: whether `checkpoint.remote` is set.
    """
    return keep + (2 if remote else 1)


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
    """The checkpoints to delete, oldest first: rolling ones with `keep` (>= 1) or more newer usable ones.

    So the newest `keep` stay, and a damaged one neither takes a place nor goes before its turn.
    """
    rolling = sorted((entry for entry in entries if not entry.permanent), key=lambda entry: entry.sequence)
    newer = [sum(other.usable for other in rolling[place + 1 :]) for place in range(len(rolling))]
    return [entry for entry, count in zip(rolling, newer, strict=True) if count >= keep]
