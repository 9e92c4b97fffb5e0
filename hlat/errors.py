"""The one exception that means "the user can fix this".

Every command turns a `UserError` into a single line on stderr and exit code 2. Anything else is a defect of
HLAT and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST_NAME, _LONGEST_PATH = 255, 4096  # bytes, on nearly all file systems; on Linux
_LONGEST_PART = 900  # characters of a part of a message
_FULL = (errno.ENOSPC, errno.EDQUOT)
# What the machine says of a file. ENOENT and EEXIST are not among them: of a file that was looked for, or
# made, they are a defect of HLAT.
_OF_A_FILE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO),
    *(errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ETXTBSY, *_FULL),
)


# What HLAT itself needs: without it a command ends with one line.
REQUIRED = ("torch", "numpy", "pydantic", "yaml", "rich", "safetensors", "tokenizers", "sentencepiece")


class UserError(Exception):
    """Wrong input: what is wrong, where it is (file, key) and what to write instead.

    Args:
        what: the fact, in a few words ("unknown key 'lr_rate'").
        where: the place, a file and a key if there is one ("recipes/tiny.yaml: optim.lr_rate").
        fix: what to write or do instead ("did you mean 'lr'?").
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(self.line())

    def line(self) -> str:
        """The message as one line, without line breaks whatever its parts hold. A part that quotes too much
        of what it was given, as messages of libraries do, is cut in its middle.
        """
        what, fix = _cut(self.what), _cut(self.fix)
        text = f"{self.where}: {what}" if self.where else what
        text = f"{text}; {fix}" if fix else text
        return " ".join(text.split())


def _cut(text: str) -> str:
    if len(text) <= _LONGEST_PART:
        return text
    return f"{text[: _LONGEST_PART - 200]} … {text[-190:]}"


class TrainingStopped(UserError):
    """The guard gave up: the run was healthy software on a sick loss. The last complete checkpoint is
    untouched.
    """

    exit_code = 3


class StorageFailed(UserError):
    """A disk or a store does not do its part; nothing is wrong with the input. The same command may be
    started again once it does.
    """

    exit_code = 74  # EX_IOERR of sysexits.h


class SaveFailed(StorageFailed):
    """State could not be written: a full disk, a store that does not answer. What was complete before is
    untouched.
    """


class FolderLost(UserError):
    """Another process has taken over the run folder: this one writes nothing more. What starts runs again
    (`hlat supervise`, the batch script) leaves one that ended so alone, as its successor trains.
    """

    exit_code = 77


@contextmanager
def names_explained() -> Iterator[None]:
    """Turn what Python raises for a file that cannot be used, wherever it is used first, into a UserError: a
    name that is too long for the file system, or that the locale's encoding does not have; a path that is
    closed to this user, leads nowhere, or lies on a disk that is full or broken. `hlat.paths` says it better,
    with the option or the key, for what is looked at before.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise too_long(os.fsdecode(error.filename or "")) from error
        if error.errno not in _OF_A_FILE or not isinstance(error.filename, str | bytes | os.PathLike):
            raise
        what, where = f"cannot be used: {error.strerror}", os.fsdecode(error.filename)
        if error.errno in _FULL:
            raise StorageFailed(what, where=where, fix="make room there") from error
        raise UserError(what, where=where) from error
    except UnicodeEncodeError as error:
        encoding = sys.getfilesystemencoding()
        if encoding == "utf-8" or error.encoding.lower().replace("latin-1", "iso8859-1") != encoding:
            raise
        raise not_in_locale(error) from error


def not_in_locale(error: UnicodeEncodeError, where: str = "") -> UserError:
    """The error for a text that can be no file name here."""
    encoding = sys.getfilesystemencoding()
    text = error.object if len(error.object) <= 80 else f"{error.object[:80]}…"
    if encoding == "utf-8":
        return UserError(f"{text!a} is not UTF-8 text", where=where, fix="choose a name that is")
    what = f"{text!a} is no file name in this locale, whose encoding is {encoding}"
    return UserError(what, where=where, fix="set PYTHONUTF8=1, or a locale with UTF-8 such as LC_ALL=C.UTF-8")


def check_length(path: str | os.PathLike[str], room: int = 0) -> None:
    """Raise UserError for a path that no file system can have, before anything is made of it.

    Args:
        path: absolute.
        room: bytes that longer paths will need behind it.
    """
    with names_explained():
        names = [os.fsencode(name) for name in os.fspath(path).split("/")]
    whole = sum(map(len, names)) + len(names) + room
    if max(map(len, names)) > _LONGEST_NAME or whole > _LONGEST_PATH:
        raise too_long(os.fspath(path))


def too_long(path: str) -> UserError:
    """The error for a path with a name, or as a whole, too long for a file system."""
    name = max(path.split("/"), key=lambda part: len(os.fsencode(part)))
    size = len(os.fsencode(name))
    if size > _LONGEST_NAME:
        what = f"the name '{name[:40]}…' has {size} bytes, and a file system takes {_LONGEST_NAME}"
    else:
        what = f"the path '{path[:40]}…' has {len(os.fsencode(path))} bytes, too many for this system"
    return UserError(what, fix="choose a shorter one")


def missing_package(name: str) -> UserError:
    """The error for one of `REQUIRED` that is not installed here."""
    return UserError(f"the package '{name}' is not installed here", fix="run: hlat doctor --fix-plan")


def missing_extra(package: str, extra: str, purpose: str) -> UserError:
    """The error for an optional package that is not installed, with the line that installs it."""
    return UserError(f"{purpose} needs the package '{package}'", fix=f"run: pip install 'hlat[{extra}]'")
