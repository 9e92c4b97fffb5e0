"""The training loop: steps, and around them metrics, evaluation, checkpoints and signals."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from hlat.backend.cluster import Cluster
from hlat.observe.metrics import MetricBuffer
from hlat.observe.watchdog import Watchdog
from hlat.train.evaluate import evaluate
from hlat.train.memory import peak_bytes, persistent_bytes
from hlat.train.replicas import verify
from hlat.train.run import Run
from hlat.train.saves import Saves
from hlat.train.step import train_step

_MARGIN = 15  # seconds by which collectives outlast the watchdog, whose report says more


class Signals:
    """Turns SIGTERM and the first Ctrl-C into "save and stop after this step"; a second Ctrl-C interrupts at
    once.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def _note(self, number: int, _frame: Any) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    @contextmanager
    def watch(self) -> Iterator[Signals]:
        """Handle the signals inside; put the former handlers back after."""
        former = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


class StopVote:
    """Lets all ranks stop after the same step, whichever of them were told to and when.

    A signal reaches ranks at different times, and a rank that stopped alone would leave the others waiting
    for it. So each step begins an exchange of what was received so far, and ends by reading it.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._group = cluster.stop
        self._number = torch.zeros(1, dtype=torch.int32)

    def begin(self, received: int | None) -> None:
        """Give this rank's vote: a signal's number, or None to go on. Returns at once."""
        self._number.fill_(received or 0)
        self._pending = self._group.start_all_reduce(self._number, "max")

    def result(self) -> int | None:
        """The signal to stop for, the same on every rank; None to go on."""
        self._pending.wait()
        return int(self._number) or None


class GuardWatch:
    """A metric sink that lets the guard stop the run. Give it last: other sinks have the row by then."""

    def __init__(self, guard: Any) -> None:
        self.guard = guard

    def row(self, row: Mapping[str, Any]) -> None:
        """Show a row's count of skips in a row to the guard. Raises TrainingStopped when it gives up."""
        self.guard.check(row.get("skips_in_a_row") or 0)

    def close(self) -> None:
        """Nothing to close."""


class Loop:
    """Drives a run to its last step.

    Args:
        run: built, and restored if it continues.
        metrics: receives every step's scalars.
        saves: keeps the state.
        on_checkpoint: told of a checkpoint's step once it is complete.
        cluster: the ranks that train together; each of them runs a loop.
        watchdog: told where the loop is.
        tasks: runs the tasks of `eval.tasks`; returns their figures on the first rank.
    """

    def __init__(
        self,
        run: Run,
        metrics: MetricBuffer,
        saves: Saves,
        on_checkpoint: Callable[[int], None] = lambda step: None,
        *,
        cluster: Cluster | None = None,
        watchdog: Watchdog | None = None,
        tasks: Callable[[], Mapping[str, float] | None] | None = None,
    ) -> None:
        self.run, self.metrics, self.saves = run, metrics, saves
        self.on_checkpoint = on_checkpoint
        self.tasks = tasks
        self.cluster, self.watchdog = cluster or Cluster(), watchdog or Watchdog()
        self._persistent = persistent_bytes(run)
        self.last_step = run.recipe.run.stop_at_step or run.recipe.run.steps
        self._saved: int | None = run.step or None
        self._timeouts_are_long = self.cluster.world > 1
        self.held_out: dict[str, Any] | None = None

    def train(self) -> int | None:
        """Train to the last step, save and evaluate. Returns the signal that stopped it early, or None."""
        stop, vote = None, StopVote(self.cluster)
        with Signals().watch() as signals, manual_collection() as collector:
            self.metrics.start()
            while self.run.step < self.last_step and stop is None:
                vote.begin(signals.received)
                self.one_step()
                collector()
                stop = vote.result() if self.cluster.world > 1 else signals.received
            self.metrics.flush()
            self.save(wait=True)
            if stop is None and self.held_out is None and self.run.data.holdout.documents:
                self.watchdog.beat(self.run.step, "evaluation")
                self.held_out = evaluate(self.run)  # to show; its row belongs to eval.every and the last step
            self._beat_save(patient=True)
            self.saves.finish(stopped=stop is not None)
        return stop

    def one_step(self) -> None:
        """One training step and whatever is due after it."""
        run, recipe = self.run, self.run.recipe
        self.watchdog.beat(run.step + 1, "training")
        rate = run.learning_rate()
        values = train_step(run)
        self.metrics.add(run.step, {"lr": rate, **values}, self._figures())
        if self._timeouts_are_long:
            self._shorten_timeouts()
        self.held_out = None
        if recipe.parallel.verify_every and run.step % recipe.parallel.verify_every == 0:
            self.verify()
        if run.step == recipe.run.steps or (recipe.eval.every and run.step % recipe.eval.every == 0):
            self.evaluate()
        due = run.step % recipe.checkpoint.every == 0
        if (due or self.saves.retry_due()) and run.step != self.last_step:  # `train` saves that
            self.save()
        self._note_saved()

    def _figures(self) -> dict[str, int | None]:
        """What the host knows of a step: memory, and how many examples went through the model so far."""
        run = self.run
        figures = {
            "memory/persistent_bytes": self._persistent,
            "memory/peak_bytes": peak_bytes(run.backend.device),
        }
        if hasattr(run.method, "queries"):
            figures["method/queries"] = run.method.queries(run.recipe, run.step)
        return figures

    def verify(self) -> None:
        """Compare the ranks' weights. Comes before the checkpoint: what differs is never saved."""
        self.watchdog.beat(self.run.step, "comparison of replicas")
        with self.metrics.paused():
            verify(self.run, [str(member) for member in self.cluster.members], self.cluster.exchange)

    def _shorten_timeouts(self) -> None:
        """The first step, which may compile and read much, is over."""
        self.run.backend.synchronize()  # a GPU's step is only queued, and may wait for a rank that compiles
        self._timeouts_are_long = False
        seconds = self.run.recipe.parallel.timeout
        self.watchdog.limit = seconds
        self.cluster.shorten_timeouts(seconds + _MARGIN)

    def evaluate(self) -> None:
        """Held-out loss and tasks at this step. Before the checkpoint, so that rows survive a resume."""
        if self.run.data.holdout.documents:
            self.watchdog.beat(self.run.step, "evaluation")
            with self.metrics.paused():
                self.held_out = evaluate(self.run)
            self.metrics.eval(self.run.step, self.held_out)
        if self.tasks is not None:
            self.watchdog.beat(self.run.step, "evaluation", patient=True)
            with self.metrics.paused():
                figures = self.tasks()
            if figures is not None:
                tokens = self.run.step * self.run.recipe.tokens_per_step
                self.metrics.eval(self.run.step, {"tokens": tokens, **figures}, kind="tasks")

    def save(self, wait: bool = False) -> None:
        """Save this step's state, once; `wait` until it is complete on the disk."""
        run = self.run
        if wait:
            self._beat_save(patient=True)
        if self._saved != run.step or (wait and not self.saves.wait()):
            self._saved = run.step
            # Rows first: a checkpoint never covers a step whose row a crash could lose.
            with self.metrics.paused():
                self.saves.save(run, wait, self.metrics.trouble, lambda: self._beat_save(wait))
        self._note_saved()

    def _beat_save(self, patient: bool) -> None:
        self.watchdog.beat(self.run.step, "checkpoint", patient=patient)

    def _note_saved(self) -> None:
        step = self.saves.completed(self.run.step)
        if step is not None:
            self.on_checkpoint(step)


@contextmanager
def manual_collection(every: int = 1000) -> Iterator[Callable[[], None]]:
    """Collect garbage between steps, at a known time: a pause inside one would stall all ranks."""
    was_enabled, count = gc.isenabled(), 0

    def collector() -> None:
        nonlocal count
        count += 1
        if count == 1:
            gc.collect()
            gc.freeze()  # what set-up made lives as long as the run
            gc.disable()
        elif count % every == 0:
            gc.collect(1)

    try:
        yield collector
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
