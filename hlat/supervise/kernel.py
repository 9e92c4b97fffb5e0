"""New lines of the kernel's log, where this process may read it."""

from __future__ import annotations

import os
import re
import subprocess
import time

_RECORD_BYTES = 8192  # the longest record the kernel gives
_MOST_BYTES = 1 << 20
_SLACK = 2.0  # seconds between the clock of the log and the one asked
_STAMP = re.compile(r"^\[\s*(\d+\.\d+)\] ")


def kernel_lines(since: float) -> str:
    """Messages the kernel logged after `since` (as `time.time` counts), a line each, oldest first.

    Empty where the log may not be read (containers; kernel.dmesg_restrict). Waits for nothing.
    """
    start = time.clock_gettime(time.CLOCK_MONOTONIC_RAW) - (time.time() - since) - _SLACK
    try:
        return _from_device(start)
    except OSError:
        return _from_dmesg(start)


def _from_device(start: float) -> str:
    """Each read of /dev/kmsg gives one record: `priority,number,microseconds,flags;text` and details."""
    lines, size = [], 0
    handle = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    try:
        while size < _MOST_BYTES:
            try:
                record = os.read(handle, _RECORD_BYTES).decode(errors="replace")
            except BlockingIOError:
                break  # that was the last one
            except BrokenPipeError:
                continue  # the oldest were overwritten meanwhile
            head, _, text = record.partition(";")
            stamp = head.split(",")[2:3]
            if stamp and stamp[0].isdigit() and int(stamp[0]) / 1e6 >= start:
                lines.append(text.partition("\n")[0])
                size += len(lines[-1])
    finally:
        os.close(handle)
    return "\n".join(lines)


def _from_dmesg(start: float) -> str:
    try:
        done = subprocess.run(
            ["dmesg"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=5,
            check=True,
            encoding="utf-8",
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    found = ((_STAMP.match(line), line) for line in done.stdout.splitlines())
    lines = [line[match.end() :] for match, line in found if match and float(match[1]) >= start]
    return "\n".join(lines)[-_MOST_BYTES:]
