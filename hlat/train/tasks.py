"""The harness's tasks inside a run, on the weights where they lie: no second copy, in any layout.

Evaluating leaves nothing behind that training could notice: the weights are only read, random generators are
put back, and compiled blocks run as they were written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hlat.checkpoint.hf_generation import generation_defaults
from hlat.errors import UserError
from hlat.evaluate.job import run_with
from hlat.evaluate.live import LiveModel
from hlat.evaluate.results import notes
from hlat.evaluate.running import (
    Loaded,
    Selection,
    check_generation,
    check_tasks,
    load_tasks,
    numbers,
    run_tasks,
)
from hlat.evaluate.team import Team
from hlat.evaluate.text import codec_of_run
from hlat.parallel.pipeline import rank_parts

if TYPE_CHECKING:
    from hlat.recipe import Recipe
    from hlat.train.run import Run


def refuse_tasks(recipe: Recipe) -> None:
    """Raise UserError where a recipe asks for tasks that cannot run inside it."""
    if recipe.eval.tasks and recipe.model.classes:
        raise UserError(
            "a model with a classifier in place of its output head cannot continue texts",
            where="eval.tasks",
            fix="leave it empty, or write objective.by=words",
        )
    if recipe.eval.tasks and recipe.backend == "nxd":
        raise UserError(
            "backend nxd runs no tasks inside a run: its graphs have the shapes of training",
            where="eval.tasks",
            fix="leave it empty, and evaluate the checkpoints: hlat eval RUN --all-checkpoints --tasks …",
        )


def check_names(recipe: Recipe) -> None:
    """Raise UserError, before anything is built, for tasks that there are not or that may not run."""
    if recipe.eval.tasks:
        check_tasks(Selection(recipe.eval.tasks, limit=recipe.eval.limit, where="eval.tasks"))


class TaskEvaluation:
    """The tasks of `eval.tasks`, on a run.

    Args:
        run: built; its weights are read each time.
        beat: called now and then while tasks run.

    Raises UserError on the first rank for tasks that are not there or cannot be read.
    """

    def __init__(self, run: Run, beat: Callable[[], None]) -> None:
        recipe, backend = run.recipe, run.backend
        parts = rank_parts(recipe.model, backend.layout, backend.place, recipe.parallel.cuts)
        live = LiveModel(run.model, parts, backend)  # type: ignore[arg-type]
        codec = codec_of_run(run.data.tokenizer, run.provenance)
        defaults = generation_defaults({"huggingface": dict(run.provenance.files)})
        share = run.provenance.offline_share
        self.team = Team(live, codec, beat, generation=defaults, held_out=share)
        self._loaded: Loaded | None = None
        if self.team.first:
            selection = Selection(
                recipe.eval.tasks,
                limit=recipe.eval.limit,
                holdout=share,
                where="eval.tasks",
            )
            self._loaded = load_tasks(selection)
            check_generation(self.team, self._loaded)

    def __call__(self) -> dict[str, Any] | None:
        """`<task>/<metric>` and `<task>/<metric>_stderr` on the first rank, None on the others; a figure is
        None where the model's logits are not finite. With them what was cut, by its key in `NOTES`, and
        `notes`, the same in words. Every rank calls it.
        """
        values: dict[str, Any] | None = run_with(self.team, self._ask)
        return values

    def _ask(self) -> dict[str, Any]:
        assert self._loaded is not None
        values: dict[str, Any] = {}
        try:
            results = run_tasks(self.team, self._loaded, bootstrap=100)
        except UserError as failure:  # what depends on the weights must not end the run that trains them
            return {"notes": [failure.line()]}
        for task, metrics in numbers(results).items():
            for metric, (value, error) in metrics.items():
                values |= {f"{task}/{metric}": value, f"{task}/{metric}_stderr": error}
        values |= results["hlat"]["notes"]
        if lines := notes(results):
            values["notes"] = lines
        return values
