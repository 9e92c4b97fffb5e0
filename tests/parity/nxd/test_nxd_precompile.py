"""`hlat train RECIPE --precompile` meets every graph that the run will need."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.nxd

PROGRAM = Path(__file__).with_name("nxd_cli.py")
WORDS = ["run.steps=14", "parallel.zero1=false", "reduce={name: conef, start_step: 6}", "checkpoint.every=5"]
# Stands for AWS's tool, which runs the command it is given with this variable set and then compiles. The
# program it is given runs through the stand-ins for NxD's closed parts.
TOOL = """#!{python}
import os, sys
words = sys.argv[1:]
at = words.index("hlat")
os.environ["NEURON_EXTRACT_GRAPHS_ONLY"] = "1"
os.execv(words[0], [*words[: at - 3], {program!r}, *words[at + 1 :]])  # for -P -u -m hlat
"""


def graphs(file: Path) -> set[str]:
    """Hashes of the graphs that torch-xla wrote down."""
    found = set()
    for one in file.parent.glob(f"{file.name}*"):
        found |= set(re.findall(r"Hash(?:es)?: \(?([0-9a-f]+)", one.read_text()))
    return found


def test_xla_mode_every_graph_of_a_run(
    tmp_path: Path, trn_recipe: Path, nxd_start: Callable[..., list[int]]
) -> None:
    tool = tmp_path / "bin" / "neuron_parallel_compile"
    tool.parent.mkdir()
    tool.write_text(TOOL.format(python=sys.executable, program=str(PROGRAM)))
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    ahead, real = tmp_path / "ahead.txt", tmp_path / "real.txt"
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    env = {
        **os.environ,
        "PATH": f"{tool.parent}:{os.environ['PATH']}",
        "CORES": "2",
        "OMP_NUM_THREADS": "1",
        "PJRT_DEVICE": "CPU",
        "NXD_LOG_LEVEL": "error",
        "NEURON_PLATFORM_TARGET_OVERRIDE": "trn1",
        "XLA_FLAGS": flags,
        "XLA_SAVE_TENSORS_FILE": str(ahead),
    }
    command = [sys.executable, "-m", "hlat", "train", str(trn_recipe), *WORDS, "--precompile"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob("run*")), "nothing is left behind"

    os.environ["XLA_SAVE_TENSORS_FILE"] = str(real)
    try:
        for stop in (9, 14):  # and once more, from the checkpoint
            logs = tmp_path / f"logs-{stop}"
            logs.mkdir()
            words = [str(PROGRAM), "train", str(trn_recipe), *WORDS, f"run.stop_at_step={stop}"]
            assert nxd_start("xla-mode", 2, words, logs, 300) == [0, 0], (logs / "rank-0.log").read_text()[
                -3000:
            ]
    finally:
        del os.environ["XLA_SAVE_TENSORS_FILE"]
    needed, known = graphs(real), graphs(ahead)
    assert len(needed) > 5 and needed <= known, f"{len(needed - known)} of {len(needed)} graphs are new"
