"""A plug-in for tests: next-token prediction that, once a file is there, does what the file says.

`install(site)` lays it out in a folder as pip would, so that ranks find it through `hlat.plugins`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from hlat.objective.causal_lm import CausalLM
from hlat.registry import register


@register("objective", "mischief")
class Mischief(CausalLM):
    """file: holds `RANK WHAT [SECONDS]`; the rank does it once: sleep, raise, compile (a compiler works for
    it), crash (SIGSEGV), leave (with status 0), nan (the loss of one micro-batch), flood (MB
    of output).
    """

    def __init__(self, *, file: str) -> None:
        super().__init__()
        self.file = Path(file)

    def loss(self, model: Any, batch: Any, denominator: torch.Tensor) -> torch.Tensor:
        """See `CausalLM`."""
        loss = super().loss(model, batch, denominator)
        if self.file.exists():
            rank, what, *seconds = self.file.read_text().split()
            if rank == os.environ.get("RANK"):
                self.file.unlink()
                if what == "nan":
                    return loss * float("nan")
                self._do(what, float(seconds[0]) if seconds else 0.0)
        return loss

    def _do(self, what: str, seconds: float) -> None:
        if what == "sleep":
            time.sleep(seconds)
        elif what == "raise":
            raise ValueError("a mistake in somebody's code")
        elif what == "flood":
            os.write(1, b"uncorrectable ECC error encountered " + b"QUJD" * 100_000 + b"\n")
            lines = b"the same line of a warning, again and again\n" * 25_000
            for _ in range(int(seconds)):
                os.write(1, lines)
        elif what == "leave":
            os._exit(0)
        elif what == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif what == "compile":
            compiler = self.file.absolute().with_name("neuronx-cc")
            compiler.write_text(f"#!/bin/sh\nsleep {seconds}\n")
            compiler.chmod(0o755)
            subprocess.run([str(compiler)], check=True)


def install(site: Path) -> None:
    """Lay this module out in `site`, to be put on PYTHONPATH."""
    info = site / "hlat_mischief-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hlat-mischief\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hlat.plugins]\nmischief = mischief\n")
    (site / "mischief.py").write_text(Path(__file__).read_text())
