"""SLURM: a batch script for a run or, as a job array, for a sweep; on trn1 another that compiles ahead."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hlat.errors import UserError
from hlat.launch.plan import Plan, allowed
from hlat.launch.template import fill, word, words
from hlat.supervise.exits import ORDER

_WORDS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,:@+/=-]*")
_TIME = re.compile(r"(?:([0-9]+)-)?([0-9]+)(?::([0-9]+))?(?::([0-9]+))?")
# An option of sbatch, without what its parser of #SBATCH lines interprets: quotes, backslash, space, #.
_OPTION = re.compile(r"[a-z][a-z-]*(?:=[A-Za-z0-9_.,:;@+/=&|*()\[\]%!<>~-]+)?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\\\"]")


@dataclass(frozen=True)
class Options:
    """What is SLURM's own: partition, account, time limit, options of sbatch as NAME or NAME=VALUE, and how
    many tasks of an array may run at once (0: as many as fit).
    """

    partition: str = ""
    account: str = ""
    time: str = ""
    sbatch: tuple[str, ...] = ()
    at_once: int = 0

    def check(self, grace: int) -> None:
        """Raise UserError for a value that no #SBATCH line can carry, or a time limit within the grace."""
        allowed("--partition", self.partition, _WORDS)
        allowed("--account", self.account, _WORDS)
        for option in self.sbatch:
            allowed("--sbatch", option, _OPTION)
        if self.at_once < 0:
            raise UserError(f"{self.at_once} is out of range", where="--at-once", fix="write 1 or more")
        limit = seconds(self.time) if self.time else None
        if limit is not None and limit <= grace:
            fix = f"write a --grace under {limit}, or a longer --time"
            raise UserError(f"the time limit of {limit} s is within --grace {grace}", where="--time", fix=fix)


@dataclass(frozen=True)
class Task:
    """One run of a sweep: what it overrides, its run folder (absolute), and its name for a comment."""

    overrides: tuple[str, ...]
    run_dir: Path


def seconds(text: str) -> int | None:
    """A time limit as SLURM reads it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; None for no limit (0, UNLIMITED,
    INFINITE). Raises UserError.
    """
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return None
    match = _TIME.fullmatch(text)
    if match is None:
        fix = "write minutes, hours:minutes:seconds, days-hours, or UNLIMITED"
        raise UserError(f"{text!r} is no time limit", where="--time", fix=fix)
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        units: tuple[int, ...] = (3600, 60, 1)
    else:
        units = (60, 1) if len(numbers) < 3 else (3600, 60, 1)
    total = int(days or 0) * 86400 + sum(n * unit for n, unit in zip(numbers, units, strict=False))
    return total or None


def train_script(plan: Plan, options: Options, folder: Path, tasks: Sequence[Task] = ()) -> str:
    """The batch script of a run, or of a sweep's tasks.

    Args:
        plan: what to run.
        options: SLURM's own.
        folder: where the script will lie; the job's own log goes there.
        tasks: of a sweep; empty for one run.

    Raises:
        UserError: a value that no #SBATCH line can carry.
    """
    values = _common(
        plan, options, folder, tasks, "supervise", "train", ("--requeue", f"--signal=B:USR1@{plan.grace}")
    )
    values["max_requeues"] = word(plan.max_requeues)
    values["order"] = words(ORDER)
    values["options"] = words(["--nproc-per-node", plan.processes, "--grace", plan.grace])
    return fill("train.sbatch", values)


def precompile_script(plan: Plan, options: Options, folder: Path, tasks: Sequence[Task] = ()) -> str:
    """The batch script that compiles a run's graphs ahead, on as many nodes. Arguments as `train_script`."""
    values = _common(plan, options, folder, tasks, "train", "precompile", ("--no-requeue",))
    values["processes"] = word(plan.processes)
    return fill("precompile.sbatch", values)


def _common(
    plan: Plan,
    options: Options,
    folder: Path,
    tasks: Sequence[Task],
    verb: str,
    kind: str,
    own: Sequence[str],
) -> dict[str, str]:
    options.check(plan.grace)
    return {
        "title": plan.title + (f", {len(tasks)} tasks" if tasks else ""),
        "directives": _directives(plan, options, folder, kind, own, len(tasks)),
        "work_dir": word(plan.work_dir.absolute()),
        "run_dir": word("" if tasks else plan.run_dir),
        "interface": word(plan.interface),
        "grace": word(plan.grace),
        "command": _lines(plan.command(verb, () if tasks else None)),
        "tasks": _cases(tasks),
        "nodes": fill("nodes.sh", {"environment": plan.environment()}),
    }


def _directives(plan: Plan, options: Options, folder: Path, kind: str, own: Sequence[str], tasks: int) -> str:
    suffix = "" if kind == "train" else f"-{kind}"
    given = (("partition", options.partition), ("account", options.account), ("time", options.time))
    limit = f"%{options.at_once}" if options.at_once else ""
    lines = [
        f"--job-name={plan.job_name}{suffix}",
        f"--nodes={plan.nodes}",
        "--ntasks-per-node=1",
        "--exclusive",
        "--mem=0",
        *own,
        *([f"--array=0-{tasks - 1}{limit}"] if tasks else []),
        "--open-mode=append",
        f'--output="{_pattern(folder)}/{kind}-{"%A_%a" if tasks else "%j"}.out"',
        *(f"--{name}={value}" for name, value in given if value),
        *(f"--{option}" for option in options.sbatch),
    ]
    return "\n".join(f"#SBATCH {line}" for line in lines)


def _pattern(folder: Path) -> str:
    """A folder as SLURM's file name patterns and #SBATCH lines need it."""
    text = str(folder)
    if _CONTROL.search(text):
        what = f"{text!r} holds a line break, quotation mark or backslash, which SLURM's options cannot carry"
        raise UserError(what, where="run.dir", fix="choose another run.dir")
    return text.replace("%", "%%")


def _lines(command: Sequence[str]) -> str:
    """A command's words as lines of a shell array: the command, then an override a line."""
    return "\n    ".join([words(command[:6]), *(word(value) for value in command[6:])])


def _cases(tasks: Sequence[Task]) -> str:
    if not tasks:
        return ""
    lines = ["case $SLURM_ARRAY_TASK_ID in"]
    for number, task in enumerate(tasks):
        lines += [f"{number})", f"    run_dir={word(task.run_dir)}", "    command+=("]
        lines += [f"        {word(value)}" for value in task.overrides]
        lines += ["    )", "    ;;"]
    lines += ['*) echo "there is no task $SLURM_ARRAY_TASK_ID" >&2 && exit 2 ;;', "esac"]
    return "\n".join(lines)
