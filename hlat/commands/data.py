"""`hlat data`: train a tokenizer, tokenize text into packed shards, inspect and verify them, find a step's
documents."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hlat.commands import data_locate
from hlat.errors import UserError
from hlat.paths import expand, folder_to_write

if TYPE_CHECKING:
    from hlat.data.packed import TokenFolder
    from hlat.data.sources import Source
    from hlat.data.tokenizer import Tokenizer

_SOURCE_HELP = "file, folder, python-stdlib, or dataset:NAME[:CONFIG][@SPLIT] from Hugging Face"
_SAMPLE_TOKENS = 120


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    train = actions.add_parser("train-tokenizer", help="train a byte-level BPE on text")
    train.add_argument("sources", nargs="+", metavar="SRC", help=_SOURCE_HELP)
    train.add_argument("--vocab", type=int, required=True, metavar="N", help="entries, at least 257")
    train.add_argument(
        "--out", type=folder_to_write, required=True, metavar="DIR", help="folder for tokenizer.json"
    )
    tokenize = actions.add_parser("tokenize", help="tokenize text into a folder of packed shards")
    tokenize.add_argument("sources", nargs="+", metavar="SRC", help=_SOURCE_HELP)
    tokenize.add_argument(
        "--tokenizer",
        required=True,
        metavar="T",
        help=".model, tokenizer.json, folder, bytes or train:bpe-SIZE",
    )
    tokenize.add_argument("--bos", action="store_true", help="begin each document with the tokenizer's BOS")
    tokenize.add_argument(
        "--out", type=folder_to_write, required=True, metavar="DIR", help="folder to create"
    )
    tokenize.add_argument("--workers", type=int, metavar="N", help="processes (default: all cores)")
    for action in (train, tokenize):
        action.add_argument(
            "--text-field",
            default="text",
            metavar="F",
            help="key or column of records, a.b for one inside a (default: text)",
        )
        action.add_argument(
            "--allow-dropped",
            type=float,
            default=0.5,
            metavar="F",
            help="largest fraction of a source that may be no text (default: 0.5)",
        )
        action.add_argument(
            "--holdout",
            type=float,
            default=0.01,
            metavar="F",
            help="fraction of documents held out (default: 0.01)",
        )
    inspect = actions.add_parser(
        "inspect", help="counts, tokenizer, what was dropped, and a sample of a tokenized folder"
    )
    inspect.add_argument("folder", type=expand, metavar="DIR")
    inspect.add_argument(
        "--verify", action="store_true", help=argparse.SUPPRESS
    )  # gone: says what replaces it
    inspect.add_argument("--recipe", metavar="R", help="what a run of this recipe would read from the folder")
    verify = actions.add_parser("verify", help="compare all of a tokenized folder with what was written")
    verify.add_argument("folder", type=expand, metavar="DIR")
    verify.add_argument(
        "--json", action="store_true", help='print {"ok": …, "bad": [{"file": …, "reason": …}]}'
    )
    locate = actions.add_parser("locate", help="the documents that a step was trained on, by file and line")
    data_locate.configure(locate)


def main(args: argparse.Namespace) -> int:
    """Run one action. Raises UserError for wrong input."""
    actions = {
        "train-tokenizer": _train_tokenizer,
        "tokenize": _tokenize,
        "inspect": _inspect,
        "verify": _verify,
        "locate": data_locate.main,
    }
    return actions[args.action](args)


def _sources(args: argparse.Namespace) -> list[Source]:
    from hlat.data.sources import STDLIB, resolve_source

    if not 0 <= args.allow_dropped <= 1:
        fix = "give a fraction from 0 to 1"
        raise UserError(f"{args.allow_dropped} is no share of a source", where="--allow-dropped", fix=fix)
    sources = []
    for text in args.sources:
        if text.startswith("dataset:"):
            sources.append(
                resolve_source(dataset=text.removeprefix("dataset:"), text_field=args.text_field, where=text)
            )
        elif text == STDLIB and not Path(text).exists():
            sources.append(resolve_source(dataset=text, where=text))
        else:
            sources.append(resolve_source(path=text, text_field=args.text_field, where="SRC"))
    for source in sources:
        source.allow_dropped = args.allow_dropped
    return sources


def _train_tokenizer(args: argparse.Namespace) -> int:
    from hlat.data.packed import holdout_threshold
    from hlat.data.tokenizer import load_tokenizer
    from hlat.data.train_tokenizer import check_vocab, train_bpe, training_texts

    check_vocab(args.vocab, "--vocab")
    if any(os.path.lexists(args.out / name) for name in ("tokenizer.json", "tokenizer_config.json")):
        raise UserError(
            f"'{args.out}' holds a tokenizer already", where="--out", fix="delete it or choose another folder"
        )
    path = train_bpe(training_texts(_sources(args), holdout_threshold(args.holdout)), args.vocab, args.out)
    tokenizer = load_tokenizer(path)
    print(f"{path}: {tokenizer.vocab_size:,} entries, identity {tokenizer.identity[:16]}")
    if tokenizer.vocab_size < args.vocab:
        print(f"the text has too few repeated pairs for {args.vocab:,} entries", file=sys.stderr)
    return 0


def _tokenize(args: argparse.Namespace) -> int:
    from hlat.data.build import build
    from hlat.data.cache import trained_tokenizer
    from hlat.data.convention import Convention
    from hlat.data.origins import shown
    from hlat.data.packed import TokenFolder
    from hlat.data.progress import tokenizing
    from hlat.data.tokenizer import load_tokenizer
    from hlat.data.train_tokenizer import trained_vocab
    from hlat.host.limits import cores

    if args.workers is not None and args.workers < 1:
        raise UserError(f"{args.workers} processes cannot work", where="--workers", fix="give 1 or more")
    sources = _sources(args)
    vocab = trained_vocab(args.tokenizer)
    tokenizer = (
        trained_tokenizer(sources, vocab, args.holdout)
        if vocab
        else load_tokenizer(args.tokenizer, where="--tokenizer")
    )
    if args.bos and tokenizer.bos_id is None:
        raise UserError("the tokenizer has no BOS", where="--bos", fix="leave it out")
    tokenizer.convention = Convention(bos=tokenizer.bos_id if args.bos else None)
    workers = args.workers or cores()
    with tokenizing(f"tokenized with {workers} processes") as bar:
        built = build(
            sources, tokenizer, args.out, holdout=args.holdout, workers=workers, progress=bar.update
        )
        bar.finish(built)
    if not built.seconds:
        print(f"{shown(str(args.out))} is there already, from the same text and tokenizer")
    _print_counts(TokenFolder(args.out))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from hlat.data.packed import TokenFolder
    from hlat.data.tokenizer import load_tokenizer

    if args.verify:
        fix = f"run: hlat data verify {args.folder}"
        raise UserError("inspect no longer compares hashes", where="--verify", fix=fix)
    folder = TokenFolder(args.folder)
    tokenizer = load_tokenizer(args.folder)
    folder.check_tokenizer(tokenizer)
    _print_counts(folder)
    if args.recipe:
        _print_for_recipe(folder, tokenizer, args.recipe)
    if not folder.shards["train"]:
        return 0
    shard = folder.shards["train"][0]
    size = min(int(shard.table[0, 0]) - 1, _SAMPLE_TOKENS)
    print(f"first {size} tokens of the first document:\n{tokenizer.decode(shard.tokens[:size].tolist())}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from hlat.data.verify import as_json, verify
    from hlat.observe.terminal import one_line

    bad = verify(args.folder)
    if args.json:
        print(json.dumps(as_json(bad)))
    elif bad:
        for entry in bad:
            print(one_line(f"{args.folder / entry.file}: {entry.reason}"))
        fix = "restore these files, or run `hlat data tokenize` again, with another --out"
        print(f"{len(bad)} fault{'s' * (len(bad) != 1)}: {fix}")
    else:
        print(f"{args.folder} is whole")
    return 2 if bad else 0


def _print_counts(folder: TokenFolder) -> None:
    from hlat.data.origins import shown
    from hlat.data.progress import text_size

    manifest = folder.manifest
    tokenizer = manifest["tokenizer"]
    name, spec = shown(str(folder.folder)), shown(tokenizer["spec"])
    print(f"{name}: {folder.dtype.name}, tokenizer {spec} ({folder.vocab_size:,} ids), ", end="")
    print(f"identity {folder.tokenizer_identity[:16]}, content {folder.content_hash()[:16]}")
    for split in ("train", "holdout"):
        counts = manifest["totals"][split]
        ratio = counts["bytes"] / counts["tokens"] if counts["tokens"] else 0.0
        print(
            f"  {split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens,"
            f" {text_size(counts['bytes'])} of text ({ratio:.2f} bytes a token)"
        )
    for source in manifest["sources"]:
        print(f"  from {shown(source['label'])}: {source['files']:,} files, {text_size(source['bytes'])}")
        for reason, count in source["skipped"].items():
            print(f"    skipped: {count:,} x {reason}")
    for reason, entry in manifest["dropped"].items():
        documents = f"{entry['count']:,} document{'s' * (entry['count'] != 1)}"
        print(f"  dropped: {documents}: {reason} (such as {', '.join(entry['examples'])})")


def _print_for_recipe(folder: TokenFolder, tokenizer: Tokenizer, path: str) -> None:
    from hlat.data.loader import Data
    from hlat.recipe import load

    recipe = load(path)
    if tokenizer.vocab_size > recipe.model.vocab:
        raise UserError(
            f"the folder's tokenizer has {tokenizer.vocab_size:,} ids, model.vocab is {recipe.model.vocab:,}",
            where=f"{path}: model.vocab",
            fix=f"set it to {tokenizer.vocab_size} or more",
        )
    rows = recipe.run.steps * recipe.data.global_batch
    data = Data(
        [folder],
        [1.0],
        tokenizer,
        seq_len=recipe.data.seq_len,
        document_mask=recipe.data.document_mask,
        seed=recipe.run.seed,
        rows=rows,
    )
    print(f"as the only source of {path}:")
    print("\n".join(data.report_lines()))
