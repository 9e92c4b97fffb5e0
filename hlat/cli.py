"""The `hlat` command: one verb, one module in `hlat.commands`, imported when it is used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from contextlib import suppress

import hlat
from hlat.cli_parser import Parser
from hlat.errors import REQUIRED, UserError, missing_package, names_explained
from hlat.host.streams import flushed, open_closed_streams, output_failed

VERBS = {
    "train": "train a model from a recipe",
    "supervise": "train, and start again after a failure until it is done",
    "launch": "start a run on a cluster: SLURM, torchrun on every node, Kubernetes",
    "recipes": "list, show, compare and check recipes",
    "data": "train tokenizers, tokenize text, inspect and verify tokenized folders",
    "generate": "continue a prompt with a trained model",
    "convert": "to and from Hugging Face, from GGUF",
    "eval": "evaluate a run, a checkpoint or a Hugging Face folder",
    "compare": "evaluate several models on the same questions: differences and their significance",
    "sweep": "train every combination of some values, compare the results",
    "report": "draw one or several runs into an HTML file",
    "cache": "share a node's Neuron compile cache through a store",
    "doctor": "check this machine, and print the lines that repair it",
}

# The work of one process: a launcher that starts several of them is refused.
ONCE = ("generate", "convert", "sweep", "launch")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0, or 2 for wrong input (one line on stderr)."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    verb = next((a for a in arguments if not a.startswith("-")), None)
    parser = Parser(prog="hlat", description="Trainium-first LLM pretraining.")
    parser.add_argument("--version", action="version", version=f"hlat {hlat.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, text in VERBS.items():
        sub = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == verb:  # the other verbs' modules stay unimported
            module = importlib.import_module(f"hlat.commands.{name}")
            module.configure(sub)
            sub.set_defaults(run=module.main)
    if not arguments:
        parser.print_help()
        return 2
    try:
        args = parser.read(arguments)
        if args.verb in ONCE:
            from hlat.backend.launcher import refuse_tasks

            refuse_tasks(args.verb)
        from hlat.observe.terminal import guarded

        with names_explained(), guarded():
            return int(args.run(args) or 0)
    except UserError as error:
        from hlat.observe.redact import redact
        from hlat.observe.terminal import one_line
        from hlat.observe.torchelastic import leave_message, shown_here, told

        line = f"hlat: error: {one_line(redact(error.line()))}".encode(errors="backslashreplace").decode()
        leave_message(line)
        if shown_here():
            with suppress(OSError):  # where stderr is full or closed the exit code says it
                print(told(line), file=sys.stderr, flush=True)
        return error.exit_code
    except ModuleNotFoundError as error:
        if error.name not in REQUIRED:
            raise
        print(f"hlat: error: {missing_package(error.name).line()}", file=sys.stderr)
        return UserError.exit_code
    except KeyboardInterrupt:
        print("hlat: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if (code := output_failed(error)) is None:
            raise
        return code


def entry() -> None:
    """The console script."""
    open_closed_streams()
    from hlat.observe.redact import print_exception

    sys.excepthook = print_exception
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and stream.errors != "backslashreplace":
            stream.reconfigure(errors="replace")  # a character that the terminal lacks ends no run
    code: int | str | None = 0
    try:
        code = main()
    except SystemExit as ended:  # --help and --version print, too
        code = ended.code
    sys.exit(flushed(code))
