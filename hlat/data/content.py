"""What the data keys of a recipe stand for, as digests: the bytes behind a path or a name, not the path.

Nothing is tokenized here, and what was hashed before is not read again.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from hlat.data.packed import TokenFolder
from hlat.data.sources import STDLIB, identity, refuse_changed, resolve_source, tokenized_folder
from hlat.data.staged import is_url, staged
from hlat.data.stdlib import BUILTIN
from hlat.data.tokenizer import load_tokenizer
from hlat.storage.blocks import Reading
from hlat.storage.fingerprint import digest_of

if TYPE_CHECKING:
    from hlat.recipe_sections import DataSection, ExamplesSection, SourceSection


def data_content(section: DataSection, quiet: bool = True) -> dict[str, str]:
    """Recipe key -> digest (hex) of every source and set of examples.

    Raises UserError for one that is missing, cannot be read, or changes while it is read.
    """
    content = {
        f"data.sources.{number}": _source(source, f"data.sources[{number}]", quiet)
        for number, source in enumerate(section.sources)
    }
    examples = section.examples
    if examples is not None:
        content["data.examples"] = _records(examples, "", quiet)
        if examples.eval_path or examples.eval_dataset:
            content["data.examples.eval"] = _records(examples, "eval_", quiet)
    return content


def tokenizer_content(spec: str) -> str:
    """The identity of the tokenizer that `data.tokenizer` names. One that is to be trained is what the recipe
    says of it, for it follows from that and the sources.

    Raises UserError when there is none.
    """
    if spec.startswith("train:"):
        return spec
    return load_tokenizer(staged(spec, "data.tokenizer", quiet=True) if is_url(spec) else spec).identity


def stdlib_content() -> str:
    """Digest (hex) of the installed standard library: its files by name, and the version of Python."""
    source = resolve_source(dataset=STDLIB)
    names = [file.name for file in source.files]
    return digest_of({"python": platform.python_version(), "names": names, "files": identity(source)})


def source_content(folder: TokenFolder) -> str:
    """What `data_content` says of a source whose tokens have been opened."""
    return identity(folder.named[0]) if folder.named else folder.content_hash()


def examples_content(examples: ExamplesSection, reading: Reading) -> dict[str, str]:
    """What `data_content` says of examples that have been read.

    Raises UserError where that is not what they are called by: a file changed while it was read.
    """
    named = {"data.examples": examples.dataset}
    if examples.eval_path or examples.eval_dataset:
        named["data.examples.eval"] = examples.eval_dataset
    files = iter([source for source in reading.sources if source.label != STDLIB])  # built-in ones read that
    content = {}
    for key, dataset in named.items():
        if dataset in BUILTIN:
            content[key] = digest_of({"made of": stdlib_content()})
        else:
            source = next(files)
            refuse_changed([source], "read", reading)
            content[key] = identity(source)
    return content


def _source(source: SourceSection, where: str, quiet: bool) -> str:
    path = source.path
    if path is not None and is_url(path):
        path = str(staged(path, f"{where}.path", quiet))
    folder = tokenized_folder(path)
    if folder is not None:  # its manifest has the digests of its shards
        return TokenFolder(folder).content_hash()
    found = resolve_source(path=path, dataset=source.dataset, text_field=source.text_field, where=where)
    return identity(found, quiet)


def _records(examples: ExamplesSection, side: str, quiet: bool) -> str:
    path, dataset = getattr(examples, f"{side}path"), getattr(examples, f"{side}dataset")
    if dataset in BUILTIN:
        return digest_of({"made of": stdlib_content()})
    where = f"data.examples.{side}{'path' if path else 'dataset'}"
    return identity(resolve_source(path=path, dataset=dataset, where=where), quiet)
