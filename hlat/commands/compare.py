"""`hlat compare A B [C …] --tasks …`: the same questions to several models."""

from __future__ import annotations

import argparse
from typing import Any

from hlat.backend.launcher import take_place
from hlat.commands.eval import add_selection, evaluation, refuse_without_figures, selection
from hlat.errors import UserError
from hlat.observe.output import check_output
from hlat.paths import expand

SAID = ("notes", "context_ended", "left_out", "chat_template")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "targets",
        nargs="+",
        type=expand,
        metavar="TARGET",
        help="runs, step folders, Hugging Face folders: two or more",
    )
    add_selection(parser)
    parser.add_argument("--markdown", type=expand, metavar="OUT", help="write the table in Markdown")
    parser.add_argument("--html", type=expand, metavar="OUT", help="write the table as an HTML page")
    parser.add_argument("--json", type=expand, metavar="OUT", help="write the figures")


def main(args: argparse.Namespace) -> int:
    """Evaluate each and print the table. Raises UserError for bad input."""
    take_place()
    if len(args.targets) < 2:
        raise UserError("one model has nothing to be compared with", where="TARGET", fix="name two or more")
    for option in ("markdown", "html", "json"):
        check_output(getattr(args, option), f"--{option}")
    with evaluation(args) as job:
        from hlat.evaluate.offline import HOLDOUT
        from hlat.evaluate.target import open_target

        targets = [open_target(path) for path in args.targets]
        # What the one with the smallest share has held out, the others have held out too.
        known = [target.holdout for target in targets]
        wanted = selection(args, min(HOLDOUT if share is None else share for share in known))
        results = [found for target in targets if (found := job.run(target, wanted)) is not None]
        if job.first:
            names = distinct([target.name for target in targets])
            _show(args, names, results)
            refuse_without_figures(results)
    return 0


def distinct(names: list[str]) -> list[str]:
    """Names that differ: equal ones are numbered."""
    return [
        f"{name} ({names[: index + 1].count(name)})" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    ]


def _show(args: argparse.Namespace, names: list[str], results: list[dict[str, Any]]) -> None:
    from html import escape

    from hlat.evaluate.compare import EXPLANATION, comparison, comparison_notes, comparison_table
    from hlat.evaluate.results import html_notes, html_table, markdown, plain, write_json, write_text
    from hlat.observe.page import page

    rows, notes = comparison(names, results), comparison_notes(names, results)
    table = comparison_table(names, rows)
    print("\n".join([plain(table), "", EXPLANATION, *(f"note: {line}" for line in notes)]))
    if args.markdown:
        lines = [markdown(table), "", EXPLANATION, *(f"\nNote: {line}" for line in notes)]
        write_text("\n".join(lines) + "\n", args.markdown)
    if args.html:
        title = " and ".join(names)
        head = f"<header><h1>{escape(title)}</h1></header>"
        body = f"{head}{html_table(table)}{html_notes([EXPLANATION, *notes])}"
        write_text(page(title, body, {}), args.html)
    if args.json:
        told = [{key: result["hlat"][key] for key in SAID} for result in results]
        write_json({"models": names, "rows": rows, "notes": notes, "hlat": told}, args.json)
    for path in (args.markdown, args.html, args.json):
        if path:
            print(f"{path}: written")
