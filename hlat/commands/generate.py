"""`hlat generate`: continue a prompt."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from hlat.errors import UserError
from hlat.paths import expand


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "checkpoint",
        type=expand,
        metavar="CHECKPOINT",
        help="run folder, step folder or Hugging Face folder",
    )
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="default: 100")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = greedy (default: 0.8)")
    parser.add_argument("--greedy", action="store_true", help="always the most likely token")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K most likely tokens")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw among the tokens that make up probability P"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: 0)")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="compute in (default: fp32)"
    )
    parser.add_argument("--device", help="cpu, cuda, … (default: cuda if there is one)")


def main(args: argparse.Namespace) -> int:
    """Print the prompt and its continuation as it is made. Raises UserError for bad input."""
    _check(args)
    import torch

    from hlat.checkpoint.hf_config import DTYPES
    from hlat.checkpoint.weights import load_model, model_config, open_weights, source_tokenizer
    from hlat.evaluate.generate import check_prompt, generate, room_after, stream_text
    from hlat.evaluate.target import parse_device
    from hlat.evaluate.text import codec_for
    from hlat.observe.text import argument_text, printable

    text = argument_text(args.prompt, "--prompt")
    device = parse_device(args.device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = open_weights(args.checkpoint)
    if source_tokenizer(source) is None:
        raise UserError(
            "has no tokenizer", where=str(args.checkpoint), fix="convert it from a folder that holds one"
        )
    config = model_config(source)
    codec = codec_for(source, config.vocab)
    prompt = codec.encode(text) or [codec.prefix_id]
    longest = config.max_seq_len
    check_prompt(prompt, longest)
    model = load_model(source, DTYPES[args.dtype], device)
    new_ids = generate(
        model,
        prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=0.0 if args.greedy else args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=codec.stop_ids,
        known=codec.tokenizer.vocab_size,
    )
    made: list[int] = []
    pieces = stream_text(codec.tokenizer, prompt, _noting(new_ids, made))
    begin = next(pieces, "")  # a model that has diverged says so before anything is printed
    shown = printable if sys.stdout.isatty() else str
    print(f"{text}{shown(begin)}", end="", flush=True)
    for piece in pieces:
        print(shown(piece), end="", flush=True)
    print()
    room = room_after(prompt, longest)
    if len(made) == room < args.max_new_tokens:
        full = f"the model's context of {longest:,} tokens is full"
        print(f"hlat: note: {full}: {room:,} of {args.max_new_tokens:,} tokens were made", file=sys.stderr)
    return 0


def _noting(ids: Iterator[int], made: list[int]) -> Iterator[int]:
    """The ids, each also appended to `made`."""
    for index in ids:
        made.append(index)
        yield index


def _check(args: argparse.Namespace) -> None:
    bounds = (
        ("--max-new-tokens", args.max_new_tokens >= 0, "write 0 or more"),
        ("--temperature", args.temperature >= 0, "write 0 (greedy) or more"),
        ("--top-k", args.top_k is None or args.top_k >= 1, "write 1 or more"),
        ("--seed", -(1 << 63) <= args.seed < 1 << 64, "write a number of at most 64 bits"),
        ("--top-p", args.top_p is None or 0 < args.top_p <= 1, "write a number above 0, at most 1"),
    )
    for option, fine, fix in bounds:
        if not fine:
            value = getattr(args, option[2:].replace("-", "_"))
            raise UserError(f"{value} is out of range", where=option, fix=fix)
