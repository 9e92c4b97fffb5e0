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
    untrained: Sequence[str] = (),
) -> dict[str, Group]:
    """Group of each parameter, by name.

    Args:
        shapes: name and shape of each trained parameter.
        lr, weight_decay: of a parameter that no override matches.
        decay: "matrices" or "all": what is decayed at all.
        overrides: exceptions by name; the first that matches wins.
        untrained: names that exist beside them: frozen parameters, and the second name of a tied one. An
            override that matches only these has nothing to do (see `idle_overrides`).

    Raises:
        UserError: an override that matches no parameter.
    """
    groups: dict[str, Group] = {}
    names = []
    for name, shape in shapes:
        names.append(name)
        own_decay = weight_decay if decay == "all" or len(shape) >= 2 else 0.0
        group = Group(lr, own_decay)
        for override in overrides:
            if fnmatch.fnmatchcase(name, override.match):
                group = Group(
                    lr if override.lr is None else override.lr,
                    own_decay if override.weight_decay is None else override.weight_decay,
                )
                break
        groups[name] = group
    known = [*names, *untrained]
    for i, override in enumerate(overrides):
        if not any(fnmatch.fnmatchcase(name, override.match) for name in known):
            raise UserError(
                f"pattern {override.match!r} matches no parameter",
                where=f"optim.groups[{i}].match",
                fix=f"names look like {examples(known)}; wildcards are * and ?",
            )
    return groups


def idle_overrides(names: Iterable[str], overrides: Sequence[Override]) -> list[tuple[int, str]]:
    """Overrides that no trained parameter takes its options from: the index of each, and why."""
    winners, reachable = set(), set()
    for name in names:
        matching = [i for i, override in enumerate(overrides) if fnmatch.fnmatchcase(name, override.match)]
        winners.update(matching[:1])
        reachable.update(matching)
    return [
        (
            i,
            "earlier groups match all of its parameters"
            if i in reachable
            else "none of its parameters is trained",
        )
        for i in range(len(overrides))
        if i not in winners
    ]


def examples(names: Sequence[str]) -> str:
    """Two names of a list, or the only one, in quotes, to show what names look like."""
    shown = dict.fromkeys([names[0], names[len(names) // 2]])
    return " and ".join(map(repr, shown))
