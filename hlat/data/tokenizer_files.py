"""Which files of a folder belong to a tokenizer, and their names wherever they are copied."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from hlat.data.special_tokens import SIDECARS

TEMPLATES = "additional_chat_templates"
"""Folder of further chat templates, one `.jinja` file each."""
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
NAMES = (
    *_VOCABULARIES[:2],
    *SIDECARS,
    *_VOCABULARIES[2:],
    "chat_template.jinja",
    "chat_template.json",
)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a Hugging Face tokenizer, chat templates included, and nothing else of the folder."""
    found = [folder / name for name in NAMES if (folder / name).is_file()]
    templates = folder / TEMPLATES
    if templates.is_dir():
        found += sorted(path for path in templates.glob("*.jinja") if path.is_file())
    return found


def companions_of(vocabulary: Path) -> tuple[Path, ...]:
    """The files that go where the tokenizer of this file goes, itself left out.

    Another vocabulary in the folder is one of them only beside a tokenizer.json, which is looked for first.
    """
    others = () if vocabulary.name == "tokenizer.json" else _VOCABULARIES
    found = tokenizer_files(vocabulary.parent)
    return tuple(path for path in found if path != vocabulary and path.name not in others)


def kept_name(path: Path) -> str:
    """What a tokenizer's file is called in a folder of them, with `/`: further templates keep their own."""
    return str(PurePosixPath(TEMPLATES, path.name)) if path.parent.name == TEMPLATES else path.name


def place_in(folder: Path, name: str) -> Path:
    """Where a file of this `kept_name` lies in a folder, whatever else the name says."""
    inner = PurePosixPath(name)
    return folder / TEMPLATES / inner.name if inner.parent.name == TEMPLATES else folder / inner.name


def copy_files(paths: Iterable[Path], target: Path) -> None:
    """Copy a tokenizer's files into a folder, unchanged. Raises OSError."""
    for path in paths:
        copy = place_in(target, kept_name(path))
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
