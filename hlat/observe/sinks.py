"""Where metric rows go. `jsonl` is always there; `tensorboard` on request; other packages register their own.

A sink is made as `Sink(folder, after_step)`: the run folder and the step from which the run continues (0 for
a fresh one), so that it can drop what an earlier attempt wrote beyond that step. It has `row(dict)` and
`close()`. A method `flush()`, if there is one, is called after each window, `rewind(step)` when the run goes
back to the end of an earlier step, and `sync()` before a checkpoint: it returns once all rows are on the
disk, or an OSError that forbids the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from hlat.errors import missing_extra
from hlat.observe.claim import UNCLAIMED, Claim
from hlat.observe.jsonl import MetricsFile, truncate_after
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
        claim.confirm()
        truncate_after(folder / METRICS_FILE, after_step)
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

    def __init__(self, folder: Path, after_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise missing_extra("tensorboard", "track", "log.tensorboard") from error
        self._make: Any = SummaryWriter
        self._folder = str(folder / "logs" / "tensorboard")
        self._writer = self._make(self._folder, purge_step=after_step + 1 if after_step else None)

    def rewind(self, step: int) -> None:
        """Let what was written after `step` not be shown."""
        self._writer.close()
        self._writer = self._make(self._folder, purge_step=step + 1)

    def row(self, row: Mapping[str, Any]) -> None:
        """Add the row's numbers; values that are None are left out."""
        for name, value in row.items():
            if name not in ("kind", "step") and isinstance(value, (bool, int, float)):
                self._writer.add_scalar(f"{row['kind']}/{name}", float(value), row["step"])

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def open_sinks(
    names: Sequence[str],
    folder: Path,
    after_step: int = 0,
    claim: Claim = UNCLAIMED,
    warn: Callable[[str], None] | None = None,
) -> list[Sink]:
    """The sinks of a run: `jsonl`, then the named ones.

    Args:
        names: of those beside `jsonl`.
        folder, after_step: see the module text.
        claim, warn: for metrics.jsonl, see `MetricsFile`.

    Raises UserError for an unknown name (with the nearest one) or a sink whose package is missing.
    """
    wanted = [*(name for name in names if name != "jsonl"), "jsonl"]
    makers = [lookup("sink", name, where="log") for name in wanted]
    makers[-1] = partial(makers[-1], claim=claim, **({} if warn is None else {"warn": warn}))
    opened: list[Sink] = []
    try:
        for make in makers:  # jsonl last: it drops rows, which must not happen when another one fails
            opened.append(make(folder, after_step))
    except BaseException:
        for sink in opened:
            sink.close()
        raise
    return opened[::-1]
