"""Whether a rank hangs: each phase has its own limit, and a compiler at work is not a hang."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hlat.observe.heartbeat import FIRST_STEP, STEP, Heartbeat
from hlat.observe.watchdog import Sign, who_is_late

if TYPE_CHECKING:
    from hlat.recipe import Recipe

STEPS, MARGIN = 2.0, 30.0  # a step may take this many of the slowest recent ones, and so many seconds more
SEARCH = 4.5  # seconds from the first suspicion to the end of the ranks: two looks, stacks
_LOADING = {"start", "starting", "joining", "data", "building", "restoring", "rewinding", "reading tasks"}
_SAVING = {"checkpoint", "leaving"}


def kind_of(phase: str) -> str:
    """loading, compiling, stepping, checkpointing or evaluating: what an operator is told."""
    if phase in _LOADING:
        return "loading"
    if phase in _SAVING:
        return "checkpointing"
    return {FIRST_STEP: "compiling", STEP: "stepping"}.get(phase, "evaluating")


@dataclass(frozen=True)
class Limits:
    """Seconds without progress that each kind of phase may take; stepping: beyond two steps, once it is known
    what a step takes (until then as checkpointing).

    headroom: seconds before a limit at which the search begins, so that the rank is named by then.
    From a recipe: `parallel.first_timeout` for loading and compiling, and for what is patient by its nature;
    `parallel.timeout` for checkpoints and evaluation.
    """

    loading: float = 3600.0
    compiling: float = 3600.0
    stepping: float = MARGIN
    checkpointing: float = 600.0
    evaluating: float = 600.0
    headroom: float = 0.0

    @classmethod
    def of(cls, recipe: Recipe, margin: float = MARGIN) -> Limits:
        """As a recipe has them."""
        long, short = float(recipe.parallel.first_timeout), float(recipe.parallel.timeout)
        return cls(long, long, margin, short, short, min(SEARCH, margin / 2))

    def of_beat(self, beat: Heartbeat) -> float:
        """Seconds that a rank may stay where it is."""
        kind = kind_of(beat.phase)
        if kind == "stepping" and beat.pace >= 0:
            return STEPS * beat.pace + self.stepping
        if kind == "stepping":
            return max(self.checkpointing, self.stepping)
        limit = float(getattr(self, kind))
        return max(limit, self.loading) if beat.patient else limit


def overdue(
    beats: Mapping[int, Heartbeat],
    now: float,
    limits: Limits,
    compiles: Callable[[int], bool],
    halted: Callable[[int], bool],
    elsewhere: Callable[[], bool] = lambda: False,
) -> list[Heartbeat]:
    """The ranks that have been in one place for longer than it may last, the longest first.

    Args:
        beats: of this machine. now: monotonic seconds.
        compiles: whether a compiler works for a process; it, and those that wait meanwhile, have the limit of
            compiling.
        halted: whether a process is stopped by a signal; then no phase excuses it.
        elsewhere: whether a rank of another machine compiles.
    """
    late = []
    for beat in beats.values():
        here, silent = now - beat.began + limits.headroom, now - beat.stamp + limits.headroom
        if silent > limits.stepping and halted(beat.pid):
            late.append(beat)
        elif here > limits.of_beat(beat):
            excused = here <= limits.compiling and (
                compiles(beat.pid)
                or (beat.waiting and (any(compiles(other.pid) for other in beats.values()) or elsewhere()))
            )
            late += [] if excused else [beat]
    return sorted(late, key=lambda beat: beat.began)


@dataclass(frozen=True)
class Rank:
    """A rank as `who_is_late` wants it."""

    rank: int
    host: str
    pid: int

    def exists(self) -> bool | None:
        """Not asked here."""
        return None


def sign(beat: Heartbeat, age: float) -> dict[str, Any]:
    """A heartbeat as a sign of life, with its age in place of a clock that other machines do not share."""
    return {"beat": beat.stamp, "age": age, "rank": beat.rank, "pid": beat.pid, "step": beat.step,
            "phase": beat.phase, "since": beat.stamp - beat.began, "where": beat.where,
            "waiting": beat.waiting}  # fmt: skip


def name_the_late(
    hosts: Mapping[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]], now: float
) -> tuple[int, str]:
    """The rank that holds up the others (-1: none in particular), and a sentence.

    Args:
        hosts: for each machine its ranks' signs, and the same a few seconds later.
        now: unix time, for "last sign ... ago".
    """
    members: list[Rank] = []
    before: dict[int, Sign] = {}
    after: dict[int, Sign] = {}
    for host, (first, second) in hosts.items():
        for signs, into in ((first, before), (second, after)):
            for item in signs:
                into[item["rank"]] = Sign(
                    int(1e3 * item["beat"]), now - item["age"], item["step"], item["phase"], item["since"],
                    item["where"], item["waiting"],
                )  # fmt: skip
        members += [Rank(item["rank"], host, item["pid"]) for item in second]
    members.sort(key=lambda member: member.rank)
    # A silent rank has the same beat twice; its age differs, so only the beat is compared.
    same = {
        rank: after[rank] for rank in after if rank in before and before[rank].number == after[rank].number
    }
    return who_is_late(members, {**before, **same}, after)
