"""Which of the files and folders that a recipe names are not there, said before a run needs them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hlat.data.chat import BUILTIN
from hlat.data.origins import shown
from hlat.data.staged import is_url
from hlat.errors import UserError
from hlat.paths import expand

if TYPE_CHECKING:
    from hlat.recipe import Recipe

_NO_PATHS = ("bytes", "init")


def missing_paths(recipe: Recipe) -> list[str]:
    """A line for each file or folder that a recipe names for its data, tokenizer or first weights and that
    does not exist on this machine. What is in a store, or on the hub, is not looked for.
    """
    lines = []
    for key, path in _named(recipe):
        if is_url(path):
            continue
        try:
            place = expand(path, key)
        except UserError as error:  # it can be no path at all
            lines.append(error.line())
            continue
        if not os.path.exists(place):
            here = "" if place.is_absolute() else f" in {shown(os.getcwd())}"
            lines.append(f"{key}: no such file or folder: '{shown(path)}'{here}")
    return lines


def check_tokenizer(recipe: Recipe) -> None:
    """Raise UserError for a tokenizer that training would refuse, as far as no text has to be read: words
    that name none, a file that holds none, more ids than the model has. One that is not on this machine, or
    comes with the weights of `init.from`, is not looked at.
    """
    from hlat.data.loader import refuse_many_ids
    from hlat.data.tokenizer import load_tokenizer
    from hlat.data.train_tokenizer import trained_vocab

    spec = recipe.data.tokenizer
    size = trained_vocab(spec)
    if size is None:
        away = spec != "bytes" and (is_url(spec) or not os.path.exists(expand(spec, "data.tokenizer")))
        if spec == "init" or away:
            return
        size = load_tokenizer(spec).vocab_size
    refuse_many_ids(size, recipe.model.vocab, spec)


def _named(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Key and path of everything that lies in a file or folder."""
    data = recipe.data
    for number, source in enumerate(data.sources):
        if place := source.path or _local(source.dataset):
            yield f"data.sources[{number}].{'path' if source.path else 'dataset'}", place
    for name in ("path", "dataset", "eval_path", "eval_dataset"):
        value = getattr(data.examples, name, None)
        if path := value if name.endswith("path") else _local(value):
            yield f"data.examples.{name}", path
    if data.tokenizer not in _NO_PATHS and not data.tokenizer.startswith("train:"):
        yield "data.tokenizer", data.tokenizer
    if data.chat_template and data.chat_template not in BUILTIN:
        yield "data.chat_template", data.chat_template
    if recipe.init.from_:
        yield "init.from", recipe.init.from_


def _local(dataset: str | None) -> str:
    """The folder that a data set's name is by its form; empty for a name of the hub."""
    from hlat.data.hub import parts_of

    return parts_of(dataset)[0] if dataset and dataset.startswith(("/", "./", "../", "~")) else ""
