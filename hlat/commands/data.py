"""`hlat data`: train a tokenizer, tokenize text into packed shards, inspect them, find a step's documents."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hlat.errors import UserError
from hlat.paths import expand, folder_to_write

if TYPE_CHECKING:
    from hlat.data.examples import Examples
    from hlat.data.loader import Data
    from hlat.data.packed import TokenFolder
    from hlat.data.skips import Skips
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
            "--text-field", default="text", metavar="F", help="key or column of records (default: text)"
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
    inspect.add_argument("--verify", action="store_true", help="compare every file with its hash")
    inspect.add_argument("--recipe", metavar="R", help="what a run of this recipe would read from the folder")
    locate = actions.add_parser("locate", help="the documents that a step of a run was trained on")
    locate.add_argument("folder", type=expand, metavar="RUN", help="run folder")
    which = locate.add_mutually_exclusive_group(required=True)
    which.add_argument("--step", type=int, metavar="N", help="step of the run, as in metrics.jsonl")
    which.add_argument("--data-step", type=int, metavar="N", help="step of the data, as in data.skip")
    locate.add_argument("--row", type=int, metavar="N", help="only this row of the batch, counted from 0")
    locate.add_argument("--text", action="store_true", help="print their whole text too")


def main(args: argparse.Namespace) -> int:
    """Run one action. Raises UserError for wrong input."""
    actions = {
        "train-tokenizer": _train_tokenizer,
        "tokenize": _tokenize,
        "inspect": _inspect,
        "locate": _locate,
    }
    return actions[args.action](args)


def _sources(args: argparse.Namespace) -> list[Source]:
    from hlat.data.sources import STDLIB, resolve_source

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
    return sources


def _train_tokenizer(args: argparse.Namespace) -> int:
    from hlat.data.packed import holdout_threshold
    from hlat.data.tokenizer import load_tokenizer
    from hlat.data.train_tokenizer import check_vocab, train_bpe, training_texts

    check_vocab(args.vocab, "--vocab")
    if (args.out / "tokenizer.json").exists():
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
        print(f"{args.out} is there already, from the same text and tokenizer")
    _print_counts(TokenFolder(args.out))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from hlat.data.packed import SPLITS, TokenFolder
    from hlat.data.tokenizer import load_tokenizer

    folder = TokenFolder(args.folder)
    tokenizer = load_tokenizer(args.folder)
    folder.check_tokenizer(tokenizer)
    _print_counts(folder)
    if args.verify:
        shards = [shard for split in SPLITS for shard in folder.shards[split]]
        for shard in shards:
            shard.check_content()
        print(f"verified: {len(shards)} shards are what the manifest says")
    if args.recipe:
        _print_for_recipe(folder, tokenizer, args.recipe)
    shard = folder.shards["train"][0]
    size = min(int(shard.table[0, 0]) - 1, _SAMPLE_TOKENS)
    print(f"first {size} tokens of the first document:\n{tokenizer.decode(shard.tokens[:size].tolist())}")
    return 0


def _locate(args: argparse.Namespace) -> int:
    from hlat.observe.text import printable

    number = args.data_step if args.step is None else args.step
    if number < 1:
        flag = "--data-step" if args.step is None else "--step"
        raise UserError(f"there is no step {number}", where=flag, fix="steps are counted from 1")
    data, skips, steps = _data_of_run(args.folder)
    if args.step is not None and args.step > steps:
        fix = f"give a step up to {steps}, or --data-step {skips.position(args.step)} to look further on"
        raise UserError(f"the run has {steps} steps, not {args.step}", where="--step", fix=fix)
    step = args.data_step or skips.position(args.step)
    found = [entry for entry in data.locate(step) if args.row in (None, entry["row"])]
    read = f"step {args.step} reads data step {step}" if args.step else f"data step {step}"
    print(f"{read}: {len({entry['row'] for entry in found})} rows, {len(found)} documents")
    for entry in found:
        if "example" in entry:
            place = f"{entry['source']} example {entry['example']} (epoch {entry['epoch']})"
            size = f"{entry['tokens']} tokens"
        else:
            place = f"{entry['folder']}/{entry['shard']} document {entry['document']}"
            size = f"tokens {entry['first']}-{entry['last']} of {entry['tokens']}"
        print(f"row {entry['row']:>3}  {place}  {size}  hash {entry['hash']}")
        if args.text:
            print(f"{printable(data.document_text(entry))}\n")
    return 0


def _data_of_run(run: Path) -> tuple[Data | Examples, Skips, int]:
    """The data of a run, what the run leaves out of it, and its number of steps.

    Raises UserError for a folder that is no run, or data that is no longer what the run was trained on.
    """
    from hlat.checkpoint.peers import Peers
    from hlat.checkpoint.reader import newest_in
    from hlat.commands.recipe_file import load
    from hlat.data import open_data
    from hlat.data.skips import Skips
    from hlat.observe.jsonl import read_rows
    from hlat.observe.runfolder import RunFolder
    from hlat.train.initial import starting_tokenizer

    folder = RunFolder(run)
    if not folder.resolved.is_file():
        fix = "give the run.dir of a training run"
        raise UserError("not a run folder: it has no resolved.yaml", where=str(run), fix=fix)
    recipe = load(folder.resolved)
    data = open_data(recipe, tokenizer=starting_tokenizer(recipe, folder.checkpoints), quiet=True)
    newest = newest_in(folder.checkpoints, False, Peers())[0] if folder.checkpoints.is_dir() else None
    if newest is not None and newest.meta["data_fingerprint"] != data.fingerprint:
        raise UserError(
            "the data is not what the run was trained on (its text, order or tokenizer changed)",
            where=str(run),
            fix="restore the data; relative paths count from the working directory",
        )
    rows = read_rows(folder.metrics) if folder.metrics.is_file() else ()
    found = (row["skipped_data"] for row in rows if row.get("kind") == "anomaly" and "skipped_data" in row)
    return data, Skips(recipe.data.skip, tuple((first, last) for first, last in found)), recipe.run.steps


def _print_counts(folder: TokenFolder) -> None:
    manifest = folder.manifest
    tokenizer = manifest["tokenizer"]
    print(
        f"{folder.folder}: {folder.dtype.name}, tokenizer {tokenizer['spec']} ({folder.vocab_size:,} ids), ",
        end="",
    )
    print(f"identity {folder.tokenizer_identity[:16]}, content {folder.content_hash()[:16]}")
    for split in ("train", "holdout"):
        counts, shards = manifest["totals"][split], len(manifest["shards"][split])
        ratio = counts["bytes"] / counts["tokens"] if counts["tokens"] else 0.0
        print(
            f"  {split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens in {shards} shards,"
            f" {counts['bytes'] / 1e6:,.1f} MB of text ({ratio:.2f} bytes a token)"
        )
    for source in manifest["sources"]:
        print(f"  from {source['label']}: {source['files']:,} files, {source['bytes'] / 1e6:,.1f} MB")
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
