"""Which learning rate and weight decay each parameter gets.

The rule is by role: with `decay: matrices` every tensor of two or more dimensions (projections, embedding,
head) is decayed and norm gains are not; `decay: all` decays everything, as HLAT's published runs did.
`groups` then overrides by name, first match wins.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hlat.errors import UserError


@dataclass(frozen=True)
class Group:
    """The optimizer options of a set of parameters: peak learning rate, weight decay, and whether they are
    matrices that the optimizer must see whole.
    """

    lr: float
    weight_decay: float
    matrix: bool = False


@dataclass(frozen=True)
class Override:
    """An entry of `optim.groups`: a name pattern (shell wildcards) and what it sets; None: default."""

    match: str
    lr: float | None = None
    weight_decay: float | None = None


def assign_groups(
    shapes: Iterable[tuple[str, tuple[int, ...]]],
    *,
    lr: float,
    weight_decay: float,
    decay: str = "matrices",
    overrides: Sequence[Override] = (),
) -> dict[str, Group]:
    """Group of each parameter, by name. Raises UserError for an override that matches no parameter."""
    groups: dict[str, Group] = {}
    used: set[int] = set()
    names = []
    for name, shape in shapes:
        names.append(name)
        own_decay = weight_decay if decay == "all" or len(shape) >= 2 else 0.0
        group = Group(lr, own_decay)
        for i, override in enumerate(overrides):
            if fnmatch.fnmatchcase(name, override.match):
                used.add(i)
                group = Group(
                    lr if override.lr is None else override.lr,
                    own_decay if override.weight_decay is None else override.weight_decay,
                )
                break
        groups[name] = group
    for i, override in enumerate(overrides):
        if i not in used and not any(fnmatch.fnmatchcase(name, override.match) for name in names):
            raise UserError(
                f"pattern {override.match!r} matches no parameter",
                where=f"optim.groups[{i}].match",
                fix=f"names look like {names[0]!r} and {names[-2]!r}; wildcards are * and ?",
            )
    return groups
