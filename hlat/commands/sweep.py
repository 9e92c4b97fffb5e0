"""`hlat sweep RECIPE key=[a, b] … [key=value …] --seeds N`: a run for each combination, one after another."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlat.commands.sweep_cells import refuse_unfit, unfit_here
from hlat.errors import UserError
from hlat.paths import folder_to_write

if TYPE_CHECKING:
    from hlat.observe.runfolder import RunFolder
    from hlat.observe.sweep import Cell, Result
    from hlat.recipe import Recipe
    from hlat.storage.fingerprint import Fingerprint


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("recipe", help="a recipe file, or the name of one that ships with HLAT")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="recipe values; a list, key=[a, b], is swept over (a value that is itself a list: [[a, b]])",
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds a combination (default: 1)")
    parser.add_argument(
        "--out",
        type=folder_to_write,
        metavar="FOLDER",
        help="folder of all runs (default: runs/<recipe>-sweep)",
    )
    parser.add_argument(
        "--list", action="store_true", help="only print one `hlat train` command a line, run nothing"
    )


@dataclass
class Trial:
    """One run of a sweep: its combination, its seed, the overrides that make it, what they make, and what its
    result is to stand for (None as long as nothing asks).
    """

    choice: dict[str, Any]
    seed: int
    overrides: list[str]
    folder: Path
    recipe: Recipe
    wanted: Fingerprint | None = None

    @property
    def last(self) -> int:
        """The step at which it ends."""
        return self.recipe.run.stop_at_step or self.recipe.run.steps

    @property
    def log(self) -> Path:
        """Where its output goes: beside its folder."""
        return self.folder.with_name(f"{self.folder.name}.log")


def main(args: argparse.Namespace) -> int:
    """Run what is not done yet, write the tables. Returns 0, or 1 when runs failed, or 128 + the signal that
    stopped it.
    """
    from hlat.observe.redact import redact
    from hlat.observe.stopping import name_of
    from hlat.observe.terminal import one_line

    trials, out = plan(args.recipe, args.overrides, args.seeds, args.out, here=not args.list)
    commands = [["hlat", "train", args.recipe, *trial.overrides] for trial in trials]
    if args.list:
        for command in commands:
            print(shlex.join(command))
        for line in unfit_here(trials):
            print(f"hlat: note: {one_line(redact(line))}", file=sys.stderr)
        return 0
    refuse_unfit(trials)
    look_at_contents(trials)
    refuse_others(trials, out)
    failed, stop = run_all(trials, commands)
    if stop is not None:
        print(f"hlat: stopped by {name_of(stop)}; the same command continues", file=sys.stderr)
        return 128 + stop
    _write(out, f"sweep of {args.recipe}", gather(trials))
    for line in other_versions(trials):
        print(f"note: {line}")
    if failed:
        print(
            f"hlat: {failed} of {len(trials)} runs failed; the same command tries them again", file=sys.stderr
        )
    return 1 if failed else 0


def run_all(trials: Sequence[Trial], commands: Sequence[Sequence[str]]) -> tuple[int, int | None]:
    """Run what has no result yet. Returns how many failed, and the signal that stopped it before the end."""
    from hlat.supervise.child import Children

    failed = 0
    with Children().forwarding() as children:
        for number, (trial, command) in enumerate(zip(trials, commands, strict=True), 1):
            if result(trial) is not None:
                continue
            print(f"[{number}/{len(trials)}] {trial.folder.name}", flush=True)
            code, said = children.run(command, trial.log)
            if children.received is not None:
                return failed, children.received
            if code > 128:  # it was told alone, by a spot notice or the end of its time
                return failed, code - 128
            got, other = result(trial), others(trial)
            if other:
                failed += 1
                print(f"something changed while the sweep ran: {'; '.join(other)}", flush=True)
            elif got is not None and got.fault:
                print(f"{got.fault}: see {trial.log}", flush=True)
            elif code or got is None:
                failed += 1
                print(f"failed with exit code {code}: {reason(code, said)}", flush=True)
    return failed, children.received


def plan(
    recipe: str, overrides: Sequence[str], seeds: int, out: Path | None = None, *, here: bool = False
) -> tuple[list[Trial], Path]:
    """Every run of a sweep, each of them checked, in order: the last key varies fastest, seeds inside it.

    Args:
        recipe, overrides, seeds, out: as on the command line.
        here: they are to run on this machine, in one process each.

    Raises UserError for a combination that is no recipe or that `hlat train` would refuse, before anything
    runs.
    """
    from hlat.commands.recipe_file import load
    from hlat.data.presence import check_tokenizer
    from hlat.train.run import refuse_unsupported

    if seeds < 1:
        raise UserError(f"a combination needs a seed, not {seeds}", where="--seeds", fix="give 1 or more")
    axes = split(overrides)
    for key in ("run", "run.seed", "run.name", "run.dir"):
        if key in axes:
            raise UserError(f"{key} cannot be swept", where=key, fix="use --seeds and --out")
    trials: list[Trial] = []
    known: set[str] = set()
    for values in itertools.product(*axes.values()):
        choice = dict(zip(axes, values, strict=True))
        words = [_with_value(text, choice) for text in overrides]
        base = load(recipe, words)
        out = out or Path("runs") / f"{base.run.name}-sweep"
        for seed in range(base.run.seed, base.run.seed + seeds):
            name = _name(choice, seed)
            own = [f"run.seed={seed}", f"run.name={name}", f"run.dir={json.dumps(str(out / name))}"]
            made = load(recipe, [*words, *own])
            refuse_unsupported(made, here=here)
            if here:
                made.accumulate()
            trials.append(Trial(choice, seed, [*words, *own], out / name, made))
        same = json.dumps(base.to_dict(), sort_keys=True)
        if same in known:
            text = ", ".join(f"{key}={json.dumps(value)}" for key, value in choice.items())
            raise UserError(f"{text} stands there twice", where="command line", fix="give every value once")
        known.add(same)
    assert out is not None  # `split` wants values
    for made in {(t.recipe.data.tokenizer, t.recipe.model.vocab): t.recipe for t in trials}.values():
        check_tokenizer(made)  # a large one takes a second to read
    return trials, out


def split(overrides: Sequence[str]) -> dict[str, list[Any]]:
    """What is swept over: key -> values. Raises UserError without any, and for a key that is given twice."""
    from hlat.recipe_yaml import parse_yaml

    axes: dict[str, list[Any]] = {}
    keys: list[str] = []
    for text in overrides:
        key, equals, value_text = text.partition("=")
        keys.append(key.strip())
        value = parse_yaml(value_text, f"command line: {key}", show_line=False)[0] if equals else None
        if isinstance(value, list):
            if not value:
                raise UserError("there is nothing in the list", where=key, fix=f"write {key}=[a, b]")
            axes[key.strip()] = value
    if not axes:
        fix = "give a list, as optim.lr=[1e-3, 3e-3]"
        raise UserError("no key has several values", where="command line", fix=fix)
    twice = next((key for key in axes if keys.count(key) > 1), None)
    if twice is not None:
        fix = f"give all its values in one list, {twice}=[a, b]"
        raise UserError(f"{twice} is given twice", where="command line", fix=fix)
    return axes


def _with_value(text: str, choice: dict[str, Any]) -> str:
    """An override as it is, or with one of the values in its list."""
    key = text.partition("=")[0].strip()
    return f"{key}={json.dumps(choice[key])}" if key in choice else text


def look_at_contents(trials: Sequence[Trial]) -> None:
    """Note what each result is to stand for. Raises UserError for data or weights that cannot be read."""
    from hlat.train.fingerprint import Contents

    contents = Contents()
    for trial in trials:
        trial.wanted = contents.fingerprint(trial.recipe)


def refuse_others(trials: Sequence[Trial], out: Path) -> None:
    """Raise UserError where the folder holds runs of something else, finished or not: they are not results of
    this sweep, and nothing is to go on from their states.
    """
    found = [(trial, other) for trial in trials if (other := others(trial))]
    if found:
        trial, other = found[0]
        count = f"{len(found)} of {len(trials)} runs there are"
        what = f"{count} of something else than asked for: {trial.folder.name}: {'; '.join(other[:4])}"
        more = f" (and {len(other) - 4} more)" if len(other) > 4 else ""
        fix = "give this sweep a folder of its own with --out, or move those runs away"
        raise UserError(f"{what}{more}", where=f"--out {out}", fix=fix)


def others(trial: Trial) -> list[str]:
    """How what a trial would go on from, or show, differs from what it is to be; empty if it does not, or if
    there is nothing yet.
    """
    from hlat.storage.fingerprint import read_stretches, with_steps
    from hlat.train.fingerprint import differences

    assert trial.wanted is not None
    if not _has_result(trial):
        return _others_in_store(trial)
    stretches = with_steps(read_stretches(trial.folder), trial.last)
    if not stretches or stretches[0].after:
        why = "fingerprint.json is damaged or missing, as in runs of older versions"
        return [f"what it stands for is not known: {why}"]
    found = [differences(stretch.fingerprint, trial.wanted, trial.last) for stretch in stretches]
    return list(dict.fromkeys(itertools.chain.from_iterable(found)))


def _others_in_store(trial: Trial) -> list[str]:
    """`others` of the copies that `checkpoint.remote` holds under the run's name."""
    if trial.recipe.checkpoint.remote is None:
        return []
    from hlat.observe.runfolder import RunFolder
    from hlat.storage.fingerprint import Fingerprint
    from hlat.train.fingerprint import differences
    from hlat.train.remote import look

    def warn(line: str) -> None:
        print(line, file=sys.stderr)

    stored = look(trial.recipe, RunFolder(trial.folder).checkpoints, warn)
    saved = stored.meta
    if saved is None:
        return ["checkpoint.remote holds damaged checkpoints of a run of its name"] if stored.damaged else []
    if not saved.get("content"):
        return ["checkpoint.remote holds a run of its name that does not say what it stands for"]
    assert trial.wanted is not None
    return differences(Fingerprint.from_dict(saved), trial.wanted, trial.last)


def _has_result(trial: Trial) -> bool:
    """Whether a run has left a state to go on from, or figures of its last step."""
    from hlat.observe.runfolder import RunFolder

    folder = RunFolder(trial.folder)
    states = (folder.checkpoints, folder.nxd_checkpoints)
    if any(state.is_dir() and any(state.glob("step-*")) for state in states):
        return True
    found = _figures(folder, trial.last)
    return found is not None and (found.stopped or math.isfinite(found.loss))


def _figures(folder: RunFolder, last: int) -> Result | None:
    """What the rows of a run say; None without rows."""
    from hlat.observe.jsonl import read_rows
    from hlat.observe.sweep import result_of

    try:
        return result_of(read_rows(folder.metrics), last)
    except (OSError, ValueError, AttributeError):
        return None


def result(trial: Trial) -> Result | None:
    """What a run gave; None when it is not finished, or was of something else."""
    from hlat.checkpoint.finished import lacking
    from hlat.observe.runfolder import RunFolder

    folder = RunFolder(trial.folder)
    found = _figures(folder, trial.last)
    if found is None or others(trial):
        return None
    if found.stopped:  # nothing would be different the next time
        return found
    return None if lacking(folder, trial.last) else found


def other_versions(trials: Sequence[Trial]) -> list[str]:
    """A line for each set of versions that made results shown beside those of this one."""
    from collections import Counter

    from hlat.storage.fingerprint import read_stretches, with_steps
    from hlat.train.fingerprint import versions

    made: Counter[tuple[tuple[str, str], ...]] = Counter()
    for trial in trials:
        stretches = with_steps(read_stretches(trial.folder), trial.last)
        made.update({tuple(sorted(stretch.fingerprint.versions.items())) for stretch in stretches})
    made.pop(tuple(sorted(versions().items())), None)
    return [
        f"{count} of {len(trials)} runs were made, in part or whole, by "
        + ", ".join(f"{name} {version}" for name, version in found)
        for found, count in made.items()
    ]


def gather(trials: Sequence[Trial]) -> list[Cell]:
    """Results by combination."""
    from hlat.observe.sweep import Cell

    cells: dict[str, Cell] = {}
    for trial in trials:
        cell = cells.setdefault(json.dumps(trial.choice), Cell(trial.choice))
        cell.results.append(result(trial))
    return list(cells.values())


def reason(code: int, said: str) -> str:
    """Why a run failed, from its exit status and what it printed: its own error line, if there is one."""
    from hlat.supervise.classify import Evidence, classify

    lines = [line for line in said.splitlines() if line.startswith("hlat: error: ")]
    if lines:
        return lines[-1].removeprefix("hlat: error: ")
    return classify(Evidence({0: code}, said)).reason


def _write(out: Path, title: str, cells: Sequence[Cell]) -> None:
    from rich.console import Console
    from rich.table import Table

    from hlat.observe.jsonl import replace_file
    from hlat.observe.sweep import LEFT_OUT, draw_png, render, table
    from hlat.observe.terminal import one_line, unguarded

    head, lines = table(cells)
    shown = Table(title=one_line(title))
    for name in head:
        shown.add_column(one_line(name), no_wrap=name != LEFT_OUT)
    for line in lines:
        shown.add_row(*map(one_line, line))
    width = None if sys.stdout.isatty() else 1000
    Console(width=width, file=unguarded(sys.stdout)).print(shown)  # in a file nothing is cut off
    replace_file(out / "sweep.html", render(title, cells).encode())
    drawn = draw_png(out / "sweep.png", title, cells)
    files = ["sweep.html", "sweep.png"] if drawn else ["sweep.html"]
    print(" and ".join(str(out / name) for name in files))


def _name(choice: dict[str, Any], seed: int) -> str:
    """A run name that says what is special about it, the same whatever else is swept over."""
    words = [f"{key.rpartition('.')[2]}-{value}" for key, value in choice.items()]
    text = "_".join([*words, f"seed-{seed}"])
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in text)
    unique = hashlib.sha256(json.dumps([choice, seed], sort_keys=True).encode()).hexdigest()[:6]
    return f"{kept[:80]}_{unique}"
