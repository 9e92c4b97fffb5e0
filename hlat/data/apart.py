"""The data of a run and the files that HLAT itself writes are kept apart.

Were the run folder inside a folder of the data, its files would be documents at the next start, which would
then refuse to continue on other data.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hlat.data.sources import tokenized_folder
from hlat.data.staged import is_url
from hlat.errors import UserError
from hlat.paths import expand
from hlat.storage.user_cache import cache_root

if TYPE_CHECKING:
    from hlat.recipe import Recipe


def check_apart(recipe: Recipe) -> None:
    """Raise UserError where a folder of the data holds the run folder or HLAT's cache. Hidden folders may:
    they are not read.
    """
    own = (
        ("the run folder", expand(recipe.run.dir, "run.dir"), "set run.dir to one outside it"),
        ("HLAT's cache", cache_root(), "set XDG_CACHE_HOME to a folder outside it"),
    )
    for key, path in _paths(recipe):
        if is_url(path):
            continue
        given = expand(path, key)
        if tokenized_folder(given):
            continue
        root = Path(os.path.realpath(given))
        for what, place, fix in own:
            if _would_read(root, Path(os.path.realpath(place))):
                raise UserError(
                    f"'{path}' holds {what} ({place}), whose files would become data",
                    where=key,
                    fix=f"give the data a folder of its own, or {fix}",
                )


def _would_read(root: Path, place: Path) -> bool:
    if not place.is_relative_to(root):
        return False
    return not any(part.startswith(".") for part in place.relative_to(root).parts)


def _paths(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Key and path of everything that may be a folder of data."""
    for number, source in enumerate(recipe.data.sources):
        if source.path:
            yield f"data.sources[{number}].path", source.path
    examples = recipe.data.examples
    for name in ("path", "eval_path"):
        if examples is not None and (path := getattr(examples, name)):
            yield f"data.examples.{name}", path
