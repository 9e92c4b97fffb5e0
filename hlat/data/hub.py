"""Data sets of the library `datasets`: loaded by name, or saved to a folder with `save_to_disk`.

Both are rows of arrow files, in an order: which rows of which files is all that is found here.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hlat.errors import UserError, missing_extra
from hlat.host import json_text

STATE, INFO, SPLITS_FILE = "state.json", "dataset_info.json", "dataset_dict.json"
_SAVE = "load it with datasets.load_dataset, keep it with .save_to_disk(FOLDER), and give path: FOLDER"


class Rows(NamedTuple):
    """Rows start <= i < stop of an arrow file that has `total` of them."""

    path: str
    start: int
    stop: int
    total: int


def load_rows(dataset: str, where: str) -> list[Rows]:
    """The rows that `datasets.load_dataset` gives for NAME[:CONFIG][@SPLIT], in their order. A split may be a
    slice, or a sum of them: `train[:10%]+test[5:8]`. NAME may be a folder. No loading script is run.

    Args:
        where: the key to name in errors.

    Raises UserError when it cannot be loaded, or is not a table of rows that lie in files.
    """
    try:
        import datasets
    except ImportError as error:
        raise missing_extra("datasets", "data", f"the data set '{dataset}'") from error
    name, config, split = parts_of(dataset)
    if (Path(name) / STATE).is_file() or (Path(name) / SPLITS_FILE).is_file():
        raise UserError(f"'{name}' was saved with save_to_disk", where=where, fix="give it as path: instead")
    try:
        with _told_once(), _own_settings(datasets):
            loaded: Any = datasets.load_dataset(name, config, split=split)
    except (
        Exception
    ) as error:  # the library raises a dozen unrelated types for a wrong name, split or no network
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fix = "check name, config and @split, and that this machine reaches the hub"
        raise UserError(f"data set '{dataset}' cannot be loaded ({reason})", where=where, fix=fix) from error
    if not isinstance(loaded, datasets.Dataset):
        what = f"data set '{dataset}' is a {type(loaded).__name__}, not one table of rows"
        raise UserError(what, where=where, fix="name one split of it, such as @train")
    found = _rows_of(loaded)
    if found is None or sum(rows.stop - rows.start for rows in found) != len(loaded):
        what = f"the rows of data set '{dataset}' do not lie in files as they are"
        raise UserError(what, where=where, fix=_SAVE)
    return found


def parts_of(dataset: str) -> tuple[str, str | None, str]:
    """Name, config and split of NAME[:CONFIG][@SPLIT]; a folder's name may hold both signs."""
    name, split = dataset, "train"
    head, sign, tail = dataset.rpartition("@")
    if sign and "/" not in tail and not os.path.exists(dataset):
        name, split = head, tail or "train"
    if os.path.exists(name):
        return name, None, split
    head, _, config = name.rpartition(":") if os.path.exists(name.rpartition(":")[0]) else name.partition(":")
    return head, config or None, split


def _rows_of(loaded: Any) -> list[Rows] | None:
    """The rows behind a `datasets.Dataset`; None where they are not those of arrow files, unchanged."""
    if loaded._indices is not None:
        return None
    found = []
    for blocks in getattr(loaded.data, "blocks", [[loaded.data]]):
        block, *beside = blocks
        if not len(block):
            continue
        path = getattr(block, "path", None)
        if beside or path is None:
            return None
        total, types = _arrow_shape(path)
        own = {name: str(kind) for name, kind in zip(block.schema.names, block.schema.types, strict=True)}
        rows = _after(getattr(block, "replays", []), total)
        if rows is None or any(types.get(name) != kind for name, kind in own.items()):
            return None
        found.append(Rows(path, *rows, total))
    return found


def _after(replays: list[Any], total: int) -> tuple[int, int] | None:
    """Which rows are left of a file's after what the library has done to its table; None for unknown."""
    start, stop = 0, total
    for action, arguments, options in replays:
        if action == "slice":
            offset, length = (*arguments, None, None)[:2]
            offset, length = options.get("offset", offset) or 0, options.get("length", length)
            start = min(start + offset, stop)
            stop = stop if length is None else min(start + length, stop)
        elif action not in ("replace_schema_metadata", "cast"):  # a cast that changes types is found by them
            return None
    return start, stop


def _arrow_shape(path: str) -> tuple[int, dict[str, str]]:
    """Number of rows of an arrow stream, and the types of its columns."""
    import pyarrow

    with pyarrow.memory_map(path, "rb") as mapped:
        table = pyarrow.ipc.open_stream(mapped).read_all()
        return table.num_rows, {field.name: str(field.type) for field in table.schema}


@contextlib.contextmanager
def _told_once() -> Iterator[None]:
    """The hub's library tells of each attempt to reach it; the error at the end says it all."""
    logger = logging.getLogger("huggingface_hub")
    former = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(former)


@contextlib.contextmanager
def _own_settings(datasets: Any) -> Iterator[None]:
    """What variables of the environment must not change: versions 3 of the library run a data set's own
    script when one says so, or ask on the terminal whether they may (later ones never do); and rows that are
    kept in memory lie in no file.
    """
    settings = getattr(datasets, "config", None)
    wanted = {"HF_DATASETS_TRUST_REMOTE_CODE": False, "IN_MEMORY_MAX_SIZE": 0}
    former = {name: getattr(settings, name) for name in wanted if hasattr(settings, name)}
    for name in former:
        setattr(settings, name, wanted[name])
    try:
        yield
    finally:
        for name, value in former.items():
            setattr(settings, name, value)


def saved_files(folder: Path, where: str) -> list[str] | None:
    """The names of the arrow files of a data set that `save_to_disk` has written to a folder, in their order,
    as its state.json has them; None for any other folder: files of that name may be a user's own.

    Raises UserError for a saved one that is damaged, or that was saved with a list of rows beside it.
    """
    if not ((folder / STATE).is_file() and (folder / INFO).is_file()):
        return None
    arrow = any(folder.glob("*.arrow"))
    try:
        state = json_text.loads((folder / STATE).read_bytes())
    except ValueError as error:
        if not arrow:
            return None
        raise _damaged(folder, f"its {STATE} is not JSON", where) from error
    if not isinstance(state, dict) or "_data_files" not in state:
        return None
    try:
        names = [str(entry["filename"]) for entry in state["_data_files"]]
        rows = state.get("_indices_data_files") or state.get("_indices_files")
    except (KeyError, TypeError) as error:
        raise _damaged(folder, f"its {STATE} names no files", where) from error
    if rows:
        what = f"'{folder}' was saved by an old version of datasets, with a list of its rows beside the files"
        fix = "load it with the version that saved it, and save its .flatten_indices()"
        raise UserError(what, where=where, fix=fix)
    for name in names:
        if os.path.basename(name) != name or not (folder / name).is_file():
            raise _damaged(folder, f"'{name}', which its {STATE} names, is not in it", where)
    return names


def _damaged(folder: Path, what: str, where: str) -> UserError:
    return UserError(
        f"the data set saved in '{folder}' is damaged: {what}", where=where, fix="save it there again"
    )


def saved_splits(folder: Path) -> list[str] | None:
    """The splits of a `DatasetDict` that `save_to_disk` has written to a folder; None for any other."""
    try:
        content = json_text.loads((folder / SPLITS_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    splits = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
        return None
    return splits
