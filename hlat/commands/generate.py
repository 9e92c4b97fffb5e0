"""`hlat generate`: continue a prompt."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from hlat.errors import UserError
from hlat.paths import expand

TEMPERATURE = 0.8
"""Where neither an option nor the model's files say."""


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
    parser.add_argument(
        "--temperature", type=float, help="0 = greedy (default: generation_config.json's, else 0.8)"
    )
    parser.add_argument("--greedy", action="store_true", help="always the most likely token")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K most likely tokens; 0: all")
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
    from hlat.checkpoint.hf_generation import generation_defaults, left_out, left_out_line, rules_of
    from hlat.checkpoint.weights import load_model, model_config, open_weights, source_tokenizer
    from hlat.evaluate.generate import check_prompt, generate, room_after, stream_text
    from hlat.evaluate.target import parse_device
    from hlat.evaluate.text import codec_for
    from hlat.observe.terminal import unguarded
    from hlat.observe.text import argument_text

    text = argument_text(args.prompt, "--prompt")
    device = parse_device(args.device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = open_weights(args.checkpoint, lambda line: print(f"hlat: warning: {line}", file=sys.stderr))
    if source_tokenizer(source) is None:
        raise UserError(
            "has no tokenizer", where=str(args.checkpoint), fix="convert it from a folder that holds one"
        )
    config = model_config(source)
    codec = codec_for(source, config.vocab)
    prompt = codec.encode(text) or [codec.prefix_id]
    longest = config.max_seq_len
    check_prompt(prompt, longest)
    settings = generation_defaults(source.meta)
    drawing = _drawing(args, settings)
    if ignored := left_out(settings, drawn=drawing["temperature"] > 0):
        print(f"hlat: note: {left_out_line(ignored)}", file=sys.stderr)
    model = load_model(source, DTYPES[args.dtype], device)
    new_ids = generate(
        model,
        prompt,
        max_new_tokens=args.max_new_tokens,
        **drawing,
        rules=rules_of(settings),
        seed=args.seed,
        stop=codec.stop_ids,
        known=codec.tokenizer.vocab_size,
    )
    made: list[int] = []
    pieces = stream_text(codec.tokenizer, prompt, _noting(new_ids, made))
    begin = next(pieces, "")  # a model that has diverged says so before anything is printed
    # A terminal gets control characters escaped; another program, or a file, the text as it is.
    out = sys.stdout if sys.stdout.isatty() else unguarded(sys.stdout)
    print(f"{text}{begin}", end="", flush=True, file=out)
    for piece in pieces:
        print(piece, end="", flush=True, file=out)
    print(file=out)
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


def _drawing(args: argparse.Namespace, settings: Mapping[str, Any]) -> dict[str, Any]:
    """How tokens are drawn: as the options say, else as the model's files do. Raises UserError."""
    from hlat.checkpoint.hf_generation import DRAWING, FILE
    from hlat.evaluate.sampling import check_sampling

    given = {key: getattr(args, key, None) for key in DRAWING}
    wanted = {key: settings.get(key) if value is None else value for key, value in given.items()}
    greedy = args.greedy or (args.temperature is None and settings.get("do_sample") is False)
    if wanted["temperature"] is None:
        wanted["temperature"] = TEMPERATURE
    found = check_sampling(**wanted, where=FILE)
    return {**found, "temperature": 0.0} if greedy else found


def _check(args: argparse.Namespace) -> None:
    heat, share = args.temperature, args.top_p
    bounds = (
        ("--max-new-tokens", args.max_new_tokens >= 0, "write 0 or more"),
        ("--temperature", heat is None or 0 <= heat < math.inf, "write 0 (greedy) or more"),
        ("--top-k", args.top_k is None or args.top_k >= 0, "write 0 (all tokens) or more"),
        ("--seed", -(1 << 63) <= args.seed < 1 << 64, "write a number of at most 64 bits"),
        ("--top-p", share is None or 0 < share <= 1, "write a number above 0, at most 1"),
    )
    for option, fine, fix in bounds:
        if not fine:
            value = getattr(args, option[2:].replace("-", "_"))
            raise UserError(f"{value} is out of range", where=option, fix=fix)
