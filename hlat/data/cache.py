"""The cache of trained tokenizers and tokenized sources: `$XDG_CACHE_HOME/hlat`, by default `~/.cache/hlat`.

    tokenizers/<key>/tokenizer.json      key: content of the sources, vocabulary size, held-out fraction
    tokens/<key>/manifest.json, …        key: content of the source, tokenizer, held-out fraction
    staged/<key>/manifest.json, …        a tokenized folder of a store; key: its manifest

Entries are never changed; deleting any of them, or all, is safe while no run reads them.
"""

from __future__ import annotations

import os
from pathlib import Path

from hlat.data.build import build, build_key
from hlat.data.lock import locked_folder
from hlat.data.packed import disk_error, holdout_threshold
from hlat.data.partial import discard
from hlat.data.progress import tokenizing
from hlat.data.sources import Source, identity, refuse_changed
from hlat.data.tokenizer import Tokenizer, load_tokenizer
from hlat.data.train_tokenizer import train_bpe, training_texts
from hlat.errors import UserError
from hlat.storage.blocks import Reading, watching
from hlat.storage.fingerprint import digest_of
from hlat.storage.user_cache import cache_root


def tokenizer_key(sources: list[Source], vocab: int, holdout: float) -> str:
    """Fingerprint of all that decides a trained tokenizer."""
    contents = [identity(source) for source in sources]
    return digest_of({"bpe": 3, "vocab": vocab, "holdout": holdout_threshold(holdout), "sources": contents})


def trained_tokenizer(sources: list[Source], vocab: int, holdout: float, quiet: bool = False) -> Tokenizer:
    """The byte-level BPE of this size for these sources, trained unless the cache has it.

    Raises UserError.
    """
    below = holdout_threshold(holdout)
    key = tokenizer_key(sources, vocab, holdout)
    folder = cache_root() / "tokenizers" / key[:32]
    path = folder / "tokenizer.json"
    if not path.is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with locked_folder(folder.with_name(f"{folder.name}.partial")) as partial:
                if not path.is_file():
                    _train_into(partial, sources, vocab, below, quiet)
                    os.rename(partial, folder)
                    (folder / ".lock").unlink(missing_ok=True)
                else:
                    discard(partial)
        except OSError as error:
            if not path.is_file():
                raise disk_error(error, folder) from error
    return load_tokenizer(path)


def _train_into(partial: Path, sources: list[Source], vocab: int, below: int, quiet: bool) -> None:
    try:
        with tokenizing(f"training a BPE of {vocab:,} entries", quiet), watching(Reading()) as reading:
            train_bpe(training_texts(sources, below), vocab, partial)
        refuse_changed(sources, "read for a tokenizer", reading)
    except UserError:
        discard(partial)
        raise


def tokenized(
    source: Source, tokenizer: Tokenizer, holdout: float, workers: int | None = None, quiet: bool = False
) -> Path:
    """The folder with the tokens of the source, built unless the cache has it. Raises UserError."""
    key = build_key([source], tokenizer, holdout)
    out = cache_root() / "tokens" / key[:32]
    with tokenizing(f"tokenizing {source.label}", quiet) as bar:
        built = build(
            [source], tokenizer, out, holdout=holdout, workers=workers, key=key, progress=bar.update
        )
        bar.finish(built)
    return out
