"""`hlat sweep RECIPE key=[a, b] … [key=value …] --seeds N`: a run for each combination, one after another."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlat.errors import UserError

if TYPE_CHECKING:
    from hlat.observe.sweep import Cell

_INTERRUPTED = 130


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
        "--out", type=Path, metavar="FOLDER", help="folder of all runs (default: runs/<recipe>-sweep)"
    )
    parser.add_argument(
        "--list", action="store_true", help="only print one `hlat train` command a line, run nothing"
    )


@dataclass
class Trial:
    """One run of a sweep: its combination, its seed, and the overrides that make it."""

    choice: dict[str, Any]
    seed: int
    overrides: list[str] = field(default_factory=list)
    folder: Path = Path()


def main(args: argparse.Namespace) -> int:
    """Run what is not done yet, write the tables. Returns 0, or 1 when runs failed, or 130 after Ctrl-C."""
    trials, out = plan(args.recipe, args.overrides, args.seeds, args.out)
    commands = [["hlat", "train", args.recipe, *trial.overrides] for trial in trials]
    if args.list:
        for command in commands:
            print(shlex.join(command))
        return 0
    failed = 0
    for number, (trial, command) in enumerate(zip(trials, commands, strict=True), 1):
        if result(args.recipe, trial) is not None:
            continue
        print(f"[{number}/{len(trials)}] {trial.folder.name}", flush=True)
        code = _train(command, trial)
        if code == _INTERRUPTED:
            print("hlat: interrupted; the same command continues", file=sys.stderr)
            return _INTERRUPTED
        if code or result(args.recipe, trial) is None:
            failed += 1
            print(f"failed with exit code {code}: {_last_line(_log(trial))}", flush=True)
    cells = gather(args.recipe, trials)
    _write(out, f"sweep of {args.recipe}", cells)
    if failed:
        print(
            f"hlat: {failed} of {len(trials)} runs failed; the same command tries them again", file=sys.stderr
        )
    return 1 if failed else 0


def plan(
    recipe: str, overrides: Sequence[str], seeds: int, out: Path | None = None
) -> tuple[list[Trial], Path]:
    """Every run of a sweep, each of them checked, in order: the last key varies fastest, seeds inside it.

    Raises UserError for a combination that is no recipe, before anything runs.
    """
    from hlat.commands.recipe_file import load

    if seeds < 1:
        raise UserError(f"a combination needs a seed, not {seeds}", where="--seeds", fix="give 1 or more")
    fixed, axes = split(overrides)
    for key in ("run.seed", "run.name", "run.dir"):
        if key in axes:
            raise UserError(f"{key} cannot be swept", where=key, fix="use --seeds and --out")
    base = load(recipe, fixed)
    out = out or Path("runs") / f"{base.run.name}-sweep"
    trials = []
    for values in itertools.product(*axes.values()):
        choice = dict(zip(axes, values, strict=True))
        # A changed plug-in drops the recipe's options of the old one: it must come before its own options.
        own = [f"{key}={json.dumps(value)}" for key, value in choice.items()]
        own.sort(key=lambda text: not text.partition("=")[0].endswith(".name"))
        for seed in range(base.run.seed, base.run.seed + seeds):
            name = _name(choice, seed)
            trial = Trial(choice, seed, [*fixed, *own, f"run.seed={seed}"], out / name)
            trial.overrides += [f"run.name={name}", f"run.dir={json.dumps(str(out / name))}"]
            load(recipe, trial.overrides)
            trials.append(trial)
    return trials, out


def split(overrides: Sequence[str]) -> tuple[list[str], dict[str, list[Any]]]:
    """Overrides as they are, and those that are swept over: key -> values."""
    from hlat.recipe_yaml import parse_yaml

    fixed: list[str] = []
    axes: dict[str, list[Any]] = {}
    for text in overrides:
        key, equals, value_text = text.partition("=")
        value = parse_yaml(value_text, f"command line: {key}", show_line=False)[0] if equals else None
        if isinstance(value, list):
            if not value:
                raise UserError("there is nothing in the list", where=key, fix=f"write {key}=[a, b]")
            axes[key.strip()] = value
        else:
            fixed.append(text)
    if not axes:
        fix = "give a list, as optim.lr=[1e-3, 3e-3]"
        raise UserError("no key has several values", where="command line", fix=fix)
    return fixed, axes


def result(recipe: str, trial: Trial) -> float | None:
    """Held-out loss at a run's last step (training loss where nothing is held out); None when it is not
    finished, or was of another recipe.
    """
    import yaml

    from hlat.commands.recipe_file import load
    from hlat.observe.jsonl import read_rows
    from hlat.observe.runfolder import RunFolder
    from hlat.recipe import identity_diff

    folder, wanted = RunFolder(trial.folder), load(recipe, trial.overrides)
    last = wanted.run.stop_at_step or wanted.run.steps
    try:
        saved = yaml.safe_load(folder.resolved.read_text())
        if identity_diff(saved, wanted.to_dict()):
            return None
        rows = [row for row in read_rows(folder.metrics) if row.get("step") == last]
    except (OSError, ValueError, yaml.YAMLError, AttributeError):
        return None
    losses = {row.get("kind"): row.get("loss") for row in rows}
    loss = losses.get("eval", losses.get("train"))
    finished = (trial.folder / "checkpoints" / f"step-{last:08d}").is_dir()
    return float(loss) if finished and isinstance(loss, float) else None


def gather(recipe: str, trials: Sequence[Trial]) -> list[Cell]:
    """Results by combination."""
    from hlat.observe.sweep import Cell

    cells: dict[str, Cell] = {}
    for trial in trials:
        cell = cells.setdefault(json.dumps(trial.choice), Cell(trial.choice))
        cell.losses.append(result(recipe, trial))
    return list(cells.values())


def _train(command: Sequence[str], trial: Trial) -> int:
    """Exit code of a run; its output goes to a log beside its folder."""
    log = _log(trial)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        try:
            return process.wait()
        except KeyboardInterrupt:  # the run has the signal too: it saves and stops
            process.wait()
            return _INTERRUPTED


def _write(out: Path, title: str, cells: Sequence[Cell]) -> None:
    from rich.console import Console
    from rich.table import Table

    from hlat.observe.jsonl import replace_file
    from hlat.observe.sweep import draw_png, render, table

    head, lines = table(cells)
    shown = Table(title=title)
    for name in head:
        shown.add_column(name, no_wrap=True)
    for line in lines:
        shown.add_row(*line)
    Console().print(shown)
    replace_file(out / "sweep.html", render(title, cells).encode())
    drawn = draw_png(out / "sweep.png", title, cells)
    files = ["sweep.html", "sweep.png"] if drawn else ["sweep.html"]
    print(" and ".join(str(out / name) for name in files))


def _log(trial: Trial) -> Path:
    return trial.folder.with_name(f"{trial.folder.name}.log")


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"


def _name(choice: dict[str, Any], seed: int) -> str:
    """A run name that says what is special about it, the same whatever else is swept over."""
    words = [f"{key.rpartition('.')[2]}-{value}" for key, value in choice.items()]
    text = "_".join([*words, f"seed-{seed}"])
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in text)
    unique = hashlib.sha256(json.dumps([choice, seed], sort_keys=True).encode()).hexdigest()[:6]
    return f"{kept[:80]}_{unique}"
