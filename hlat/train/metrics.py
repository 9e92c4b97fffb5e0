"""Where the figures of each step of a run go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlat.model.flops import flops_per_token
from hlat.observe.jsonl import read_rows
from hlat.observe.metrics import MetricBuffer
from hlat.observe.peak import peak_flops
from hlat.observe.sinks import open_sinks
from hlat.train.anomalies import GuardWatch, wrong_skips_text
from hlat.train.describe import banner

if TYPE_CHECKING:
    from hlat.checkpoint.nxd import NxdFolder
    from hlat.checkpoint.reader import Checkpoint
    from hlat.observe.console import Console
    from hlat.observe.runfolder import RunFolder
    from hlat.train.run import Run


def open_metrics(
    run: Run,
    folder: RunFolder,
    saved: Checkpoint | NxdFolder | None,
    console: Console | None,
    compiled: str,
    began: str = "",
) -> MetricBuffer:
    """The metrics of a run that is ready to train. Rank 0 has the console (and gives it the banner) and the
    sinks; the guard looks on every rank.

    Args:
        saved: what the run continues from.
        console: None on every rank but the first.
        compiled, began: for the banner: whether it is compiled and why; what it started from.
    """
    recipe = run.recipe
    guard = GuardWatch(run, None if console is None else folder.logs, folder.claim)
    if console is None:
        return MetricBuffer([guard], every=recipe.log.every)
    peak = peak_flops(run.backend.device, next(run.model.parameters()).dtype)
    console.start(run.step, mfu_note=str(peak) if peak else "", every=recipe.log.every)
    console.banner(banner(run, folder.path, saved, compiled, peak, began))
    if saved is not None and (line := wrong_skips_text(run, folder.path, saved)):
        console.warn(line)  # now: the rows after this checkpoint are removed below
    wanted: list[tuple[str, dict[str, Any]]] = [("tensorboard", {})] if recipe.log.tensorboard else []
    wanted += [(sink.name, sink.options) for sink in recipe.log.sinks]
    sinks = open_sinks(wanted, folder.path, run.step, folder.claim, console.warn)
    work = run.method.work(recipe) if hasattr(run.method, "work") else 1.0
    every_token = getattr(run.objective, "every_token", True)
    buffer = MetricBuffer(
        [console, *sinks, guard],
        every=recipe.log.every,
        tokens_per_step=recipe.tokens_per_step,
        flops_per_token=work * flops_per_token(recipe.model, recipe.data.seq_len, head=every_token),
        peak_flops=peak.flops * run.backend.world if peak else None,
    )
    guard.send, buffer.evaluated = buffer.event, _evaluated(folder.metrics)
    return buffer


def _evaluated(metrics: Path) -> int | None:
    """The step of the last evaluation that a metrics file has a row of."""
    try:
        return max((row["step"] for row in read_rows(metrics) if row.get("kind") == "eval"), default=None)
    except (OSError, KeyError, TypeError):
        return None
