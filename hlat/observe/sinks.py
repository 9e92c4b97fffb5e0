"""Where metric rows go. `jsonl` is always there; `tensorboard` on request; other packages register their own.

A sink is made as `Sink(folder, after_step, **options)`: the run folder, the step from which the run continues
(0 for a fresh one), so that it can drop what an earlier attempt wrote beyond that step, and what the recipe
says in `log.sinks`. It has `row(dict)` and `close()`. A method `flush()`, if there is one, is called after
each window, `rewind(step)` when the run goes back to the end of an earlier step, and `sync()` before a
checkpoint: it returns once all rows are on the disk, or an OSError that forbids the checkpoint.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from hlat.errors import UserError
from hlat.observe.claim import UNCLAIMED, Claim
from hlat.observe.jsonl import MetricsFile, truncate_after
from hlat.observe.tensorboard import EventFiles
from hlat.registry import lookup, register

METRICS_FILE = "metrics.jsonl"


class Sink(Protocol):
    """A receiver of metric rows."""

    def row(self, row: Mapping[str, Any]) -> None:
        """Take one row: `kind`, `step` and values as in metrics.jsonl; None for what is not finite."""

    def close(self) -> None:
        """Write what is left and let go of files and connections."""


@register("sink", "jsonl")
class JsonlSink(MetricsFile):
    """Appends rows to `metrics.jsonl` of the run folder; rows after `after_step` are removed first. Further
    arguments are those of `MetricsFile`.
    """

    def __init__(self, folder: Path, after_step: int = 0, claim: Claim = UNCLAIMED, **more: Any) -> None:
        claim.check_place()
        claim.confirm()
        truncate_after(folder / METRICS_FILE, after_step, claim.confirm)
        super().__init__(folder / METRICS_FILE, claim, after_step, **more)

    def rewind(self, step: int) -> None:
        """Move the rows after `step` to logs/rewound.jsonl."""
        logs = self.path.parent / "logs"
        logs.mkdir(exist_ok=True)
        self.take_back(step, logs / "rewound.jsonl")


@register("sink", "tensorboard")
class TensorBoardSink:
    """Writes every number of a row as a scalar named `kind/name` to `logs/tensorboard`.

    Raises UserError when the extra `track` is not installed.
    """

    def __init__(self, folder: Path, after_step: int = 0, claim: Claim = UNCLAIMED) -> None:
        self._files = EventFiles(folder / "logs" / "tensorboard", after_step, claim)

    def rewind(self, step: int) -> None:
        """Take back what was written after `step`."""
        self._files.rewind(step)

    def row(self, row: Mapping[str, Any]) -> None:
        """Queue the row's numbers; values that are None are left out."""
        values = {
            f"{row['kind']}/{name}": float(value)
            for name, value in row.items()
            if name not in ("kind", "step") and isinstance(value, (bool, int, float))
        }
        self._files.add(row["step"], values)

    def flush(self) -> None:
        """Write the queued numbers, or keep them until that is possible."""
        self._files.flush()

    def close(self) -> None:
        """Write what is left."""
        self._files.close()


def open_sinks(
    wanted: Sequence[tuple[str, Mapping[str, Any]]],
    folder: Path,
    after_step: int = 0,
    claim: Claim = UNCLAIMED,
    warn: Callable[[str], None] = warnings.warn,
) -> list[Sink]:
    """The sinks of a run: `jsonl`, then the named ones.

    Args:
        wanted: name and options of those beside `jsonl`.
        folder, after_step: see the module text.
        claim: whether this process still holds the folder; HLAT's own sinks ask it before they write.
        warn: gets a line about a sink of another package that cannot be made, which is left out; for
            metrics.jsonl, see `MetricsFile`.

    Raises UserError for an unknown name (with the nearest one), or a sink whose package is missing.
    """
    makers = [(name, partial(lookup("sink", name, where="log.sinks"), **more)) for name, more in wanted]
    opened: list[Sink] = []
    try:
        for name, make in makers:
            if make.func is TensorBoardSink:
                make = partial(make, claim=claim)
            if (sink := _made(name, make, folder, after_step, warn)) is not None:
                opened.append(sink)
        # Last, as it drops rows, which must not happen when another one fails.
        return [JsonlSink(folder, after_step, claim, warn=warn), *opened[::-1]]
    except BaseException:
        for sink in opened:
            sink.close()
        raise


def _made(
    name: str, make: partial[Sink], folder: Path, after_step: int, warn: Callable[[str], None]
) -> Sink | None:
    """A sink; None where that of another package cannot be made, as a tracker that is away ends no run."""
    try:
        return make(folder, after_step)
    except UserError:
        raise
    except Exception as error:
        if is_own(make.func):
            raise
        warn(f"metric sink {name} cannot be opened ({type(error).__name__}: {error}); it gets no rows")
        return None


def is_own(kind: Any) -> bool:
    """Whether a class of sinks is HLAT's, so that its failures are the run's."""
    return str(kind.__module__).startswith("hlat.")
