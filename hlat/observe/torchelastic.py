"""What torchrun is told of an error, so that its own report, which follows, shows the line, not a riddle."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress

_FILE, _RUN, _SUPERVISED = "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RUN_ID", "HLAT_HEARTBEATS"
_FOLLOWS = "(torchrun's report of it follows)"


def by_torchrun(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun itself has started this process, which `hlat supervise` does without its report."""
    return bool(environ.get(_RUN)) and not environ.get(_SUPERVISED)


def leave_message(line: str, environ: Mapping[str, str] = os.environ) -> None:
    """Leave an error's line where torchrun looks for the reason that a rank has failed: as what
    `torch.distributed.elastic.multiprocessing.errors.record` writes, without importing torch. It is printed
    in place of "To enable traceback see ...". A file that cannot be written is no reason to fail.
    """
    path = environ.get(_FILE)
    if not path or not by_torchrun(environ):
        return
    about = {"py_callstack": line, "timestamp": str(int(time.time()))}
    with suppress(OSError), open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump({"message": {"message": line, "extraInfo": about}}, file)


def told(line: str, environ: Mapping[str, str] = os.environ) -> str:
    """An error's line as it is printed, with a word of torchrun's pages behind it where they come."""
    return f"{line} {_FOLLOWS}" if by_torchrun(environ) else line


def shown_here(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process prints its error: of torchrun's ranks the first does, the others' lines, the same
    as a rule, are in torchrun's report.
    """
    return not by_torchrun(environ) or environ.get("RANK", "0") == "0"
