"""Training a byte-level BPE on the sources of a recipe."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from hlat.data.losses import Tally, count
from hlat.data.packed import document_hash
from hlat.data.partial import temporary
from hlat.data.readers import read_pieces
from hlat.data.sources import Source, units
from hlat.errors import UserError

END_OF_TEXT = "<|endoftext|>"
# The trainer keeps every distinct word in memory; merges of a vocabulary up to some ten thousands do not
# change with more text.
SAMPLE_BYTES = 256 * 2**20
_SPEC = re.compile(r"train:bpe-(\d+)")


def trained_vocab(spec: str) -> int | None:
    """The vocabulary size of a `train:bpe-4096` style spec, None for any other spec.

    Raises UserError for a malformed or too small one.
    """
    if not str(spec).startswith("train:"):
        return None
    match = _SPEC.fullmatch(spec)
    if not match:
        raise UserError(
            f"unknown tokenizer '{spec}'",
            where="data.tokenizer",
            fix="write train:bpe-SIZE, such as train:bpe-4096",
        )
    return check_vocab(int(match[1]), "data.tokenizer")


def check_vocab(size: int, where: str) -> int:
    """The size, if a byte-level BPE can have it. Raises UserError."""
    if not 257 <= size <= 2**24:
        raise UserError(
            f"a byte-level BPE cannot have {size} entries",
            where=where,
            fix="choose at least 257: 256 bytes and the end-of-document token",
        )
    return size


def training_texts(sources: list[Source], holdout_threshold: int, limit: int = SAMPLE_BYTES) -> Iterator[str]:
    """The documents to train on: never held-out ones.

    Of sources above `limit` bytes (compressed ones as they lie on the disk) an even sample, chosen by content
    hash: about that share of their documents. Where few documents are large, or all are below the held-out
    threshold, that may be none; then it is the one that is the nearest. Raises UserError for a source of
    which too much is no text (see `hlat.data.losses`).
    """
    share = limit / max(sum(source.size for source in sources), 1)
    chosen_below = int(min(share, 1.0) * (2**64 - holdout_threshold)) + holdout_threshold
    chosen, nearest = False, (-1, "")
    for source in sources:
        tally = Tally()
        for unit in units(source):
            for document in read_pieces(source.files, unit, source.text_field):
                if document.text is None:
                    count(tally.dropped, document)
                    continue
                content = document.text.encode("utf-8")
                tally.documents += 1
                tally.bytes += len(content)
                mark = document_hash(content)
                if holdout_threshold <= mark < chosen_below:
                    chosen = True
                    yield document.text
                elif not chosen and (rank := _nearness(mark, chosen_below)) > nearest[0]:
                    nearest = rank, document.text
        tally.check(source)
    if not chosen and nearest[0] >= 0:
        yield nearest[1]


def _nearness(mark: int, chosen_below: int) -> int:
    """Orders the hashes that were not chosen: of those that are trained on the smallest is the nearest, of
    those that would be held out the largest, which changes sides when no other is trained on.
    """
    return 2**65 - mark if mark >= chosen_below else mark


def train_bpe(texts: Iterator[str], vocab: int, folder: Path) -> Path:
    """Train a byte-level BPE and write `tokenizer.json` (and `tokenizer_config.json`) into the folder.

    Returns the former's path.

    Id 0 is `<|endoftext|>`, 1..256 the bytes, then the merges. Words are split by the GPT-2 pattern. The
    vocabulary is smaller than asked when the text has too few repeated pairs. Raises UserError when the
    folder cannot be written.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    path = folder / "tokenizer.json"
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for target, content in (
            (folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n"),
            (path, tokenizer.to_str(pretty=True)),
        ):
            unfinished = temporary(target)
            unfinished.write_text(content, encoding="utf-8")
            os.replace(unfinished, target)
    except OSError as error:
        raise UserError(
            f"cannot be written ({error.strerror})",
            where=str(folder),
            fix="choose a folder on a disk with space that you may write to",
        ) from error
    return path
