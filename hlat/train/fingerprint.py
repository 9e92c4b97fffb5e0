"""The fingerprint of a run: which recipe and which contents its rows and weights stand for.

Compared: every recipe value that a resume may not change, what is evaluated (`eval.rows`, `eval.tasks`,
`eval.limit`), the data left out (`data.skip`), and the contents of data, tokenizer, weights to start from and
tasks, wherever they lie. Not compared: names, paths, limits of time, how often is saved, evaluated and
logged, and what changes no more than the order of sums (layout, micro-batches, compilation, backend). Where
it changes more than that it counts: see `_shaping`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import hlat
from hlat.checkpoint.provenance import provenance_of
from hlat.checkpoint.weights import source_tokenizer
from hlat.data.content import data_content, stdlib_content, tokenizer_content
from hlat.data.convention import Convention
from hlat.data.skips import Skips
from hlat.errors import SaveFailed, UserError
from hlat.evaluate.running import OWN, PAPER
from hlat.observe.jsonl import replace_file
from hlat.observe.sinks import METRICS_FILE
from hlat.paths import expand
from hlat.recipe import Recipe, identity_diff
from hlat.registry import lookup
from hlat.storage.digests import file_digest
from hlat.storage.fingerprint import (
    FILE,
    Fingerprint,
    Stretch,
    digest_of,
    noted,
    read_stretches,
    stretches_text,
)
from hlat.train.initial import open_source

if TYPE_CHECKING:
    from hlat.checkpoint.nxd import NxdFolder
    from hlat.checkpoint.reader import Checkpoint
    from hlat.train.run import Run

INIT, TOKENIZER, TASKS, HELD_OUT = "init.from", "data.tokenizer", "eval.tasks", "held_out"
TEXTS = "init.texts"  # how texts are put before the weights of init.from: files beside them say it
UNKNOWN = ""  # the content of something that an older version did not note


def versions() -> dict[str, str]:
    """What is noted beside a fingerprint and not compared."""
    return {"hlat": hlat.__version__, "torch": torch.__version__}


class Contents:
    """Digests of what recipes name. Each thing is looked at once: two recipes of one sweep mean the same
    weights by a path, even when they change in between.
    """

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}

    def fingerprint(self, recipe: Recipe) -> Fingerprint:
        """That of a run of this recipe, begun now.

        Raises UserError where something is missing, cannot be read, or changes while it is read.
        """
        values = recipe.to_dict()
        named = [values["data"][key] for key in ("sources", "examples")]
        content = dict(self._once("data", named, lambda: data_content(recipe.data)))
        path, spec = recipe.init.from_, recipe.data.tokenizer
        if path is not None:
            content |= self._once("init", path, lambda: _weights(path))
        if spec != "init":
            content[TOKENIZER] = self._once("tokenizer", spec, lambda: tokenizer_content(spec))
        if tasks := self._once("tasks", recipe.eval.tasks, lambda: tasks_content(recipe.eval.tasks)):
            content[TASKS] = tasks
        return Fingerprint(values, content, versions())

    def _once(self, kind: str, name: Any, look: Callable[[], Any]) -> Any:
        key = digest_of({kind: name})
        if key not in self._known:
            self._known[key] = look()
        return self._known[key]


def _weights(path: str) -> dict[str, str]:
    """Digests of the weights at a path, of the tokenizer that came with them, and of what else they know."""
    source, _ = open_source(path)
    tokenizer = source_tokenizer(source)
    own = UNKNOWN if tokenizer is None else tokenizer.identity
    return {INIT: source.content(), TOKENIZER: own, **_texts(provenance_of(source).convention)}


def _texts(convention: Convention) -> dict[str, str]:
    """Digest of BOS and its siblings; nothing for HLAT's own stream."""
    return {} if convention == Convention() else {TEXTS: digest_of(convention.to_json())}


def tasks_content(names: tuple[str, ...]) -> str:
    """Digest of what is on this machine of the tasks: the text that HLAT's own are made of, and task files.
    Empty for tasks that only the harness knows.
    """
    files = {name: expand(name, "eval.tasks") for name in names}
    parts = {name: file_digest(file) for name, file in files.items() if file.is_file()}
    if any(name.startswith(OWN) and name != PAPER for name in names):
        parts["stdlib"] = stdlib_content()
    return digest_of(parts) if parts else ""


def differences(then: Fingerprint, now: Fingerprint, last: int) -> list[str]:
    """In what two results at step `last` are not of the same thing, in words; empty when they are."""
    found = [f"{key} was {old!r} and is {new!r}" for key, old, new in identity_diff(then.recipe, now.recipe)]
    for key in _shaping(now.recipe):
        old, new = _value(then.recipe, key), _value(now.recipe, key)
        if old != new:
            found.append(f"{key} was {old!r} and is {new!r}")
    old, new = _labels(then.recipe), _labels(now.recipe)
    if old != new and set(old) == set(new):
        found.append("data.examples.labels are in another order")
    if _left_out(then.recipe, last) != _left_out(now.recipe, last):
        found.append("data.skip leaves out other data")
    for key in dict.fromkeys([*now.content, *then.content]):
        old, new = then.content.get(key), now.content.get(key)
        if key != HELD_OUT and (old != new or old == UNKNOWN):
            found.append(_content_text(key, old, new))
    return found


def _content_text(key: str, old: str | None, new: str | None) -> str:
    name = re.sub(r"\.(\d+)", r"[\1]", key)
    if key == TEXTS:
        return f"{INIT}: what its files say of BOS and special tokens differs"
    if old is None:
        return f"{name} was not given"
    if new is None:
        return f"{name} was given"
    if UNKNOWN in (old, new):
        return f"{name}: what it was is not known"
    what = {INIT: "the weights differ", TOKENIZER: "the tokenizer differs"}.get(key, "the content differs")
    return f"{name}: {what}"


def _shaping(recipe: Mapping[str, Any]) -> Iterator[str]:
    """Keys that a resume may change and that shape a result all the same."""
    yield from ("eval.rows", "eval.tasks", "eval.limit")
    precision = recipe["precision"]
    if recipe["reduce"]["name"] != "dense" or "bf16" in (precision["accumulate"], precision["reduce"]):
        yield from ("data.micro_batch", "parallel.dp")  # what each of so many senders loses is not rounding
    if hasattr(lookup("guard", recipe["guard"]["name"]), "steps_back"):
        yield from ("checkpoint.every", "checkpoint.keep")  # where it can go back to


def _value(recipe: Mapping[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return recipe.get(section, {}).get(name)


def _labels(recipe: Mapping[str, Any]) -> list[str]:
    """The labels of examples in their order: it numbers the rows of a classifier."""
    examples = recipe.get("data", {}).get("examples") or {}
    return list(examples.get("labels", ()))


def _left_out(recipe: Mapping[str, Any], last: int) -> list[tuple[int, int]]:
    skips = Skips(tuple((first, end) for first, end in recipe.get("data", {}).get("skip", ())))
    return skips.until(skips.position(last))


def note_start(
    run: Run, folder: Path, saved: Checkpoint | NxdFolder | None, warn: Callable[[str], None]
) -> None:
    """Write down what the rows from here on stand for. For the first rank, before its first step.

    A run that continues has the data, tokenizer and weights that it began with: its data has been compared,
    and weights are not read again. Where `init.from` now names others, `warn` gets a line.

    Raises UserError (see `Contents`) and SaveFailed.
    """
    recipe, former = run.recipe, None if saved is None else saved.meta.get("content") or None
    content = _begun(run, saved is None) if former is None else dict(former)
    content |= {TASKS: tasks_content(recipe.eval.tasks)}
    content |= {HELD_OUT: run.data.holdout_content() if run.data.holdout.documents else ""}
    content = {key: value for key, value in content.items() if value or key == INIT}
    run.content = content
    if saved is not None and (line := _other_weights(recipe.init.from_, content.get(INIT))):
        warn(line)
    stretches, rows = read_stretches(folder), folder / METRICS_FILE
    alone = not stretches and not (rows.exists() and rows.stat().st_size)  # a checkpoint, as from a store
    if alone and saved is not None and former is not None:
        begun = Fingerprint(saved.meta["recipe"], former, saved.meta.get("versions", {}))
        stretches = [Stretch(0, begun)]
    stretches = noted(stretches, run.step, Fingerprint(recipe.to_dict(), content, versions()))
    try:
        replace_file(folder / FILE, stretches_text(stretches))
    except OSError as error:
        what = f"cannot be written ({error.strerror})"
        raise SaveFailed(what, where=str(folder / FILE), fix="make room there") from error


def _begun(run: Run, now: bool) -> dict[str, str]:
    """What a run is made of that begins now, or began, on the same data, when that was not noted."""
    recipe, spec = run.recipe, run.recipe.data.tokenizer
    content = dict(run.data.content) or data_content(recipe.data)
    content[TOKENIZER] = spec if spec.startswith("train:") else run.data.tokenizer.identity
    if not now:
        content[INIT] = UNKNOWN
    elif recipe.init.from_ is not None:
        known = _weights(recipe.init.from_)
        content |= {key: known[key] for key in (INIT, TEXTS) if key in known}
    return content


def _other_weights(path: str | None, began: str | None) -> str:
    """What to say of weights that are not those a run began with; empty if they are, or have gone."""
    if path is None:
        return ""
    if began == UNKNOWN:
        why = "an older version of HLAT did not note with which weights this run began"
        return f"init.from: {why}; {path} is not read again"
    try:
        now = open_source(path)[0].content()
    except UserError:
        return ""  # a resume needs nothing of them
    if now == began:
        return ""
    what = "its seed" if began is None else "other weights"
    return f"init.from: this run began from {what}; it continues from its own checkpoint, {path} is not read"
