"""Paths that people give, by an option or by a recipe key, looked at in one place.

Whatever is wrong with one is a `UserError` that names what gave it: a path that cannot exist (empty, a NUL
character, an unknown user, too long), one that leads nowhere (a loop of links, a file where a folder is
wanted), one that may not be used, and what is neither file nor folder: reading a pipe or a device waits for
ever, or never ends.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from hlat.errors import UserError, check_length, not_in_locale

Kind = Literal["file", "folder", "pipe", "device", "socket", "missing"]
_TESTS: tuple[tuple[Kind, Callable[[int], bool]], ...] = (
    ("file", stat.S_ISREG),
    ("folder", stat.S_ISDIR),
    ("pipe", stat.S_ISFIFO),
    ("socket", stat.S_ISSOCK),
)
_REASONS = {
    errno.ELOOP: "is a link that leads back to itself",
    errno.EACCES: "no permission to look at it",
    errno.ENOTDIR: "lies below a file, which is not a folder",
}


def expand(text: str | os.PathLike[str], where: str = "", room: int = 0) -> Path:
    """The path that a text means, `~` and `~user` replaced by home folders.

    Args:
        text: as it was given.
        where: the option or the recipe key that gave it.
        room: bytes that longer paths will need behind it.

    Raises UserError for what can be no path.
    """
    given = os.fspath(text)
    if not given:
        raise UserError("is empty, where a path is needed", where=where, fix="write a path")
    if "\0" in given:
        raise UserError(f"{given[:80]!r} holds a NUL character, which no path can", where=where)
    expanded = os.path.expanduser(given)
    if expanded.startswith("~") and given.startswith("~"):
        user = given.partition("/")[0]
        what = f"there is no home folder for {user!r}"
        raise UserError(what, where=where, fix=f"write the whole path, or ./{given} for a name with a ~")
    try:
        os.fsencode(expanded)
        check_length(os.path.abspath(expanded), room)
    except UnicodeEncodeError as error:
        raise not_in_locale(error, where) from None
    except UserError as error:
        raise UserError(error.what, where=where, fix=error.fix) from None
    return Path(expanded)


def spelled(text: str) -> str:
    """`expand` for what is used on another machine: its form is checked, it is not looked up. Raises
    UserError.
    """
    return text if text.startswith("~") else str(expand(text))


def kind_of(path: Path, where: str = "") -> Kind:
    """What lies at a path, links followed; `missing` where nothing does. Raises UserError for a path that
    cannot be followed to its end.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        what = _REASONS.get(error.errno or 0) or f"cannot be used: {error.strerror}"
        raise UserError(f"'{path}' {what}", where=where, fix="correct the path") from error
    return next((kind for kind, test in _TESTS if test(mode)), "device")


def existing(
    text: str | os.PathLike[str],
    where: str = "",
    *,
    wanted: tuple[Kind, ...] = ("file", "folder"),
    fix: str = "correct the path",
) -> Path:
    """A path at which there is one of what is wanted, and which may be read. Raises UserError."""
    path = expand(text, where)
    kind, names = kind_of(path, where), " or ".join(wanted)
    if kind == "missing":
        raise UserError(f"no such {names}: '{path}'", where=where, fix=fix)
    if kind not in wanted:
        raise UserError(f"'{path}' is a {kind}, not a {names}", where=where, fix=fix)
    if not _may(path, os.R_OK | (os.X_OK if kind == "folder" else 0)):
        raise UserError(f"no permission to read '{path}'", where=where, fix="make it readable")
    return path


def existing_file(text: str | os.PathLike[str], where: str = "", fix: str = "correct the path") -> Path:
    """A regular file that may be read. Raises UserError."""
    return existing(text, where, wanted=("file",), fix=fix)


def existing_folder(text: str | os.PathLike[str], where: str = "", fix: str = "correct the path") -> Path:
    """A folder that may be read. Raises UserError."""
    return existing(text, where, wanted=("folder",), fix=fix)


def file_to_write(text: str | os.PathLike[str], where: str = "") -> Path:
    """A path at which a file can be written: there is none yet, or a regular one, in a folder that is there.

    Raises UserError.
    """
    path = expand(text, where)
    kind = kind_of(path, where)
    if kind == "folder":
        raise UserError("is a folder", where=where, fix="give the name of a file in it")
    if kind not in ("file", "missing"):
        raise UserError(f"is a {kind}, not a file", where=where, fix="give the name of a file")
    folder = path.absolute().parent
    if kind_of(folder, where) != "folder":
        raise UserError(f"there is no folder {path.parent}", where=where, fix="create it, or write elsewhere")
    if not _may(folder, os.W_OK | os.X_OK):
        raise UserError(f"no permission to write in {folder}", where=where, fix="write elsewhere")
    return path


def folder_to_write(text: str | os.PathLike[str], where: str = "", room: int = 0) -> Path:
    """A path at which a folder is, or can be made with those above it. Raises UserError."""
    path = expand(text, where, room)
    above = path.absolute()
    while (kind := kind_of(above, where)) == "missing":
        if os.path.islink(above):
            raise UserError(f"{above} is a link to nothing", where=where, fix="remove it, or write elsewhere")
        above = above.parent
    if kind != "folder":
        raise UserError(f"{above} is not a folder", where=where, fix="choose another folder")
    if not _may(above, os.W_OK | os.X_OK):
        raise UserError(f"no permission to write in {above}", where=where, fix="choose another folder")
    return path


def read_whole(path: Path, where: str, most: int, what: str) -> bytes:
    """A regular file's bytes, read once: what is not one is refused after it is opened, so that nothing can
    take its place, and before it is read, so that nothing is waited for.

    Args:
        most: bytes it may have.
        what: it is to be, with its article, for messages: "a recipe".

    Raises UserError for what is no regular file, larger, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                kind = kind_of(path, where)
                fix = "write it to a file: it is read again, and kept" if kind == "pipe" else ""
                raise UserError(f"is a {kind}, not {what} file", where=where, fix=fix)
            data = file.read(most + 1)
    except FileNotFoundError:
        raise UserError("no such file", where=where) from None
    except IsADirectoryError:
        raise UserError(f"is a folder, not {what} file", where=where) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot be read: {reason}", where=where) from None
    if len(data) > most:
        raise UserError(f"is larger than {most >> 20} MiB, so it is not {what}", where=where)
    return data


def _may(path: Path, mode: int) -> bool:
    """Whether this process, as whom it acts, may use a path so."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)
