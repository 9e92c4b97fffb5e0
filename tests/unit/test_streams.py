"""Standard streams that are closed, full, or without a reader: one line or none, and never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HLAT = [sys.executable, "-m", "hlat"]


def ended(redirection: str, *words: str) -> tuple[int, str]:
    """Exit code and stderr of a command with a redirection of the shell's."""
    script = f'exec "$@" {redirection}'
    command = ["sh", "-c", script, "sh", *HLAT, *words]
    done = subprocess.run(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    )
    return done.returncode, done.stderr.decode()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["recipes", "list"]])
def test_a_full_disk_behind_standard_output(words: list[str]) -> None:
    code, said = ended(">/dev/full", *words)
    assert code == 74
    assert said == "hlat: error: standard output cannot be written: No space left on device\n"


@pytest.mark.slow
def test_closed_streams() -> None:
    assert ended(">&-", "recipes", "show", "tiny") == (0, "")
    assert ended(">&- <&-", "recipes", "show", "nosuch")[0] == 2
    assert ended("2>&-", "recipes", "show", "nosuch") == (2, "")
    assert ended("2>/dev/full", "recipes", "show", "nosuch") == (2, "")


@pytest.mark.slow
def test_a_reader_that_has_gone() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [*HLAT, "recipes", "show", "tiny"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    os.close(writing)
    assert done.returncode == 141 and done.stderr == b""
