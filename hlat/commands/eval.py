"""`hlat eval TARGET --tasks …`, in one process or in each of those a launcher starts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hlat.backend.launcher import take_place
from hlat.errors import UserError
from hlat.observe.output import check_output
from hlat.paths import existing_folder, expand, kind_of

if TYPE_CHECKING:
    from hlat.evaluate.running import Selection
    from hlat.evaluate.target import Target


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "target", type=expand, metavar="TARGET", help="run folder, step folder or Hugging Face folder"
    )
    add_selection(parser)
    parser.add_argument("--all-checkpoints", action="store_true", help="every checkpoint of a run")
    parser.add_argument(
        "--html", type=expand, metavar="OUT", help="with --all-checkpoints: draw the curves over tokens"
    )
    parser.add_argument("--reference", action="store_true", help="print published values beside the results")
    parser.add_argument(
        "--json", type=expand, metavar="OUT", help="write the results in the harness's schema"
    )
    parser.add_argument("--samples", action="store_true", help="with --json: each question and answer too")


def _tokenizer(text: str) -> str:
    """`bytes`, or the path of a file or a folder that is there."""
    if text == "bytes":
        return text
    path = expand(text)
    if kind_of(path) not in ("file", "folder"):
        raise UserError(
            f"no tokenizer at '{path}'", fix="name a .model, a tokenizer.json or a folder with one"
        )
    return str(path)


def add_selection(parser: argparse.ArgumentParser) -> None:
    """The arguments that `eval` and `compare` share."""
    add = parser.add_argument
    add("--tasks", nargs="+", required=True, metavar="TASK", help="tasks or groups, e.g. hlat-offline")
    add("--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's)")
    add("--limit", type=int, metavar="N", help="only the first N questions of each task")
    add("--include-path", type=existing_folder, metavar="DIR", help="folder of more task files")
    add("--batch-size", type=int, default=16, metavar="N", help="rows of a forward pass (default: 16)")
    add("--dtype", choices=("fp64", "fp32", "bf16"), default="fp32", help="compute in (default: fp32)")
    add("--device", help="cpu, cuda, … (default: cuda if there is one)")
    add("--tokenizer", type=_tokenizer, metavar="PATH", help="another tokenizer than the checkpoint's")
    add(
        "--apply-chat-template",
        nargs="?",
        const="",
        metavar="NAME",
        help="put the questions into the chat template of the tokenizer's files (the one of this name)",
    )
    add(
        "--fewshot-as-multiturn",
        action=argparse.BooleanOptionalAction,
        help="with a chat template: each example is a turn of the conversation (the default)",
    )
    add("--system-instruction", metavar="TEXT", help="a system message, or text before each question")
    add("--tp", type=int, default=1, metavar="N", help="ranks that share each layer (under torchrun)")
    add("--pp", type=int, default=1, metavar="N", help="pipeline ranks (under torchrun); the rest: replicas")
    add(
        "--allow-code-execution",
        action="store_true",
        help="allow tasks that run code the model wrote (HumanEval): in a container you can lose",
    )


def main(args: argparse.Namespace) -> int:
    """Evaluate and print a table. Raises UserError for bad input."""
    take_place()
    if args.html and not args.all_checkpoints:
        raise UserError("draws curves over tokens", where="--html", fix="add --all-checkpoints")
    check_output(args.html, "--html")
    check_output(args.json, "--json")
    with evaluation(args) as job:
        from hlat.evaluate.target import all_checkpoints, open_target

        targets = all_checkpoints(args.target) if args.all_checkpoints else [open_target(args.target)]
        found: list[tuple[Target, dict[str, Any]]] = []
        for target in targets:
            results = job.run(target, selection(args, target.holdout))
            if results is not None:
                _print(args, target, results)
                found.append((target, results))
        if job.first:
            _write(args, found)
            refuse_without_figures([results for _, results in found])
    return 0


def refuse_without_figures(found: Sequence[dict[str, Any]]) -> None:
    """Raise Diverged where the models' logits left nothing to show, once everything is written."""
    from hlat.evaluate.generate import diverged
    from hlat.evaluate.running import left_out, numbers

    values = [
        value for results in found for metrics in numbers(results).values() for value, _ in metrics.values()
    ]
    if any(left_out(results) for results in found) and not any(value is not None for value in values):
        raise diverged("no task has a figure: the model's logits are not finite")


def evaluation(args: argparse.Namespace) -> Any:
    """A context with the job's processes, its options checked."""
    from contextlib import contextmanager

    bounds = (
        ("--num-fewshot", 0, args.num_fewshot),
        ("--limit", 1, args.limit),
        ("--batch-size", 1, args.batch_size),
        ("--tp", 1, args.tp),
        ("--pp", 1, args.pp),
    )
    for option, least, value in bounds:
        if value is not None and value < least:
            raise UserError(f"{value} is out of range", where=option, fix=f"write {least} or more")
    if args.fewshot_as_multiturn is not None and args.apply_chat_template is None:
        fix = "add --apply-chat-template"
        raise UserError("there are turns only in a chat template", where="--fewshot-as-multiturn", fix=fix)
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when torch imports tqdm
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from hlat.evaluate.harness import require_harness
    from hlat.evaluate.job import Evaluation, gathered
    from hlat.evaluate.running import check_tasks, go_offline
    from hlat.evaluate.target import parse_device, parse_dtype

    go_offline(selection(args))  # before the harness is imported
    require_harness()
    if os.environ.get("RANK", "0") == "0":
        check_tasks(selection(args))

    @contextmanager
    def opened() -> Any:
        with gathered() as cluster:
            yield Evaluation(
                cluster,
                tp=args.tp,
                pp=args.pp,
                dtype=parse_dtype(args.dtype),
                device=parse_device(args.device),
                tokenizer=args.tokenizer,
            )

    return opened()


def selection(args: argparse.Namespace, holdout: float | None = None) -> Selection:
    """The tasks that the arguments name."""
    from hlat.evaluate.running import Selection

    names = [name for text in args.tasks for name in text.split(",") if name]
    if not names:
        raise UserError("no task is named", where="--tasks", fix="write for example --tasks hlat-offline")
    return Selection(
        tasks=tuple(dict.fromkeys(names)),
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        include=args.include_path,
        allow_code=args.allow_code_execution,
        holdout=holdout,
        batch_size=args.batch_size,
        chat=args.apply_chat_template,
        multiturn=args.fewshot_as_multiturn is not False,
        system=args.system_instruction,
    )


def _print(args: argparse.Namespace, target: Target, results: dict[str, Any]) -> None:
    from hlat.evaluate.results import notes, plain, reference_rows, table
    from hlat.observe.text import short

    progress = f", {short(target.tokens)} tokens" if target.tokens else ""
    print(f"{target.name}{progress}\n\n{plain(table(results))}\n")
    for line in notes(results):
        print(f"note: {line}")
    if args.reference:
        evaluated = {*results["results"], *results.get("groups", {})}
        rows = reference_rows(sorted(evaluated))
        known = len(rows) > 1
        print(
            f"published, in percent:\n\n{plain(rows)}\n" if known else "no published values for these tasks\n"
        )


def _write(args: argparse.Namespace, found: list[tuple[Target, dict[str, Any]]]) -> None:
    from hlat.evaluate.curve import as_rows, render
    from hlat.evaluate.results import without_samples, write_json, write_text

    if args.html:
        write_text(render(found), args.html)
        print(f"{args.html}: curves of {len(found)} checkpoints")
    if not args.json:
        return
    shown = [results if args.samples else without_samples(results) for _, results in found]
    write_json(as_rows(found, shown) if args.all_checkpoints else shown[0], args.json)
    print(f"{args.json}: written")
