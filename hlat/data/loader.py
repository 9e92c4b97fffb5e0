"""`open_data`: from the data section of a recipe to batches of any step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hlat.data.apart import check_apart
from hlat.data.batch import Batch, make_batch, rows_of
from hlat.data.cache import tokenized, trained_tokenizer
from hlat.data.content import examples_content, source_content
from hlat.data.convention import difference, extends
from hlat.data.examples import Examples, open_examples
from hlat.data.holdout import HoldoutStream
from hlat.data.locate import document_ids, documents_in, rows_in
from hlat.data.losses import ALLOWED
from hlat.data.mixture import SourceRows, TrainStream
from hlat.data.packed import TokenFolder
from hlat.data.report import report, report_lines
from hlat.data.sources import Source, resolve_source, tokenized_folder
from hlat.data.staged import is_url, staged
from hlat.data.tokenizer import Tokenizer, load_tokenizer
from hlat.data.train_tokenizer import trained_vocab
from hlat.data.verify import check_before_training
from hlat.errors import UserError
from hlat.storage.blocks import Reading, watching

if TYPE_CHECKING:
    from hlat.recipe import Recipe


@dataclass(frozen=True)
class SourceSpec:
    """One entry of `data.sources`: exactly one of `path` and `dataset`."""

    path: str | None = None
    dataset: str | None = None
    weight: float = 1.0
    text_field: str = "text"
    allow_dropped: float = ALLOWED


class Data:
    """Tokenized sources, opened. Holds no position: every method is a function of its arguments.

    Args:
        folders: one tokenized folder per source.
        weights: one weight per source, any scale.
        seed: seed of the training order.
        rows: rows of the whole run, for the report.
    """

    def __init__(
        self,
        folders: Sequence[TokenFolder],
        weights: Sequence[float],
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        document_mask: bool,
        seed: int,
        rows: int = 0,
        global_batch: int = 0,
    ) -> None:
        for folder in folders:
            folder.check_tokenizer(tokenizer)
        assert tokenizer.eos_id is not None
        self.folders, self.tokenizer, self.vocab_size = list(folders), tokenizer, tokenizer.vocab_size
        self.content: dict[str, str] = {}  # recipe key -> digest of what was read for it
        self._seq_len, self._mask, self._rows = seq_len, document_mask, rows
        self._global_batch, self._eos = global_batch, tokenizer.eos_id
        self.bos_id = _common_bos(folders)
        sources = [
            SourceRows(folder.shards["train"], seq_len, seed, number, f"data.sources[{number}]")
            for number, folder in enumerate(folders)
        ]
        self.train = TrainStream(sources, weights, self._eos, document_mask)
        self.holdout = HoldoutStream(folders, tokenizer, seq_len, document_mask, self.bos_id)

    @property
    def fingerprint(self) -> str:
        """Hash (hex sha256) of what the rows hold.

        Shards, tokenizer, weights, held-out fractions, seq_len, document_mask. Not the seed.
        """
        content = {
            "shards": [folder.content_hash() for folder in self.folders],
            "tokenizer": self.tokenizer.identity,
            "shares": self.train.quota.shares,
            "holdout": [folder.holdout for folder in self.folders],
            "seq_len": self._seq_len,
            "document_mask": self._mask,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def batches(
        self, step: int, micro_batch: int, accumulate: int, rank: int = 0, world: int = 1
    ) -> list[Batch]:
        """The micro-batches of one rank in global step `step` (from 0), as `hlat.data.batch.rows_of` counts
        rows. Raises ValueError when they are not the recipe's global batch.
        """
        rows = rows_of(step, micro_batch, accumulate, rank, world, self._global_batch)
        return [
            make_batch(np.stack([self.train.ids(row) for row in part]), self._eos, self._mask, self.bos_id)
            for part in rows
        ]

    def locate(self, step: int) -> list[dict[str, Any]]:
        """The documents in the global batch of data step `step` (from 1): see `hlat.data.locate`; each with
        `row`, its place in the batch.
        """
        rows = enumerate(rows_in(step, self._global_batch))
        return [{"row": place, **found} for place, row in rows for found in documents_in(self, row)]

    def document_text(self, found: dict[str, Any]) -> str:
        """The whole text of a document that `locate` has found, as its tokens spell it."""
        return self.tokenizer.decode(document_ids(self, found).tolist())

    def holdout_batches(self, batch_size: int, rows: int | None = None) -> Iterator[Batch]:
        """The held-out text from its beginning, always the same.

        At most `rows` rows, in batches of `batch_size`, the last one filled up without targets.
        """
        return self.holdout.batches(batch_size, rows)

    def holdout_content(self) -> str:
        """Hash (hex sha256) of the held-out text."""
        return self.holdout.content()

    def holdout_bytes(self, rows: int | None = None) -> int:
        """Bytes of text whose tokens are the targets of so many rows."""
        return self.holdout.text_bytes(rows)

    def holdout_bytes_per_token(self, rows: int | None = None) -> float:
        """Bytes of text per target: bits per byte = mean loss in nats / ln 2 / this.

        NaN when nothing is held out.
        """
        targets = self.holdout.targets_in(rows)
        return self.holdout_bytes(rows) / targets if targets else float("nan")

    def holdout_text(self, rows: int | None = None) -> bytes:
        """The text that `holdout_bytes` counts, to give to gzip or xz for comparison.

        Exact for byte-level tokenizers.
        """
        return self.holdout.text(rows)

    def report(self) -> dict[str, Any]:
        """Documents, tokens, shards, epochs of this run and everything dropped, per source, and the totals.

        JSON-able.
        """
        return report(self, self._rows)

    def report_lines(self) -> list[str]:
        """The report as lines for a person."""
        return report_lines(self.report())


def _common_bos(folders: Sequence[TokenFolder]) -> int | None:
    """What all documents begin with. Raises UserError when those of some folders do and others do not."""
    found = {folder.bos_id for folder in folders}
    if len(found) > 1:
        without = next((number for number, folder in enumerate(folders) if folder.bos_id is None), 0)
        raise UserError(
            "the documents of this folder do not begin with the BOS that those of other sources begin with",
            where=f"data.sources[{without}].path: {folders[without].folder}",
            fix="tokenize it again, with the same tokenizer and hlat data tokenize --bos",
        )
    return found.pop() if found else None


def prepare(
    specs: Sequence[SourceSpec],
    tokenizer: str | Tokenizer,
    holdout: float,
    *,
    max_vocab: int | None = None,
    workers: int | None = None,
    quiet: bool = False,
    of_weights: Tokenizer | None = None,
) -> tuple[list[TokenFolder], Tokenizer]:
    """The tokenized folder of every source and their tokenizer; what is not there yet is built in the cache.

    A source whose path holds a manifest.json is taken as it is. `of_weights`: see `open_data`. Raises
    UserError (see the module's parts), also when the tokenizer has more than `max_vocab` ids.
    """
    specs = [
        replace(spec, path=str(staged(str(spec.path), f"data.sources[{number}].path", quiet)))
        if is_url(spec.path)
        else spec
        for number, spec in enumerate(specs)
    ]
    if isinstance(tokenizer, str) and is_url(tokenizer):
        tokenizer = str(staged(tokenizer, "data.tokenizer", quiet))
    ready = [tokenized_folder(spec.path) for spec in specs]
    texts: list[Source | None] = [
        None
        if folder
        else resolve_source(
            path=spec.path,
            dataset=spec.dataset,
            text_field=spec.text_field,
            allow_dropped=spec.allow_dropped,
            where=f"data.sources[{number}]",
        )
        for number, (spec, folder) in enumerate(zip(specs, ready, strict=True))
    ]
    loaded = _tokenizer(tokenizer, [text for text in texts if text], ready, holdout, max_vocab, quiet)
    loaded = _agreed(loaded, of_weights)
    folders = []
    for number, (text, folder) in enumerate(zip(texts, ready, strict=True)):
        path = folder or (tokenized(text, loaded, holdout, workers, quiet) if text else Path())
        folders.append(TokenFolder(path))
        folders[-1].named = [text] if text else []
        folders[-1].check_tokenizer(loaded)
        check_before_training(folders[-1])
        if folders[-1].holdout != holdout:
            raise UserError(
                f"the folder was tokenized with holdout {folders[-1].holdout:g}, the recipe says {holdout:g}",
                where=f"data.sources[{number}].path: {path}",
                fix=f"set data.holdout to {folders[-1].holdout:g}, or tokenize again",
            )
    if holdout and not any(folder.count("holdout") for folder in folders):
        raise UserError(
            "the sources hold one document, which cannot be split",
            where="data.holdout",
            fix="give at least two documents (several files, or jsonl), or set data.holdout to 0",
        )
    return folders, loaded


def _tokenizer(
    spec: str | Tokenizer,
    texts: list[Source],
    ready: list[Path | None],
    holdout: float,
    max_vocab: int | None,
    quiet: bool,
) -> Tokenizer:
    if isinstance(spec, Tokenizer):
        refuse_many_ids(spec.vocab_size, max_vocab, spec.spec)
        return spec
    vocab = trained_vocab(spec)
    if vocab is None:
        loaded = load_tokenizer(spec)
        refuse_many_ids(loaded.vocab_size, max_vocab, spec)
        return loaded
    folder = next((folder for folder in ready if folder), None)
    if folder:
        raise UserError(
            f"'{spec}' needs text, a source is tokenized already",
            where="data.tokenizer",
            fix=f"set data.tokenizer to '{folder}'",
        )
    refuse_many_ids(vocab, max_vocab, spec)
    return trained_tokenizer(texts, vocab, holdout, quiet)


def _agreed(named: Tokenizer, of_weights: Tokenizer | None) -> Tokenizer:
    """The tokenizer of the weights in place of the one a recipe names, where their ids mean the same: it
    knows about BOS and chat templates.
    """
    if of_weights is None or named is of_weights:
        return named
    if not difference(named, of_weights):
        return of_weights
    if extends(named, of_weights):
        named.convention = of_weights.convention
    return named


def refuse_many_ids(size: int, limit: int | None, spec: str) -> None:
    """Raise UserError for a tokenizer with more ids than the model has."""
    if limit is not None and size > limit:
        raise UserError(
            f"the tokenizer '{spec}' has {size:,} ids, model.vocab is {limit:,}",
            where="model.vocab",
            fix=f"set model.vocab to {size} or more",
        )


def open_data(
    recipe: Recipe,
    *,
    tokenizer: Tokenizer | None = None,
    workers: int | None = None,
    quiet: bool = False,
) -> Data | Examples:
    """The data of a recipe: packed text, or examples to finetune on.

    Builds tokenizer and shards when they are not in the cache; every process of a run may call it at once.
    `tokenizer` is the one of `init.from`: for recipes whose `data.tokenizer` is `init`, and in place of a
    named one whose ids mean the same.

    Raises UserError: missing or empty source, one that holds the run folder, tokenizer and model or shards
    that do not fit, truncated shard, full disk.
    """
    check_apart(recipe)
    data = recipe.data
    spec: str | Tokenizer = str(data.tokenizer)
    if spec == "init":
        if tokenizer is None:
            raise ValueError("data.tokenizer is 'init': open_data needs the tokenizer of init.from")
        spec = tokenizer
    if data.examples is not None:
        loaded = _agreed(spec if isinstance(spec, Tokenizer) else load_tokenizer(spec), tokenizer)
        refuse_many_ids(loaded.vocab_size, recipe.model.vocab, loaded.spec)
        with watching(Reading()) as reading:
            examples = open_examples(recipe, loaded)
        examples.content = examples_content(data.examples, reading)
        return examples
    specs = [SourceSpec(s.path, s.dataset, s.weight, s.text_field, s.allow_dropped) for s in data.sources]
    folders, tokenizer = prepare(
        specs,
        spec,
        data.holdout,
        max_vocab=recipe.model.vocab,
        workers=workers,
        quiet=quiet,
        of_weights=tokenizer,
    )
    opened = Data(
        folders,
        [spec.weight for spec in specs],
        tokenizer,
        seq_len=data.seq_len,
        document_mask=data.document_mask,
        seed=recipe.run.seed,
        rows=recipe.run.steps * data.global_batch,
        global_batch=data.global_batch,
    )
    opened.content = {
        f"data.sources.{number}": source_content(folder) for number, folder in enumerate(folders)
    }
    return opened
