"""`hlat generate`: continue a prompt."""

from __future__ import annotations

import argparse
import sys

from hlat.errors import UserError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="run folder, step folder or Hugging Face folder"
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
    from hlat.checkpoint.hf_tokenizer import generation_stops, prompt_ids
    from hlat.checkpoint.weights import load_model, model_config, open_weights, source_tokenizer
    from hlat.evaluate.generate import check_prompt, generate, stream_text
    from hlat.evaluate.target import parse_device
    from hlat.observe.text import argument_text, printable

    text = argument_text(args.prompt, "--prompt")
    device = parse_device(args.device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = open_weights(args.checkpoint)
    tokenizer = source_tokenizer(source)
    if tokenizer is None:
        raise UserError(
            "has no tokenizer", where=args.checkpoint, fix="convert it from a folder that holds one"
        )
    if "huggingface" in source.meta and source.tokenizer is not None:
        prompt = prompt_ids(source.tokenizer, text)
    else:
        prompt = tokenizer.encode(text)  # HLAT's stream has no BOS
    check_prompt(prompt, model_config(source).max_seq_len)
    model = load_model(source, DTYPES[args.dtype], device)
    new_ids = generate(
        model,
        prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=0.0 if args.greedy else args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=generation_stops(source.meta).union(() if tokenizer.eos_id is None else (tokenizer.eos_id,)),
    )
    print(text, end="", flush=True)
    shown = printable if sys.stdout.isatty() else str
    for piece in stream_text(tokenizer, prompt, new_ids):
        print(shown(piece), end="", flush=True)
    print()
    return 0


def _check(args: argparse.Namespace) -> None:
    bounds = (
        ("--max-new-tokens", args.max_new_tokens >= 0, "write 0 or more"),
        ("--temperature", args.temperature >= 0, "write 0 (greedy) or more"),
        ("--top-k", args.top_k is None or args.top_k >= 1, "write 1 or more"),
        ("--top-p", args.top_p is None or 0 < args.top_p <= 1, "write a number above 0, at most 1"),
    )
    for option, fine, fix in bounds:
        if not fine:
            value = getattr(args, option[2:].replace("-", "_"))
            raise UserError(f"{value} is out of range", where=option, fix=fix)
