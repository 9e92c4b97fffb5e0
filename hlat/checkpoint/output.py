"""Folders of converted files that appear whole or not at all."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hlat.checkpoint.folder import abandon, begin, commit
from hlat.errors import UserError


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """An empty hidden folder beside `out` to write into; renamed to `out` at the end, removed on any failure.

    Raises UserError when `out` exists with something in it, cannot be written, or the disk is full.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("exists already", where=str(out), fix="choose a new folder or remove this one")
    partial = None
    try:
        partial = begin(out.absolute())
        yield partial
        commit(partial, out.absolute())
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else f"cannot be written ({error.strerror or error})"
        raise UserError(reason, where=str(out), fix="choose another folder") from error
    finally:
        if partial is not None:
            abandon(partial)
