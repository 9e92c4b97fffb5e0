"""What can be known of the runs of a sweep before the first of them starts: nobody shall wait for one run to
learn that the next one cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from hlat.errors import UserError

if TYPE_CHECKING:
    from hlat.commands.sweep import Trial

_MOST = 4  # things to say in one line


def refuse_unfit(trials: Sequence[Trial]) -> None:
    """Raise UserError where a run could not start on this machine: files or folders that are not here, tasks
    that there are not. What only reading a text shows, such as too few documents, shows when its run starts.
    """
    found = list(_unfit(trials))
    if not found:
        return
    count = len({name for name, _ in found})
    lines = list(dict.fromkeys(error.line() for _, error in found))
    more = f" (and {len(lines) - _MOST} more)" if len(lines) > _MOST else ""
    what = f"{count} of {len(trials)} runs cannot start: {'; '.join(lines[:_MOST])}{more}"
    raise UserError(what, where=f"run {found[0][0]}", fix="nothing was started")


def unfit_here(trials: Sequence[Trial]) -> Iterator[str]:
    """A line for each thing for which `hlat sweep` would refuse these runs on this machine; another one may
    run them.
    """
    said = set()
    for name, error in _unfit(trials):
        if error.line() not in said:
            said.add(error.line())
            yield f"run {name} cannot start here: {error.line()}"


def _unfit(trials: Sequence[Trial]) -> Iterator[tuple[str, UserError]]:
    """Name of a run, and why it could not start. Tasks of the same names are looked at once, as the harness
    takes seconds.
    """
    from hlat.data.presence import missing_paths
    from hlat.train.run import refuse_unsupported
    from hlat.train.tasks import check_names

    tasks: dict[object, UserError | None] = {}
    for trial in trials:
        recipe, evaluation = trial.recipe, trial.recipe.eval
        errors = [_error(recipe.accumulate), _error(partial(refuse_unsupported, recipe))]
        errors += [UserError(line) for line in missing_paths(recipe)]
        key = (evaluation.tasks, evaluation.limit)
        if key not in tasks:
            tasks[key] = _error(partial(check_names, recipe))
        yield from ((trial.folder.name, error) for error in (*errors, tasks[key]) if error is not None)


def _error(check: Callable[[], object]) -> UserError | None:
    try:
        check()
    except UserError as error:
        return error
    return None
