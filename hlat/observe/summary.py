"""The figures of runs that are told in numbers: one text for each figure and run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hlat.observe.runs import Array, Run
from hlat.observe.text import byte_size, duration, fixed, percent, rate, short

EMPTY = np.empty(0)
_SMOOTHING = 50  # a curve is averaged over this fraction of its run


def summary_table(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Name of a figure -> its text for every run."""
    figures: dict[str, Callable[[Run], str]] = {
        "steps": _steps,
        "tokens": lambda run: "-" if (tokens := last(run.train["tokens"])) is None else short(tokens),
        "training loss": lambda run: fixed(_mean(run.train["loss"][-span(run) :])),
        **{
            f"held-out {title.replace(' per ', '/')}": _last_held_out(name)
            for _, name, title in held_out_figures(runs)
        },
        "tokens per second": lambda run: rate(_median(run.train.get("tokens_per_second", EMPTY))),
        "MFU": lambda run: percent(_median(run.train.get("mfu", EMPTY))),
        "time in steps": lambda run: duration(float(np.nansum(run.train.get("step_seconds", EMPTY)))),
        **_method_figures(runs),
        "skipped steps": lambda run: f"{int(np.nansum(run.train.get('skipped', EMPTY)))}",
        **({"supervised": _supervised} if any(run.supervised for run in runs) else {}),
        **({"checkpoints in the store": _uploads} if any(_uploads(run) != "-" for run in runs) else {}),
        **({"failed saves": _failed_saves} if any(_failed_saves(run) != "0" for run in runs) else {}),
    }
    return {name: [figure(run) for run in runs] for name, figure in figures.items()}


def _supervised(run: Run) -> str:
    """`9 attempts in 2 jobs, goodput 84.1 %`: queues between jobs do not count."""
    rows = run.supervised
    if not rows:
        return "-"
    attempts, jobs = sum(int(row["attempts"]) for row in rows), len(rows)
    wall = sum(float(row["wall"]) for row in rows)
    share = sum(float(row["seconds"]["stepping"]) for row in rows) / wall if wall else 0.0
    where = f" in {jobs} jobs" if jobs > 1 else ""
    return f"{attempts} attempt{'s' * (attempts > 1)}{where}, goodput {percent(share)}"


def _uploads(run: Run) -> str:
    """`12 uploaded at 210.4 MB/s, 3 attempts failed, 1 skipped`."""
    rows = [row for row in run.storage if row.get("what") == "upload"]
    done = [row for row in rows if row.get("error") is None]
    skipped = sum(str(row["error"]).startswith("skipped") for row in rows if row.get("error"))
    failed = len(rows) - len(done) - skipped
    if not rows:
        return "-"
    seconds, size = (sum(float(row.get(name) or 0) for row in done) for name in ("seconds", "bytes"))
    speed = f" at {size / seconds / 1e6:.1f} MB/s" if seconds else ""
    rest = f", {failed} attempts failed" if failed else ""
    return f"{len(done)} uploaded{speed}{rest}" + (f", {skipped} skipped" if skipped else "")


def _failed_saves(run: Run) -> str:
    return str(sum(row.get("what") == "save" and bool(row.get("error")) for row in run.storage))


def _method_figures(runs: Sequence[Run]) -> dict[str, Callable[[Run], str]]:
    """What tells methods apart: how many examples went forward, and the memory of the first rank."""

    def size(field: str) -> Callable[[Run], str]:
        return lambda run: "-" if (n := last(run.train.get(field, EMPTY))) is None else byte_size(int(n))

    figures: dict[str, tuple[str, Callable[[Run], str]]] = {
        "method": ("method/queries", lambda run: str(run.recipe.get("method.name", "-"))),
        "queries": (
            "method/queries",
            lambda run: "-" if (n := last(run.train.get("method/queries", EMPTY))) is None else short(n),
        ),
        "persistent memory": ("memory/persistent_bytes", size("memory/persistent_bytes")),
        "peak memory": ("memory/peak_bytes", size("memory/peak_bytes")),
    }
    return {
        name: figure for name, (needs, figure) in figures.items() if any(needs in run.train for run in runs)
    }


def held_out_figures(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """(key of the chart, field, title) of what the runs' evaluations give; bits per byte if nothing."""
    known = [
        ("held-out", "bits_per_byte", "bits per byte"),
        ("accuracy", "accuracy", "accuracy"),
    ]
    return [entry for entry in known if any(entry[1] in run.held_out for run in runs)] or known[:1]


def _last_held_out(name: str) -> Callable[[Run], str]:
    """The figure of the last evaluation, not that of an earlier one where it has none."""
    show = percent if name == "accuracy" else fixed

    def text(run: Run) -> str:
        values = run.held_out.get(name, EMPTY)
        if not len(values):
            return "-"
        return show(float(values[-1])) if np.isfinite(values[-1]) else "not finite"

    return text


def span(run: Run) -> int:
    """How many steps a smoothed curve of the run takes together, 5 at least."""
    return max(5, len(run.train["step"]) // _SMOOTHING)


def last(values: Array) -> float | None:
    """The last value that is finite; None without one."""
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else None


def _mean(values: Array) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def _median(values: Array) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else None


def _steps(run: Run) -> str:
    done = int(run.train["step"][-1])
    return f"{done:,}" if run.planned_steps in (None, done) else f"{done:,} of {run.planned_steps:,}"
