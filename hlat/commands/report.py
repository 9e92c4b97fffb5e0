"""`hlat report RUN [RUN…] --out report.html`: curves and figures of one run or several in one HTML file."""

from __future__ import annotations

import argparse
from pathlib import Path

from hlat.errors import UserError
from hlat.observe.output import check_output
from hlat.paths import expand


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "runs", nargs="+", type=expand, metavar="RUN", help="run folder (run.dir of a training run)"
    )
    parser.add_argument(
        "--out", type=expand, default=Path("report.html"), help="file to write (default: %(default)s)"
    )
    parser.add_argument(
        "--x",
        choices=("auto", "step", "tokens", "queries"),
        default="auto",
        help="x axis of the curves: steps, tokens of the batches, or queries (examples that went forward "
        "through the model); auto: steps, or tokens where steps are not equally large",
    )


def main(args: argparse.Namespace) -> int:
    """Write the report. Raises UserError for a missing or empty run and for a file that cannot be written."""
    from hlat.observe.jsonl import replace_file
    from hlat.observe.report import render
    from hlat.observe.runs import load_runs
    from hlat.observe.standing import standing_notes
    from hlat.observe.text import byte_size

    check_output(args.out, "--out")
    runs = load_runs(args.runs)
    content = render(runs, x=args.x).encode()
    try:
        replace_file(args.out, content)
    except OSError as error:
        raise UserError(f"cannot write the report ({error.strerror})", where=f"--out {args.out}") from error
    for line in standing_notes(runs):
        print(f"note: {line}")
    print(f"{args.out}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {byte_size(len(content))}")
    return 0
