"""`hlat convert`: weights to and from Hugging Face, and from GGUF; whole checkpoints from NxD's files."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from hlat.errors import UserError
from hlat.paths import existing_file, existing_folder, expand, folder_to_write

_DTYPE = "bf16, fp16, fp32, or keep (as stored)"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the directions and their arguments."""
    ways = parser.add_subparsers(dest="way", required=True, metavar="to-hf | from-hf | from-gguf | from-nxd")
    to_hf = ways.add_parser("to-hf", help="a run or checkpoint to a folder for AutoModelForCausalLM")
    to_hf.add_argument(
        "source",
        type=expand,
        metavar="RUN_OR_CHECKPOINT",
        help="run folder (its newest checkpoint) or step folder",
    )
    to_hf.add_argument("--shard-size", default="5GB", help="most bytes in one file (default: 5GB)")
    from_hf = ways.add_parser("from-hf", help="a Hugging Face Llama folder to a checkpoint")
    from_hf.add_argument(
        "source", type=existing_folder, metavar="DIR", help="folder with config.json and safetensors files"
    )
    from_gguf = ways.add_parser("from-gguf", help="a llama.cpp file of a Llama model to a checkpoint")
    from_gguf.add_argument(
        "source", type=existing_file, metavar="FILE", help="the .gguf file; quantised tensors become fp32"
    )
    from_nxd = ways.add_parser(
        "from-nxd", help="a checkpoint in NxD's files to one of HLAT's, all of its state"
    )
    from_nxd.add_argument(
        "source",
        type=existing_folder,
        metavar="RUN_OR_DIR",
        help="run folder (its newest), or a folder with done and optim/",
    )
    from_nxd.add_argument(
        "out", type=folder_to_write, metavar="RUN", help="run folder; the checkpoint goes to its checkpoints/"
    )
    for way, default in ((to_hf, "bf16"), (from_hf, "keep"), (from_gguf, "keep")):
        way.add_argument("out", type=_new_folder, metavar="OUT", help="folder to create")
        way.add_argument("--dtype", choices=("bf16", "fp16", "fp32", "keep"), default=default, help=_DTYPE)


def _new_folder(text: str) -> Path:
    """A folder to create, whose name the libraries that write into it take."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("is not UTF-8 text", fix="choose a name that is") from None
    return folder_to_write(text)


def main(args: argparse.Namespace) -> int:
    """Convert; warnings go to stderr. A signal ends it with 128 + its number, once what is half-written is
    removed. Raises UserError for a source that cannot be converted.
    """
    from hlat.observe.failures import Terminated
    from hlat.observe.stopping import handling

    try:
        with handling(_ending()):
            return _convert(args)
    except Terminated as stopped:
        print(f"hlat: stopped by {signal.Signals(stopped.number).name}", file=sys.stderr)
        return 128 + stopped.number


def _ending() -> Callable[[int, FrameType | None], None]:
    """A handler whose first signal ends the command; others do not disturb the removal."""
    from hlat.observe.failures import Terminated

    came: list[int] = []

    def end(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        if len(came) == 1:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    return end


def _convert(args: argparse.Namespace) -> int:
    from hlat.checkpoint.hf import from_hf, parse_size, to_hf
    from hlat.checkpoint.weights import open_weights

    origin = ""
    if args.way == "to-hf":
        skipped: list[str] = []
        source, size = open_weights(args.source, skipped.append), parse_size(args.shard_size)
        warnings = skipped + to_hf(source, args.out, args.dtype, size)
        if (step := getattr(source, "step", None)) is not None:
            origin = f" from step {step:,} ({source.path})"
    elif args.way == "from-hf":
        warnings = from_hf(args.source, args.out, args.dtype)
    elif args.way == "from-nxd":
        from hlat.checkpoint.nxd import from_nxd

        warnings = from_nxd(args.source, args.out)
    else:
        from hlat.checkpoint.gguf import from_gguf

        warnings = from_gguf(args.source, args.out, args.dtype)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    files = [path for path in args.out.rglob("*") if path.is_file()]
    size_mb = sum(path.stat().st_size for path in files) / 1e6
    print(f"wrote {args.out}{origin}: {len(files)} files, {size_mb:,.1f} MB")
    return 0
