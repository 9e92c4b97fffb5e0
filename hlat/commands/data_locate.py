"""`hlat data locate`: the documents that a step of a run was trained on, by file and line."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlat.errors import UserError

if TYPE_CHECKING:
    from hlat.data.examples import Examples
    from hlat.data.loader import Data
    from hlat.data.skips import Skips


def configure(locate: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    locate.add_argument("folder", metavar="RUN", help="run folder, or a recipe")
    which = locate.add_mutually_exclusive_group(required=True)
    which.add_argument("--step", type=int, metavar="N", help="step of the run, as in metrics.jsonl")
    which.add_argument("--data-step", type=int, metavar="N", help="step of the data, as in data.skip")
    locate.add_argument("--row", type=int, metavar="N", help="only this row of the batch, counted from 0")
    form = locate.add_mutually_exclusive_group()
    form.add_argument("--text", action="store_true", help="print their whole text too")
    form.add_argument("--json", action="store_true", help="print a JSON list: row, source, file, line, …")


def main(args: argparse.Namespace) -> int:
    """Print the documents. Raises UserError for wrong input."""
    from hlat.observe.terminal import escaped

    number = args.data_step if args.step is None else args.step
    if number < 1:
        flag = "--data-step" if args.step is None else "--step"
        raise UserError(f"there is no step {number}", where=flag, fix="steps are counted from 1")
    data, skips, steps = _data_of_run(args.folder)
    if args.step is not None and args.step > steps:
        fix = f"give a step up to {steps}, or --data-step {skips.position(args.step)} to look further on"
        raise UserError(f"the run has {steps} steps, not {args.step}", where="--step", fix=fix)
    step = args.data_step or skips.position(args.step)
    found = [entry for entry in data.locate(step) if args.row in (None, entry["row"])]
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    read = f"step {args.step} reads data step {step}" if args.step else f"data step {step}"
    print(f"{read}: {len({entry['row'] for entry in found})} rows, {len(found)} documents")
    for entry in found:
        print(f"row {entry['row']:>3}  {_place_text(entry)}")
        if args.text:
            print(f"{escaped(data.document_text(entry))}\n")
    if any(entry["file"] is None for entry in found):
        print("made by an earlier version, or not of files: their lines are not known", file=sys.stderr)
    return 0


def _place_text(entry: dict[str, Any]) -> str:
    """Where a document is from, and which of its tokens are meant."""
    from hlat.data.origins import Place, shown

    if entry["file"] is not None:
        place = str(Place(entry["file"], entry["line"], entry["file_row"]))
    elif "example" in entry:
        place = shown(entry["source"])
    else:
        place = shown(f"{entry['folder']}/{entry['shard']} document {entry['document']}")
    if "example" in entry:
        return f"{place}  example {entry['example']} (epoch {entry['epoch']})  {entry['tokens']} tokens"
    return f"{place}  tokens {entry['first']}-{entry['last']} of {entry['tokens']}  hash {entry['hash']}"


def _data_of_run(name: str) -> tuple[Data | Examples, Skips, int]:
    """The data of a run or of a recipe, what is left out of it, and its number of steps.

    Raises UserError for a folder that is no run, or data that is no longer what the run was trained on.
    """
    from hlat.checkpoint.peers import Peers
    from hlat.checkpoint.reader import newest_in
    from hlat.commands.recipe_file import load
    from hlat.data import open_data
    from hlat.data.skips import Skips
    from hlat.observe.jsonl import read_rows
    from hlat.observe.runfolder import RunFolder
    from hlat.train.initial import starting_tokenizer

    if not Path(name).is_dir():
        recipe = load(name)
        own = RunFolder(Path(recipe.run.dir)).checkpoints
        data = open_data(recipe, tokenizer=starting_tokenizer(recipe, own), quiet=True)
        return data, Skips(recipe.data.skip), recipe.run.steps
    folder = RunFolder(Path(name))
    if not folder.resolved.is_file():
        fix = "give the run.dir of a training run, or a recipe"
        raise UserError("not a run folder: it has no resolved.yaml", where=name, fix=fix)
    recipe = load(folder.resolved)
    data = open_data(recipe, tokenizer=starting_tokenizer(recipe, folder.checkpoints), quiet=True)
    newest = newest_in(folder.checkpoints, False, Peers())[0] if folder.checkpoints.is_dir() else None
    if newest is not None and newest.meta["data_fingerprint"] != data.fingerprint:
        raise UserError(
            "the data is not what the run was trained on (its text, order or tokenizer changed)",
            where=name,
            fix="restore the data; relative paths count from the working directory",
        )
    rows = read_rows(folder.metrics) if folder.metrics.is_file() else ()
    found = (row["skipped_data"] for row in rows if row.get("kind") == "anomaly" and "skipped_data" in row)
    return data, Skips(recipe.data.skip, tuple((first, last) for first, last in found)), recipe.run.steps
