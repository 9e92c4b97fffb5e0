"""`hlat compare A B [C …] --tasks …`: the same questions to several models."""

from __future__ import annotations

import argparse
from typing import Any

from hlat.backend.launcher import take_place
from hlat.commands.eval import add_selection, evaluation, selection
from hlat.errors import UserError
from hlat.observe.output import check_output

EXPLANATION = (
    "± is the standard error. p: paired over the questions (McNemar's exact test where scores are 0 or 1, "
    "else a z-test), corrected for the number of rows (Holm). * below 5 %."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "targets", nargs="+", metavar="TARGET", help="runs, step folders, Hugging Face folders: two or more"
    )
    add_selection(parser)
    parser.add_argument("--markdown", metavar="OUT", help="write the table in Markdown")
    parser.add_argument("--html", metavar="OUT", help="write the table as an HTML page")
    parser.add_argument("--json", metavar="OUT", help="write the figures")


def main(args: argparse.Namespace) -> int:
    """Evaluate each and print the table. Raises UserError for bad input."""
    take_place()
    if len(args.targets) < 2:
        raise UserError("one model has nothing to be compared with", where="TARGET", fix="name two or more")
    for option in ("markdown", "html", "json"):
        check_output(getattr(args, option), f"--{option}")
    with evaluation(args) as job:
        from hlat.evaluate.compare import comparison
        from hlat.evaluate.target import open_target

        targets = [open_target(path) for path in args.targets]
        # What the one with the smallest share has held out, the others have held out too.
        shares = [target.holdout for target in targets if target.holdout is not None]
        wanted = selection(args, min(shares) if shares else None)
        results = [found for target in targets if (found := job.run(target, wanted)) is not None]
        if job.first:
            names = distinct([target.name for target in targets])
            _show(args, names, comparison(names, results))
    return 0


def distinct(names: list[str]) -> list[str]:
    """Names that differ: equal ones are numbered."""
    return [
        f"{name} ({names[: index + 1].count(name)})" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    ]


def _show(args: argparse.Namespace, names: list[str], rows: list[dict[str, Any]]) -> None:
    from html import escape

    from hlat.evaluate.compare import comparison_table
    from hlat.evaluate.results import html_table, markdown, plain, write_json, write_text
    from hlat.observe.page import page

    table = comparison_table(names, rows)
    print(f"{plain(table)}\n\n{EXPLANATION}")
    if args.markdown:
        write_text(f"{markdown(table)}\n\n{EXPLANATION}\n", args.markdown)
    if args.html:
        title = " and ".join(names)
        head = f"<header><h1>{escape(title)}</h1></header>"
        body = f'{head}{html_table(table)}<p class="note">{escape(EXPLANATION)}</p>'
        write_text(page(title, body, {}), args.html)
    if args.json:
        write_json({"models": names, "rows": rows}, args.json)
    for path in (args.markdown, args.html, args.json):
        if path:
            print(f"{path}: written")
