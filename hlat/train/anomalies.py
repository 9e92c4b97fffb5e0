"""Bad steps (loss or norm not finite or far off): noticed in the metrics, recorded, handed to the guard.

The update of a bad step has been skipped on the device. What else happens is decided here, on every rank
alike, as all of them fetch the same metrics at the same step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlat.checkpoint.nxd import NxdFolder
from hlat.errors import FolderLost, TrainingStopped, UserError
from hlat.observe.claim import UNCLAIMED, Claim
from hlat.observe.failures import say
from hlat.observe.jsonl import append, encode
from hlat.observe.metrics import Interruption
from hlat.observe.skipped import wrong_skips
from hlat.train.guard import SkipGuard

if TYPE_CHECKING:
    from hlat.checkpoint.reader import Checkpoint
    from hlat.train.run import Run

FILE = "anomalies.jsonl"


class GoBack(Interruption):
    """The guard wants steps taken back.

    Attributes:
        first, last: the bad steps, as metrics count them.
        row: metrics of the last one.
        watch: what reports of it.
    """

    def __init__(self, first: int, last: int, row: Mapping[str, Any], watch: GuardWatch) -> None:
        super().__init__(f"steps {first} to {last}")
        self.first, self.last, self.row, self.watch = first, last, row, watch


class GuardWatch:
    """A metric sink that shows bad steps to the guard. Give it last: other sinks have the rows by then.

    Args:
        run: its guard judges, its data says what a bad batch held.
        logs: the folder for anomalies.jsonl; None on a rank that records nothing.
        claim: asked before something is recorded.

    `send` gives a row to all sinks.
    """

    def __init__(self, run: Run, logs: Path | None = None, claim: Claim = UNCLAIMED) -> None:
        self.run, self.logs, self.claim = run, logs, claim
        self.send: Callable[[Mapping[str, Any]], None] = lambda row: None

    def row(self, row: Mapping[str, Any]) -> None:
        """Take a row. Raises TrainingStopped when the guard gives up, GoBack when it takes steps back."""
        if row.get("kind") != "train":
            return
        guard = self.run.guard
        try:
            guard.check(row.get("skips_in_a_row") or 0)
        except TrainingStopped:
            self.report("stop", row)
            raise
        if not row.get("skipped"):
            return
        last = int(row["step"])
        back = guard.steps_back(row) if hasattr(guard, "steps_back") else 0
        if back:
            raise GoBack(last - back + 1, last, row, self)
        self.report("skip", row)

    def close(self) -> None:
        """Nothing to close."""

    def report(self, policy: str, row: Mapping[str, Any], *, step: int | None = None, **more: Any) -> None:
        """Record a bad step and what is done about it, in the metrics and, with the documents of its batch,
        in anomalies.jsonl.

        Args:
            policy: skip, rewind or stop.
            row: its metrics.
            step: where the row belongs among the metrics; default: the bad step.
            more: further values of the row.
        """
        if self.logs is None:
            return
        bad = int(row["step"])
        facts = {
            "policy": policy,
            "bad_step": bad,
            "data_step": self.run.skips.position(bad),
            "loss": row.get("loss"),
            "grad_norm": row.get("grad_norm"),
            **more,
        }
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        try:
            self.logs.mkdir(exist_ok=True)
            entry = {
                "time": stamp,
                "step": bad,
                **facts,
                "documents": self.run.data.locate(facts["data_step"]),
                **({"by": self.claim.name} if self.claim.name else {}),
            }
            self.claim.confirm()
            append(self.logs / FILE, encode(entry))
        except FolderLost:
            raise
        except (OSError, UserError) as error:  # the record is not worth the run
            say(f"hlat: warning: {error}")
        self.send({"kind": "anomaly", "step": bad if step is None else step, **facts})


def wrong_skips_text(run: Run, folder: Path, saved: Checkpoint | NxdFolder) -> str:
    """What an earlier version's guard did to the run that continues here, as far as it is known; empty where
    it did nothing.

    Args:
        run: restored.
        folder: of the run; its rows are those of all steps done before, also after `saved`.
        saved: what the run continues from.
    """
    guard = run.recipe.guard
    found = wrong_skips(folder, {"name": guard.name, **guard.options})
    lines = [text] if (text := found.text(run.step)) else []
    if not isinstance(run.guard, SkipGuard) or isinstance(saved, NxdFolder):
        return "; ".join(lines)
    misjudged = run.guard.sigma > 0 and float(saved.read("guard/seen")) >= 2 * run.guard.window
    if misjudged:  # only a guard that divided by all steps counted as far
        unknown = run.step - int(saved.read("run/updates")) - sum(step <= run.step for step in found.rows)
        if unknown > 0:
            lines.append(
                f"{unknown:,} updates were skipped whose metrics are not in {folder}: an earlier version's "
                "guard, which misjudged what comes after its first window, may have had no reason"
            )
    return "; ".join(lines)
