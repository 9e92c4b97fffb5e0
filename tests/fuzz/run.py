#!/usr/bin/env python
"""Fuzz one reader: damaged files in, and nothing may come of it but a UserError or the right answer.

    python tests/fuzz/run.py recipe --seconds 600 --seed 1

Targets: those of targets.py. Each example runs in this process, under a limit of CPU time and of memory.
The input that is being read lies in DIR/TARGET (a new folder in the system's temporary one by default), so
that it is there when the process dies; what failed is made as small as hypothesis can, printed with its
traceback, and kept there.

Exit code 0: nothing found; 1: a finding; the last line of stdout is JSON:
{target, seed, examples, refused, seconds}.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from mutations import Files
from target import Target
from targets import TARGETS

from hlat.errors import UserError, names_explained

CPU_SECONDS = 30  # of one example; all inputs are small
ROOM = 6 * 2**30  # bytes of address space beyond what the libraries take
ROUND = 100  # examples with one seed


class Hang(BaseException):
    """An example has used up its time. Not an Exception: no reader's handler takes it for its own trouble."""


def lay_out(folder: Path, files: Files) -> None:
    """Write the files into an emptied folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(content)


class Fuzzer:
    """Runs examples of one target until the time is over."""

    def __init__(self, target: Target, folder: Path, seconds: float) -> None:
        self.target, self.folder = target, folder
        self.end = time.monotonic() + seconds
        self.counts: Counter[str] = Counter()

    def example(self, draw: Callable[..., Any]) -> None:
        """One input. Raises what the reader raises, but for a UserError of one line."""
        files = self.target.draw(draw)
        if time.monotonic() > self.end:
            return  # of the last round, only what is drawn remains
        lay_out(self.folder, files)
        self.counts["examples"] += 1
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            with names_explained():
                self.target.read(self.folder)
        except UserError as error:
            self.counts["refused"] += 1
            check_line(error)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def rounds(self, first_seed: int) -> None:
        """Rounds of examples, each with a seed of its own. Raises the first finding, made small."""
        number = first_seed
        while time.monotonic() < self.end:

            @seed(number)
            @settings(
                max_examples=ROUND,
                deadline=None,
                database=None,
                print_blob=False,
                phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck),
            )
            @given(st.data())
            def one_round(data: Any) -> None:
                self.example(data.draw)

            one_round()
            number += 1


def check_line(error: UserError) -> None:
    """Fails for a message that is no use to a person."""
    line = error.line()
    assert "\n" not in line and error.what.strip(), f"not a message: {line!r}"
    assert len(line) < 2000, f"a message of {len(line)} characters: {line[:200]!r}"
    for class_name in ("Traceback", "object at 0x", "<class '"):
        assert class_name not in line, f"a message for nobody: {line!r}"


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang(f"more than {CPU_SECONDS} s of CPU time")


def limit_memory(room: int) -> None:
    """Let this process have `room` bytes of address space more than it has now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def fuzz(target: Target, folder: Path, seconds: float, first_seed: int) -> tuple[Counter[str], str]:
    """Fuzz for some seconds. Returns the counts, and the traceback of a finding or ''."""
    fuzzer = Fuzzer(target, folder, seconds)
    signal.signal(signal.SIGPROF, _hang)
    try:
        fuzzer.rounds(first_seed)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        return fuzzer.counts, traceback.format_exc()
    return fuzzer.counts, ""


def main(arguments: list[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path)
    args = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    folder = (args.dir or Path(tempfile.mkdtemp(prefix="hlat-fuzz-"))) / args.target
    target = TARGETS[args.target]()
    limit_memory(ROOM)
    start = time.monotonic()
    counts, finding = fuzz(target, folder, args.seconds, args.seed)
    if finding:
        lines = [line if len(line) <= 400 else f"{line[:400]} …" for line in finding.splitlines()]
        print(*lines[-60:], f"the input lies in {folder}", sep="\n", file=sys.stderr)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    row = {
        "target": args.target,
        "seed": args.seed,
        "examples": counts["examples"],
        "refused": counts["refused"],
    }
    print(json.dumps({**row, "seconds": round(time.monotonic() - start, 1)}), flush=True)
    return 1 if finding else 0


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.exit(main())
