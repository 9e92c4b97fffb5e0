"""Standard output that is closed, full, or read by nobody any more."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from typing import TypeVar

Code = TypeVar("Code")
_OF_OUTPUT = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF, errno.EPIPE)
_NOBODY_READS, _CANNOT_WRITE = 141, 74  # as a shell has it for SIGPIPE; EX_IOERR of sysexits.h


def open_closed_streams() -> None:
    """Let the standard streams that are closed (`>&-`) lead to nowhere. Else the next file that is opened
    takes their number, and what is printed, or a library says, goes into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
        if getattr(sys, name) is None:
            mode = "r" if number == 0 else "w"
            stream = os.fdopen(number, mode, encoding="utf-8", errors="replace", closefd=False)
            setattr(sys, name, stream)


def output_failed(error: OSError) -> int | None:
    """The exit code where an error is that of standard output, which is told in a line; else None. What is
    printed afterwards goes nowhere.
    """
    if error.filename is not None or error.errno not in _OF_OUTPUT:
        return None
    try:
        # What did not fit is gone from the buffer, so flushing says nothing: a line end does.
        if error.errno != errno.EPIPE:
            os.write(sys.stdout.fileno(), b"\n")
            return None
    except (OSError, ValueError):
        pass
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if error.errno == errno.EPIPE:  # its reader (head, less) has gone
        return _NOBODY_READS
    with suppress(OSError):
        print(
            f"hlat: error: standard output cannot be written: {error.strerror}", file=sys.stderr, flush=True
        )
    return _CANNOT_WRITE


def flushed(code: Code) -> Code | int:
    """The exit code of a command whose output is out, or of one whose output cannot be written."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return output_failed(error) or code
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    return code
