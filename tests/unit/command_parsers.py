"""The parsers of the command line, all verbs at once."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator

from hlat.cli import VERBS
from hlat.cli_parser import Parser


def whole_parser() -> Parser:
    """The parser with all verbs."""
    parser = Parser(prog="hlat")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in VERBS:
        importlib.import_module(f"hlat.commands.{name}").configure(verbs.add_parser(name))
    return parser


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of all its verbs and actions."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers(inner)
