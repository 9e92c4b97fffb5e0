"""Running the harness's tasks on a team: which there are, which may run, and what came of them."""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
import os
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlat.errors import UserError
from hlat.evaluate.harness import BATCH_SIZE, lm_class, require_harness
from hlat.evaluate.options import read_generation
from hlat.evaluate.statistics import error_known, ratio
from hlat.evaluate.surroundings import own_environment
from hlat.paths import expand, kind_of

if TYPE_CHECKING:
    from hlat.evaluate.team import Team

TASKS = Path(__file__).with_name("tasks")
OWN = "hlat-"
PAPER = "hlat-paper"
ALLOW_CODE = "--allow-code-execution"
_UNKNOWN = "N/A"  # the harness's word for an error that is not known


@dataclass(frozen=True)
class Selection:
    """What to evaluate.

    tasks: names of tasks, groups and tags, or paths of task files.
    num_fewshot: examples before each question; None = as each task says.
    limit: questions of each task at most.
    include: folder of more task files.
    allow_code: whether tasks may run code that the model wrote.
    holdout: fraction of the documents that HLAT's own tasks ask about; None = what they take by themselves.
    where: the option or recipe key that names the tasks, for error messages.
    chat: name of the model's chat template that questions are put into, "" for its default one; None = none.
    multiturn: with a chat template, whether each example is a turn of the conversation.
    system: text of a system message, or, without a chat template, before each question.
    """

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    limit: int | None = None
    include: str | None = None
    allow_code: bool = False
    holdout: float | None = None
    batch_size: int = BATCH_SIZE
    where: str = "--tasks"
    chat: str | None = None
    multiturn: bool = True
    system: str | None = None

    @property
    def local(self) -> bool:
        """Whether HLAT's own local tasks alone are asked for."""
        return all(name.startswith(OWN) and name != PAPER for name in self.tasks)


@dataclass
class Loaded:
    """Tasks with their questions, as the harness's objects."""

    selection: Selection
    objects: list[Any]
    manager: Any


def go_offline(selection: Selection) -> None:
    """Keep the libraries of the hub off the network where local tasks alone are asked for, and their progress
    bars off the terminal. They read this when they are imported.
    """
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if selection.local:
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")


def load_tasks(selection: Selection) -> Loaded:
    """Find the tasks and read their questions.

    Raises UserError: no harness, an unknown task (with the nearest name), a task that runs generated code
    without leave, questions that cannot be read, a task without questions.
    """
    go_offline(selection)
    require_harness()
    with _quiet():
        manager = _find(selection)
        if selection.allow_code:
            os.environ.setdefault("HF_ALLOW_CODE_EVAL", "1")
        objects = [item for name in selection.tasks for item in _load(manager, name, selection.where)]
    return Loaded(selection, objects, manager)


def check_tasks(selection: Selection) -> None:
    """Raise UserError for what `load_tasks` refuses by name: no question is read, no network asked."""
    go_offline(selection)
    require_harness()
    with _quiet():
        _find(selection)


def _find(selection: Selection) -> Any:
    """The harness's manager, which knows all of the tasks, and that they may run. Raises UserError."""
    from lm_eval.tasks import TaskManager

    folders, options = _folders(selection.include), {"metadata": _metadata(selection)}
    # The harness reads thousands of files to know its own tasks: only where they are asked for.
    manager = TaskManager(include_path=folders, include_defaults=False, **options)
    unknown = [name for name in selection.tasks if not _known(manager, name, selection.where)]
    if paths := [name for name in unknown if "/" in name]:
        raise UserError(f"no such task file: '{paths[0]}'", where=selection.where)
    if not all(name.startswith(OWN) for name in unknown):
        manager = TaskManager(include_path=folders, **options)
    for name in selection.tasks:
        _check_name(manager, name, selection.where)
    _check_safety(manager, selection)
    return manager


def run_tasks(team: Team, loaded: Loaded, bootstrap: int = 1000) -> dict[str, Any]:
    """Evaluate; only the first rank of a team calls it, while the others serve.

    Args:
        bootstrap: resamples for the standard error of metrics that are no means.

    Returns:
        What the harness's `simple_evaluate` returns, with `samples`, and beside it `hlat`: notes on what was
        cut, why tasks have no figure (`left_out`; theirs are None), the level of chance of each task that has
        one, and whether the tokenizer's chat template was `applied`, `not applied`, or there is `none`.
    """
    from lm_eval import simple_evaluate

    selection = loaded.selection
    model = lm_class()(pretrained=team, batch_size=selection.batch_size, collect=True)
    if selection.chat is not None:
        model.chat_template(selection.chat or True)
    check_generation(team, loaded)
    with _quiet(), same_random_state():
        try:
            results: dict[str, Any] = simple_evaluate(
                model=model,
                tasks=list(loaded.objects),
                num_fewshot=selection.num_fewshot,
                batch_size=selection.batch_size,
                limit=selection.limit,
                task_manager=loaded.manager,
                bootstrap_iters=bootstrap,
                confirm_run_unsafe_code=selection.allow_code,
                log_samples=True,
                apply_chat_template=selection.chat is not None,
                fewshot_as_multiturn=selection.multiturn and selection.chat is not None,
                system_instruction=selection.system,
            )
        except OverflowError as error:  # the harness's exp of a perplexity
            what = f"a task's figure is too large for a number ({error})"
            raise UserError(what, where=selection.where, fix="ask for bits per byte instead") from error
    results["config"]["model"] = "hlat"
    chat = "none" if team.chat is None else "not applied" if selection.chat is None else "applied"
    results["hlat"] = {**model.said(), "chance": _chances(results), "chat_template": chat}
    results["hlat"]["left_out"] = _leave_out(results, model.broken)
    _add_bits_errors(results)
    _drop_unknown_errors(results)
    return results


def check_generation(team: Team, loaded: Loaded) -> None:
    """Raise UserError for a task that asks for a generation that is not supported, before any is asked."""
    longest = team.live.config.max_seq_len
    for item in loaded.objects:
        for task in item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item]:
            if task.OUTPUT_TYPE == "generate_until":
                read_generation(task.config.generation_kwargs or {}, longest, team.generation)


def left_out(results: dict[str, Any]) -> dict[str, str]:
    """Task or group -> why it has no figure."""
    reasons: dict[str, str] = results.get("hlat", {}).get("left_out", {})
    return reasons


def _leave_out(results: dict[str, Any], broken: Mapping[str, Collection[int]]) -> dict[str, str]:
    """Take away the figures of tasks with answers that are not finite, and of the groups these are in: what
    the harness makes of such answers (the first choice is the best) says nothing. Returns the reasons.
    """
    reasons = {}
    for task, questions in broken.items():
        total = results["n-samples"][task]["effective"]
        reasons[task] = f"the model's logits are not finite for {len(questions)} of {total} questions"
    members: dict[str, list[str]] = results.get("group_subtasks", {})
    for _ in members:  # groups of groups
        for group, names in members.items():
            if group not in reasons and (bad := [name for name in names if name in reasons]):
                reasons[group] = f"{bad[0]} has no figure"
    for part in ("results", "groups"):
        for task in reasons.keys() & results.get(part, {}).keys():
            values = results[part][task]
            values |= {key: None for key, v in values.items() if "," in key and isinstance(v, int | float)}
    return {task: reason for task, reason in reasons.items() if task in {*results["results"], *members}}


def _drop_unknown_errors(results: dict[str, Any]) -> None:
    """Take away the standard errors of which so few questions say nothing."""
    for part in ("results", "groups"):
        for task, values in results.get(part, {}).items():
            count = _questions(results, task)
            for key, error in values.items():
                if key.partition(",")[0].endswith("_stderr") and isinstance(error, int | float):
                    values[key] = _UNKNOWN if error_known(error, count) is None else error


def _questions(results: dict[str, Any], name: str) -> int:
    """How many questions a task or a group asked."""
    known, members = results.get("n-samples", {}), results.get("group_subtasks", {})
    if name in known:
        return int(known[name]["effective"])
    return sum(_questions(results, member) for member in members.get(name, ()) if member != name)


Figure = tuple[float | None, float | None]


def numbers(results: dict[str, Any]) -> dict[str, dict[str, Figure]]:
    """Task or group -> metric -> (value, standard error), out of the harness's results. The error is None
    where it is not known, both are where there is no figure.
    """
    table: dict[str, dict[str, Figure]] = {}
    for task, values in {**results.get("results", {}), **results.get("groups", {})}.items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            number = value is None or isinstance(value, int | float)
            if not filtered or metric.endswith("_stderr") or not number:
                continue
            error = _finite(values.get(f"{metric}_stderr,{filtered}"))
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            value = _finite(value)
            table.setdefault(task, {})[name] = value, None if value is None else error
    return table


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@contextlib.contextmanager
def same_random_state() -> Iterator[None]:
    """Put Python's, numpy's and torch's generators back: the harness seeds them."""
    import numpy as np
    import torch

    former = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(former[0])
        np.random.set_state(former[1])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's log: what matters is in the results, or becomes an error."""
    logger = logging.getLogger("lm_eval")
    former, disabled = logger.level, logging.root.manager.disable
    logger.setLevel(logging.CRITICAL)
    logging.disable(logging.WARNING)
    try:
        with own_environment():
            yield
    finally:
        logger.setLevel(former)
        logging.disable(disabled)


def _folders(include: str | None) -> list[str]:
    """HLAT's own task files, and the user's, which may override them."""
    return [str(TASKS), *([include] if include else [])]


def _metadata(selection: Selection) -> dict[str, Any]:
    """What every task is told: one of another name, or in a file of the user's, may ask HLAT's questions."""
    return {} if selection.holdout is None else {"holdout": selection.holdout}


def _known(manager: Any, name: str, where: str) -> bool:
    return name in manager.task_index or kind_of(expand(name, where), where) == "file"


def _check_name(manager: Any, name: str, where: str) -> None:
    if _known(manager, name, where):
        return
    near = difflib.get_close_matches(name, manager.all_tasks, 1)
    raise UserError(
        f"unknown task '{name}'",
        where=where,
        fix=f"did you mean '{near[0]}'?" if near else "`lm_eval ls tasks` lists the harness's tasks",
    )


def _check_safety(manager: Any, selection: Selection) -> None:
    """Refuse tasks that run code, found without loading any task: loading may run code already."""
    import datasets

    unsafe = next((n for n, c in _members(manager, selection.tasks) if c.get("unsafe_code")), None)
    if unsafe and not selection.allow_code:
        raise UserError(
            f"task '{unsafe}' runs code that the model writes",
            where=selection.where,
            fix=f"add {ALLOW_CODE} (in a container you can lose), or leave the task out"
            if selection.where == "--tasks"
            else f"leave it out: a run never does so, hlat eval does with {ALLOW_CODE}",
        )
    if int(datasets.__version__.partition(".")[0]) >= 4:
        return  # it can no longer run a data set's own code
    for name, config in _members(manager, selection.tasks):
        if (config.get("dataset_kwargs") or {}).get("trust_remote_code"):
            what = f"task '{name}' wants to run code from the hub to read its data set"
            raise UserError(
                what, where=selection.where, fix="run: pip install 'datasets>=4', which needs none"
            )


def _members(manager: Any, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, configuration) of all tasks and groups that some names stand for."""
    waiting, seen = list(names), set()
    while waiting:
        name = waiting.pop(0)
        entry = manager.task_index.get(name)
        if name in seen or entry is None:
            continue
        seen.add(name)
        config = entry.cfg or {}
        yield name, config
        members = config.get("task")
        for member in members if isinstance(members, list) else []:
            inner = member if isinstance(member, dict) else {}
            waiting.append(str(inner.get("group", inner.get("task", member))))
            if isinstance(inner.get("task"), list):  # a group defined in place
                waiting += [str(m.get("task") if isinstance(m, dict) else m) for m in inner["task"]]
        if entry.yaml_path is None:  # a tag
            waiting += sorted(entry.tags)


def _load(manager: Any, name: str, where: str) -> list[Any]:
    """The harness's objects for one name: a group, a task, or the tasks of a tag."""
    try:
        found = manager.load([name])
    except UserError:
        raise
    except Exception as error:  # whatever a data set's reader, the network or a task file throws
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the questions of task '{name}' cannot be read ({reason})",
            where=where,
            fix="check its file, or the network for data sets that lie on a hub",
        ) from error
    for task in found["tasks"].values():
        if not len(task.eval_docs):
            raise UserError(f"task '{task.task_name}' has no question: its file is empty", where=where)
    groups = found.get("groups", {})
    return [groups[name]] if name in groups else list(found["tasks"].values())


def _add_bits_errors(results: dict[str, Any]) -> None:
    """The standard error of bits per byte, a ratio of sums (delta method), which the harness leaves out."""
    for task, samples in results.get("samples", {}).items():
        pairs = [sample["bits_per_byte"] for sample in samples if "bits_per_byte" in sample]
        values = results["results"].get(task, {})
        if values.get("bits_per_byte,none") is not None:
            error = ratio([(-nats / math.log(2), size) for nats, size in pairs]).error
            values["bits_per_byte_stderr,none"] = _UNKNOWN if error is None else error


def _chances(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What a model that knows nothing scores: 1 / choices, or 8 bits for each byte."""
    levels: dict[str, dict[str, float]] = {}
    for task, samples in results.get("samples", {}).items():
        kind = results["configs"][task].get("output_type")
        if kind == "multiple_choice":
            # Mutual information asks for each choice twice: after the question, and by itself.
            times = [2 if "acc_mutual_info" in sample["metrics"] else 1 for sample in samples]
            counts = [len(s["resps"]) / n for s, n in zip(samples, times, strict=True)]
            level = sum(1 / count for count in counts) / len(counts)
            levels[task] = dict.fromkeys(("acc", "acc_norm", "acc_mutual_info"), level)
        elif kind == "loglikelihood_rolling":
            levels[task] = {"bits_per_byte": 8.0}
    return levels
