"""Finetuning data: examples of a prompt and its completion or label, each in a row of its own.

The same methods as `hlat.data.loader.Data`. Row i of a run is a pure function of the seed and i: each epoch
goes through all examples in a permutation of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hlat.data.batch import Batch, rows_of
from hlat.data.chat import Chat
from hlat.data.example_ids import (
    Kind,
    Split,
    cut_prompts,
    encode_labelled,
    encode_pairs,
    encode_prompts,
    longest_spelling,
)
from hlat.data.example_rows import label_batch, pair_batch, rows_per_example
from hlat.data.example_text import Example, Texts, read_examples
from hlat.data.joint import Joint
from hlat.data.locate import place_values, rows_in
from hlat.data.mixture import permute
from hlat.data.packed import document_hash
from hlat.data.template import parse_template
from hlat.errors import UserError

if TYPE_CHECKING:
    from hlat.data.tokenizer import Tokenizer
    from hlat.recipe import Recipe
    from hlat.recipe_sections import ExamplesSection


class Examples:
    """Finetuning examples, opened. Holds no position: every method is a function of its arguments.

    Args:
        train, holdout: both sides of the held-out split.
        kind: what rows are for.
        labels: names of the labels; empty for pairs.
        tokenizer: that of the ids.
        seq_len, seed, global_batch: as in the recipe.
        rows: rows of the whole run, for the report.
        source: what the report calls the examples. notes: its further lines.
        marks: whether their templates have special tokens. turn_end: id of the one that ends an answer of
            conversations, if any.
    """

    def __init__(
        self,
        train: Split,
        holdout: Split,
        kind: Kind,
        labels: Sequence[str],
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        seed: int,
        global_batch: int = 0,
        rows: int = 0,
        source: str = "",
        notes: Sequence[str] = (),
        marks: bool = False,
        turn_end: int | None = None,
    ) -> None:
        assert tokenizer.eos_id is not None
        self.content: dict[str, str] = {}  # recipe key -> digest of what was read for it
        self.train, self.holdout, self.kind, self.labels = train, holdout, kind, list(labels)
        self.spelled = longest_spelling([train, holdout])  # for the shape of the rows
        self._alike = len({id(words) for split in (train, holdout) for words in split.spelled}) <= 1
        self.tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size
        self._seq_len, self._seed, self._global_batch = seq_len, seed, global_batch
        self.marks, self.turn_end = marks, turn_end
        self._rows, self._source, self._notes = rows, source, list(notes)
        self._fill = tokenizer.eos_id

    @property
    def rows_per_example(self) -> int:
        """Rows of a training batch for each example."""
        return rows_per_example(self.spelled) if self.kind == "words" else 1

    @property
    def fingerprint(self) -> str:
        """Hash (hex sha256) of what the rows hold: ids, labels, kind, tokenizer, seq_len. Not the seed."""
        digest = hashlib.sha256()
        head = [self.kind, self.labels, self.tokenizer.identity, self._seq_len]
        digest.update(json.dumps(head, sort_keys=True).encode())
        for split in (self.train, self.holdout):
            digest.update(f"\n{split.documents} {split.labels}".encode())
            for ids in [*self.spelled, *split.prompts, *split.completions]:
                digest.update(len(ids).to_bytes(4, "little") + ids.astype("<i8").tobytes())
            for learned in split.learned:
                digest.update(
                    b"" if learned is None else len(learned).to_bytes(4, "little") + learned.tobytes()
                )
            for ids in (ids for words in split.spelled if not self._alike for ids in words):
                digest.update(len(ids).to_bytes(4, "little") + ids.astype("<i8").tobytes())
        return digest.hexdigest()

    def index(self, row: int) -> int:
        """The training example in a global row >= 0 of the run."""
        epoch, within = divmod(row, self.train.documents)
        return permute(within, self.train.documents, self._seed, 0, epoch)

    def batches(
        self, step: int, micro_batch: int, accumulate: int, rank: int = 0, world: int = 1
    ) -> list[Batch]:
        """The micro-batches of one rank in global step `step` (from 0); see `Data.batches`. `micro_batch`
        counts examples. Raises ValueError when the rows are not the recipe's global batch.
        """
        rows = rows_of(step, micro_batch, accumulate, rank, world, self._global_batch)
        return [self.batch([self.index(row) for row in part]) for part in rows]

    def batch(self, indices: Sequence[int], size: int | None = None) -> Batch:
        """Training examples by number, in as many rows as there are, or for `size` examples."""
        return self._batch(self.train, indices, size or len(indices), evaluate=False)

    def locate(self, step: int) -> list[dict[str, Any]]:
        """The training examples in the global batch of data step `step` (from 1), as JSON values.

        `row`: place in the batch; `source`; `file`, `line`, `file_row`: see `hlat.data.locate`; `example`:
        number among the training examples; `epoch`: from 0; `hash`: of the prompt; `tokens`: how many it has.
        """
        found = []
        for place, row in enumerate(rows_in(step, self._global_batch)):
            number, split = self.index(row), self.train
            tokens = len(split.prompts[number]) + (len(split.completions[number]) if split.completions else 0)
            mark = document_hash(split.texts[number][0].encode("utf-8", "replace"))
            origin = place_values(split.places[number] if split.places else None)
            entry = {"row": place, "source": self._source, **origin, "example": number}
            found.append({**entry, "epoch": row // split.documents, "hash": f"{mark:016x}", "tokens": tokens})
        return found

    def document_text(self, found: dict[str, Any]) -> str:
        """Prompt and completion of an example that `locate` has found."""
        return "".join(self.train.texts[found["example"]])

    def holdout_batches(self, batch_size: int, rows: int | None = None) -> Iterator[Batch]:
        """At most `rows` held-out examples, from their beginning, always the same, in batches of
        `batch_size`. The last one may have rows without targets.
        """
        last = self._evaluated(rows)
        for start in range(0, last, batch_size):
            indices = range(start, min(start + batch_size, last))
            yield self._batch(self.holdout, indices, batch_size, evaluate=True)

    def _batch(self, split: Split, indices: Sequence[int], size: int, evaluate: bool) -> Batch:
        prompts = [split.prompts[i] for i in indices]
        labels = [split.labels[i] for i in indices]
        if self.kind == "pairs":
            right = [split.completions[i] for i in indices]
            learned = [split.learned[i] for i in indices]
            return pair_batch(prompts, right, size, self._seq_len, self._fill, learned)
        own = [split.spelled[i] for i in indices] if split.spelled else None
        if self.kind == "tokens" and not evaluate:
            assert own is not None
            right = [words[label] for words, label in zip(own, labels, strict=True)]
            return pair_batch(prompts, right, size, self._seq_len, self._fill)
        by_token = self.kind == "tokens"
        return label_batch(
            prompts, labels, self.spelled, size, self._seq_len, self._fill, count_tokens=by_token, own=own
        )

    def _evaluated(self, rows: int | None) -> int:
        return self.holdout.documents if rows is None else min(self.holdout.documents, rows)

    def holdout_content(self) -> str:
        """Hash (hex sha256) of the held-out prompts, completions and labels, in text."""
        split = self.holdout
        return hashlib.sha256(json.dumps([split.texts, split.labels]).encode()).hexdigest()

    def holdout_bytes(self, rows: int | None = None) -> int:
        """Bytes of the completions that are the targets of so many held-out examples."""
        return len(self.holdout_text(rows))

    def holdout_text(self, rows: int | None = None) -> bytes:
        """Those completions, one after the other."""
        return "".join(self.holdout.answers[: self._evaluated(rows)]).encode("utf-8", "replace")

    def holdout_labels(self, rows: int | None = None) -> dict[str, int]:
        """How many of so many held-out examples have each label."""
        found = Counter(self.holdout.labels[: self._evaluated(rows)])
        return {label: found[number] for number, label in enumerate(self.labels)}

    def report(self) -> dict[str, Any]:
        """Examples on both sides, their lengths in tokens, labels, epochs of this run; JSON-able."""
        lengths = [len(prompt) for prompt in self.train.prompts]
        if self.train.completions:
            lengths = [n + len(ids) for n, ids in zip(lengths, self.train.completions, strict=True)]
        labels = Counter(self.train.labels)
        return {
            "source": self._source,
            "fingerprint": self.fingerprint,
            "examples": self.train.documents,
            "holdout_examples": self.holdout.documents,
            "labels": {label: labels[number] for number, label in enumerate(self.labels)},
            "tokens": sum(lengths),
            "longest": max(lengths),
            "cut": self.train.cut + self.holdout.cut,
            "rows_per_example": self.rows_per_example,
            "epochs": self._rows / self.train.documents,
            "filling": 1 - sum(lengths) / (len(lengths) * self._seq_len),
        }

    def report_lines(self) -> list[str]:
        """The report as lines for a person."""
        report = self.report()
        lines = [
            f"{report['source']}: {report['examples']:,} examples, {report['holdout_examples']:,} held out;"
            f" this run reads {self._rows:,} = {report['epochs']:.2f} epochs",
            f"  {report['tokens'] / report['examples']:.0f} tokens an example,"
            f" {report['filling']:.0%} of the places in a row are filling",
        ]
        if self.labels:
            counts = ", ".join(f"{label} {count:,}" for label, count in report["labels"].items())
            rows = f"; {report['rows_per_example']} rows an example" * (report["rows_per_example"] > 1)
            lines.append(f"  labels: {counts}{rows}")
        if report["cut"]:
            lines.append(f"  cut: {report['cut']:,} prompts lose their beginning to fit seq_len")
        return [*lines, *self._notes]


def open_examples(recipe: Recipe, tokenizer: Tokenizer) -> Examples:
    """The examples of a recipe, tokenized.

    Raises UserError: see `read_examples`; also a tokenizer without an end-of-document token, labels that do
    not fit in a row or that have the same tokens, and completions of which none fits.
    """
    section, objective = recipe.data.examples, recipe.objective
    assert section is not None
    if tokenizer.eos_id is None:
        fix = 'set "eos_token" in tokenizer_config.json beside it'
        raise UserError("the tokenizer has no end-of-document token", where=tokenizer.spec, fix=fix)
    kind: Kind = objective.options["by"] if objective.name == "classification" else "pairs"
    chat = Chat(recipe, tokenizer)
    texts = read_examples(section, recipe.data.holdout, chat.reader)
    if chat.joint is not None and kind != "pairs":
        fix = "write objective.name: causal_lm, or give label_field"
        raise UserError("conversations have no labels to classify by", where="objective.name", fix=fix)
    joint = chat.joint or Joint(tokenizer, _literals(section))
    train, held_out = _encoded(texts, kind, section.labels, joint, recipe.data.seq_len)
    return Examples(
        train,
        held_out,
        kind,
        list(section.labels),
        tokenizer,
        seq_len=recipe.data.seq_len,
        seed=recipe.run.seed,
        global_batch=recipe.data.global_batch,
        rows=recipe.run.steps * recipe.data.global_batch,
        source=str(section.path or section.dataset),
        notes=[*_notes(texts), *_notes_of_ids(joint, train, held_out)],
        marks=joint.encoder.used or joint.encoder.has_one(texts.train[0].prompt + texts.train[0].completion),
        turn_end=_turn_end(texts, joint),
    )


def _turn_end(texts: Texts, joint: Joint) -> int | None:
    """Id of the special token that ends an answer of conversations, where it is another than EOS."""
    example = texts.train[0]
    if example.spans is None:
        return None
    last = joint.encoder.ends_with_one(example.completion)
    return joint.encoder.control.get(last)


def _literals(section: ExamplesSection) -> str:
    """All that the templates of examples spell themselves."""
    templates = [parse_template(text).literals for text in (section.prompt, section.completion)]
    return "\0".join([*templates, *section.labels.values()])


def _encoded(
    texts: Texts, kind: Kind, labels: dict[str, str], joint: Joint, seq_len: int
) -> tuple[Split, Split]:
    """Both sides in ids. Raises UserError as `open_examples`."""

    def encode(examples: Sequence[Example]) -> Split:
        if kind == "pairs":
            return encode_pairs(examples, joint, seq_len)
        if kind == "head":
            return encode_prompts(examples, joint)
        return encode_labelled(examples, labels, joint, seq_len)

    train, held_out = encode(texts.train), encode(texts.held_out)
    for split in (train, held_out):
        if kind != "pairs":
            longest = max(map(len, longest_spelling([train, held_out])), default=1)
            cut_prompts(split, joint, seq_len + 1 - longest)
        if split.too_long and not split.prompts:
            raise UserError(
                f"none of {split.too_long} completions fits into {seq_len} tokens",
                where="data.seq_len",
                fix="raise it, or shorten the completions",
            )
    return train, held_out


def _notes(texts: Texts) -> list[str]:
    """What is said of the examples as they were read."""
    notes = [f"  dropped: {count:,} records: {reason}" for reason, count in texts.dropped.items()]
    notes += [
        f"  not read: {count:,} file{'s' * (count > 1)}: {reason}"
        for reason, count in texts.other_files.items()
    ]
    if texts.beyond_limit:
        notes.append(f"  limit: {texts.beyond_limit:,} more examples are not used")
    trained = {example.mark for example in texts.train}
    if both := sum(example.mark in trained for example in texts.held_out):
        notes.append(f"  note: {both:,} held-out prompts are also prompts of training examples")
    if len(texts.held_out) == 1:
        notes.append("  note: a single example is held out, so held-out figures say next to nothing")
    return notes


def _notes_of_ids(joint: Joint, train: Split, held_out: Split) -> list[str]:
    """What is said of their ids."""
    notes = [
        f"  dropped: {split.too_long:,} records: completion longer than seq_len"
        for split in (train, held_out)
        if split.too_long
    ]
    if joint.straddling:
        notes.append(
            f"  note: {joint.straddling:,} prompts end where no token ends once the completion follows, "
            "with a space perhaps, and are encoded alone; better let the completion begin with that space"
        )
    if quoting := train.quoting + held_out.quoting:
        notes.append(f"  note: {quoting:,} records spell special tokens, which are taken as text there")
    return notes
