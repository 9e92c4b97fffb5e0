"""The training loop: steps, and around them metrics, evaluation, checkpoints and signals."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from hlat.backend.cluster import Cluster
from hlat.errors import TrainingStopped
from hlat.observe.heartbeat import FIRST_STEP, STEP
from hlat.observe.metrics import MetricBuffer
from hlat.observe.stopping import REBALANCE, WALLTIME, Asked, Deadline, Signals
from hlat.observe.watchdog import Watchdog
from hlat.train import state
from hlat.train.anomalies import GoBack
from hlat.train.evaluate import evaluate
from hlat.train.guard import GO_ON
from hlat.train.memory import peak_bytes, persistent_bytes
from hlat.train.replicas import verify
from hlat.train.run import Run
from hlat.train.saves import Saves
from hlat.train.step import train_step

_MARGIN = 15  # seconds by which collectives outlast the watchdog, whose report says more


class StopVote:
    """Lets all ranks stop after the same step, whichever of them were told to and when.

    A signal reaches ranks at different times, and a rank that stopped alone would leave the others waiting
    for it. So each step begins an exchange of what was received so far, and ends by reading it.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._group = cluster.stop
        self._number = torch.zeros(1, dtype=torch.int32)

    def begin(self, received: int | None) -> None:
        """Give this rank's vote: a cause (see `hlat.observe.stopping`), or None to go on. Returns at
        once.
        """
        self._number.fill_(received or 0)
        self._pending = self._group.start_all_reduce(self._number, "max")

    def result(self) -> int | None:
        """The cause to stop for, the same on every rank; None to go on."""
        self._pending.wait()
        return int(self._number) or None


class Loop:
    """Drives a run to its last step.

    Args:
        run: built, and restored if it continues.
        metrics: receives every step's scalars.
        saves: keeps the state.
        on_checkpoint: told of a checkpoint's step once it is complete.
        warn: receives a line about what may be wrong.
        signals: requests to stop.
        deadline: when the job's time is over.
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
        warn: Callable[[str], None] = lambda line: None,
        signals: Signals | None = None,
        deadline: Deadline | None = None,
        cluster: Cluster | None = None,
        watchdog: Watchdog | None = None,
        tasks: Callable[[], Mapping[str, float] | None] | None = None,
    ) -> None:
        self.run, self.metrics, self.saves = run, metrics, saves
        self.on_checkpoint, self.warn = on_checkpoint, warn
        self.tasks = tasks
        self.signals = signals or Signals()
        self.deadline = deadline or Deadline(None, run.recipe.checkpoint.grace)
        self.cluster, self.watchdog = cluster or Cluster(), watchdog or Watchdog()
        for times in (self.watchdog.pace, self.deadline):
            times.window(run.recipe.log.every)
        self._persistent = persistent_bytes(run)
        self.last_step = run.recipe.run.stop_at_step or run.recipe.run.steps
        self._saved: int | None = run.step or None
        self._stepped = False
        self._save_began, self._steps_done = 0.0, 0
        self._needed = 0.0  # seconds between a signal and a complete save, the most so far
        self._timeouts_are_long = self.cluster.world > 1
        self.held_out: dict[str, Any] | None = None

    def train(self) -> int | None:
        """Train to the last step, save and evaluate. Returns the cause that stopped it early, or None."""
        stop = None
        self.metrics.start()
        self._begin()
        with manual_collection() as collector:
            while self.run.step < self.last_step and stop is None:
                stop = self._steps(collector)
                self._attempt(self._finish)
        self.signals.hold()
        if self.run.step == self.last_step and not self.run.tasks_due:
            stop = None  # nothing is left to do
        if stop is None and self.held_out is None and self.run.data.holdout.documents:
            self._evaluate_held_out()  # nothing was left to do: to show, and for a row that is missing
        self._beat_save(patient=True)
        self.saves.finish(stop is not None, lambda: self._beat_save(patient=True))
        return stop

    def _begin(self) -> None:
        """What comes before the first step: tasks that a stop cut short; a state to go back to, if the guard
        may want one.
        """
        if self.run.tasks_due:
            self._run_tasks()
            self._saved = None  # they are done: say so in the checkpoint
            self.save()
        elif self.run.step == 0 and hasattr(self.run.guard, "steps_back"):
            self.save()

    def _steps(self, collector: Callable[[], None]) -> int | None:
        """Steps until the last one, or until all ranks agree to stop; then returns the cause."""
        stop, vote = None, StopVote(self.cluster)
        while self.run.step < self.last_step and stop is None:
            began = time.monotonic()
            vote.begin(self._asked(2))  # the step that begins, and the next one if this stops nothing
            if self._attempt(self.one_step):
                self._note_time(time.monotonic() - began)
            collector()
            stop = vote.result() if self.cluster.world > 1 else self._asked(1)
            if stop == REBALANCE:
                stop = None
                self._attempt(self.save)
                self.signals.done(REBALANCE)
        return stop

    def _finish(self) -> None:
        """Rows and state of the last step done."""
        self.metrics.flush()
        self.save(wait=True)

    def _attempt(self, action: Callable[[], None]) -> bool:
        """Do what may fetch metrics. Returns False where they showed bad steps and the run went back."""
        try:
            action()
        except GoBack as bad:
            self._go_back(bad)
            return False
        return True

    def _asked(self, steps: int) -> int | None:
        """The cause to stop for that this rank knows of, looking ahead so many steps."""
        ahead = [self._evaluates(self.run.step + 1 + n) for n in range(steps)]
        return self.signals.received or (WALLTIME if self.deadline.due(ahead) else None)

    def _evaluates(self, step: int) -> bool:
        """Whether a step ends with an evaluation: the one this start ends with always does."""
        return step == self.last_step or self._runs_tasks(step)

    def _runs_tasks(self, step: int) -> bool:
        """Whether tasks belong to a step; before `run.steps` they may take too long for a mere stop."""
        recipe = self.run.recipe
        return step == recipe.run.steps or bool(recipe.eval.every and step % recipe.eval.every == 0)

    def _note_time(self, seconds: float) -> None:
        """How long the step just done took. The first one, which may compile, is like no other."""
        if self._steps_done:
            self.deadline.step(seconds, self._evaluates(self.run.step))
        self._steps_done += 1

    def one_step(self) -> None:
        """One training step and whatever is due after it."""
        run, recipe = self.run, self.run.recipe
        self.watchdog.beat(run.step + 1, STEP if self._stepped else FIRST_STEP)
        rate = run.learning_rate()
        values = train_step(run)
        self._stepped = True
        self.metrics.add(run.step, {"lr": rate, **values}, self._figures())
        if self._timeouts_are_long:
            self._shorten_timeouts()
        self.signals.hold()  # from here on, in this step's evaluation too, there is something to save
        self.held_out = None
        if recipe.parallel.verify_every and run.step % recipe.parallel.verify_every == 0:
            self.verify()
        if self._evaluates(run.step):
            self.evaluate()
        due = run.step % recipe.checkpoint.every == 0
        if (due or self.saves.retry_due()) and run.step != self.last_step:  # `train` saves that
            self.save()
        self._note_saved()
        self.watchdog.beat(run.step + 1, STEP)  # the wait for the others belongs to the next step

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

    def _go_back(self, bad: GoBack) -> None:
        """Continue from the newest checkpoint before the bad steps, without their data. All ranks do so.

        Raises TrainingStopped when that has been done too often, or there is no such checkpoint.
        """
        run = self.run
        guard, former = run.guard, run.skips
        number = former.position(bad.last)
        first, last = former.position(bad.first) - guard.before, number + guard.after
        facts: dict[str, Any] = {"data_step": number}
        try:
            near = former.near(first, last, guard.within)
            if len(near) >= guard.rewinds:
                raise TrainingStopped(
                    f"step {bad.last} is bad, and the run has gone back {len(near)} times for data within "
                    f"{guard.within} steps",
                    where="guard.rewinds",
                    fix=GO_ON,
                )
            self.watchdog.beat(run.step, "rewinding", patient=True)
            self._restore_before(max(1, bad.first - guard.before))
        except TrainingStopped:
            bad.watch.report("stop", bad.row, **facts)
            raise
        first = max(first, former.position(run.step) + 1)
        run.skips = former.add(first, last)
        self.metrics.rewind(run.step)
        facts |= {"skipped_data": [first, last], "checkpoint": run.step}
        bad.watch.report("rewind", bad.row, step=run.step + 1, **facts)

    def _restore_before(self, step: int) -> None:
        """Put the state of the newest checkpoint before a step into the run. Only one that left out the same
        data counts: there may be some from before the run went back the last time.
        """
        run, before = self.run, step
        self.saves.wait()
        self._note_saved()
        while (found := self.saves.find(before)) is not None and not state.same_course(run, found.meta):
            before = found.step
        if found is None:
            raise TrainingStopped(
                f"a step from {step} on is bad, and no checkpoint before it is left",
                where="guard.name: rewind",
                fix="raise checkpoint.keep",
            )
        self.saves.restore(run, found)
        self._saved, self.held_out = run.step, None

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
            self._evaluate_held_out()
        if self._runs_tasks(self.run.step):
            self._run_tasks()

    def _evaluate_held_out(self) -> None:
        """Held-out loss at this step; its row is written once, by whichever start comes first."""
        self.watchdog.beat(self.run.step, "evaluation")
        with self.metrics.paused():
            self.held_out = evaluate(self.run)
        if self.metrics.evaluated != self.run.step:
            stop = {} if self._runs_tasks(self.run.step) else {"stop": True}  # an undisturbed run has none
            self.metrics.eval(self.run.step, {**self.held_out, **stop})

    def _run_tasks(self) -> None:
        """The tasks at this step. Where a stop cuts them short they are due when the run continues."""
        self.run.tasks_due = self.tasks is not None
        if self.tasks is None:
            return
        self.watchdog.beat(self.run.step, "evaluation", patient=True)
        try:
            with self.metrics.paused():
                figures = self.tasks()
        except Asked:
            return
        self.run.tasks_due = False
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
                self.saves.wait()  # for the save before this one, which is told before the next begins
                self._note_saved()
                self._save_began = time.monotonic()
                self.saves.save(run, wait, self.metrics.trouble, lambda: self._beat_save(wait))
        self._note_saved()

    def _beat_save(self, patient: bool) -> None:
        self.watchdog.beat(self.run.step, "checkpoint", patient=patient)

    def _note_saved(self) -> None:
        step = self.saves.completed(self.run.step)
        if step is not None:
            self.on_checkpoint(step)
            self._note_save_time(time.monotonic() - self._save_began)

    def _note_save_time(self, seconds: float) -> None:
        """Warn, once, where a signal leaves too little time for a save."""
        step, grace = self.deadline.longest(), self.run.recipe.checkpoint.grace
        if seconds + step > grace >= self._needed:
            self.warn(
                f"a checkpoint took {seconds:.1f} s and a step {step:.1f} s, more than the {grace:g} s of "
                "checkpoint.grace: after a signal the newest checkpoint may be all that is left"
            )
        self._needed = max(self._needed, seconds + step)
        self.deadline.save(seconds)


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
            gc.collect()  # all generations: what is alive now and becomes garbage later is in the oldest

    try:
        yield collector
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
