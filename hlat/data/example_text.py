"""From records to examples in text: templates filled in, labels recognised, held-out examples set apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hlat.data.losses import refuse_most
from hlat.data.origins import Place
from hlat.data.packed import document_hash, holdout_threshold
from hlat.data.quoted import Quoted, Span
from hlat.data.records import Record, Records
from hlat.data.template import field_text, parse_template
from hlat.errors import UserError

if TYPE_CHECKING:
    from hlat.recipe_sections import ExamplesSection

WHERE = "data.examples"
Reader = Callable[[Iterable[Record], str, str, Counter[str]], "list[Example]"]
"""Examples of records, the name of their source, the key that names it, and what is dropped by reason."""


@dataclass(frozen=True)
class Example:
    """One example. `label` is its place among the labels, -1 without; `mark` is the hash of its prompt,
    `group` that of what decides on which side of the held-out split it is. `spans`: places of the answers in
    the completion of a conversation, which begins and ends with one; None: all of it is the answer. `place`
    is where it is from, unless it is made.
    """

    prompt: Quoted
    completion: Quoted
    label: int
    mark: int
    group: int
    spans: tuple[Span, ...] | None = None
    place: Place | None = None


@dataclass
class Texts:
    """Examples of both sides of the held-out split; what was dropped, by reason; how many training examples
    `limit` left out; and the files of their folders that hold none, by reason.
    """

    train: list[Example] = field(default_factory=list)
    held_out: list[Example] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    beyond_limit: int = 0
    other_files: Counter[str] = field(default_factory=Counter)


def read_examples(
    section: ExamplesSection,
    holdout: float,
    conversations: Callable[[Mapping[str, Any]], Reader | None] = lambda first: None,
) -> Texts:
    """The examples that a recipe's section describes.

    An example is held out when the hash of its prompt is below `holdout`, so equal prompts are on one side;
    with `group_field` the hash of that field, so that a document's records are; or, with `eval_path` or
    `eval_dataset`, when it comes from there. Held-out examples are in the order of
    their hashes, training examples in that of the source, or with `limit` the first by hash.

    `conversations` gets the first record of a source and says what reads it; None: the section's templates.

    Raises UserError: see `_filled`; also when no example is left on a side that needs one.
    """
    texts = Texts()

    def read(path: str | None, dataset: str | None, where: str) -> list[Example]:
        records, source, dropped = Records(path, dataset, where), path or dataset or "", Counter[str]()
        first: Record | None = None
        for first in records.read():
            if first.values is not None:
                break
        reader = conversations(first.values or {}) if first else None
        if reader is not None:
            found = reader(records.read(), source, where, dropped)
        else:
            found = _filled(section, records.read(_fields(section)), source, where, dropped)
        refuse_most(source, len(found), dropped, section.allow_dropped, where)
        texts.dropped.update(dropped)
        texts.other_files.update(records.other_files)
        return found

    everything = read(section.path, section.dataset, WHERE)
    if section.eval_path or section.eval_dataset:
        key = f"{WHERE}.{'eval_path' if section.eval_path else 'eval_dataset'}"
        texts.train = everything
        texts.held_out = read(section.eval_path, section.eval_dataset, key)
    else:
        below = holdout_threshold(holdout)
        texts.train = [example for example in everything if example.group >= below]
        texts.held_out = [example for example in everything if example.group < below]
    texts.held_out.sort(key=lambda example: example.mark)
    if not texts.train or (holdout and not texts.held_out):
        side = "trained on" if not texts.train else "held out"
        raise UserError(
            f"{len(everything)} examples, and none is {side}",
            where=WHERE,
            fix="give more examples, another data.holdout, or eval_path",
        )
    if section.limit is not None and section.limit < len(texts.train):
        texts.beyond_limit = len(texts.train) - section.limit
        texts.train = sorted(texts.train, key=lambda example: example.mark)[: section.limit]
    return texts


def _filled(
    section: ExamplesSection, records: Iterable[Record], source: str, where: str, dropped: Counter[str]
) -> list[Example]:
    """The examples that the templates of the section make of records.

    Raises UserError when there are none, when no record has the fields of the
    templates, or when a label is not among the recipe's.
    """
    prompt, completion = parse_template(section.prompt), parse_template(section.completion)
    group = section.group_field
    needed = _fields(section)
    numbers = {label: number for number, label in enumerate(section.labels)}
    words = [Quoted(word) for word in section.labels.values()]
    examples: list[Example] = []
    first: Sequence[str] = ()
    lacking: Counter[str] = Counter()
    for record in records:
        if record.values is None:
            dropped[record.reason] += 1
            continue
        first = first or record.fields
        missing = next((name for name in needed if field_text(record.values, name) is None), None)
        if missing is not None:
            lacking[missing] += 1
            continue
        text, answer = (part.fill(record.values) or Quoted("") for part in (prompt, completion))
        number = -1
        if section.label_field:
            label = field_text(record.values, section.label_field) or ""
            if label not in numbers:
                raise _unknown_label(label, list(numbers), record.name, where)
            number, answer = numbers[label], words[numbers[label]]
        try:
            mark, _ = document_hash(text.text.encode("utf-8")), answer.text.encode("utf-8")
            own = document_hash((field_text(record.values, group) or "").encode("utf-8")) if group else mark
        except UnicodeEncodeError:
            dropped["not Unicode text (lone surrogate)"] += 1
            continue
        if _is_empty(answer, bool(completion.fields) and not section.label_field):
            dropped["empty completion"] += 1
            continue
        examples.append(Example(text, answer, number, mark, own, place=record.place))
    dropped.update({f"no text or number under '{name}'": count for name, count in lacking.items()})
    if not examples:
        raise _nothing(source, first, lacking, dropped, where)
    return examples


def _is_empty(completion: Quoted, filled: bool) -> bool:
    """Whether there is nothing to learn: no text, or where fields fill the template, white space in them
    alone.
    """
    texts = (completion.text[first:end] for first, end in completion.quotes)
    return not (any(text.strip() for text in texts) if filled else completion.text)


def _fields(section: ExamplesSection) -> list[str]:
    """The fields of a record that the section names: no others are read."""
    prompt, completion = parse_template(section.prompt), parse_template(section.completion)
    answer = [section.label_field] if section.label_field else completion.fields
    return [*prompt.fields, *answer, *([section.group_field] if section.group_field else [])]


def _unknown_label(label: str, known: Sequence[str], name: str, where: str) -> UserError:
    shown = ", ".join(repr(text) for text in known)
    what = f"label {label!r} in {name} is not among the labels {shown}"
    return UserError(what, where=where, fix=f"add it to {WHERE}.labels, or remove the record")


def _nothing(
    source: str,
    first: Sequence[str],
    lacking: Counter[str],
    dropped: Counter[str],
    where: str,
) -> UserError:
    """Why a source gave no example: an empty one, or one whose records lack a field."""
    if lacking:
        name = lacking.most_common(1)[0][0]
        fields = ", ".join(first) or "none"
        what = f"no record of '{source}' has a text or number in the field '{name}'"
        fix = f"the fields of its first record are: {fields}"
        return UserError(what, where=where, fix=fix)
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    what = f"no examples in '{source}'" + (f" ({reasons})" if reasons else "")
    return UserError(what, where=where, fix="give a file with one record for each example")
