"""Compiling every graph of a run before it starts, on the nodes' idle cores.

`neuron_parallel_compile` starts a short run in which nothing is computed, collects its graphs and compiles
them side by side into the cache. The short run has everything in it that makes a graph of its own: the first
step and the steady one, an evaluation, a checkpoint, and a step after each.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence

from hlat.errors import UserError

_STEPS = 8
_TOOL = "neuron_parallel_compile"
_FIX = "install neuronx-cc and torch-neuronx from https://pip.repos.neuron.amazonaws.com"


def command(
    recipe: str, overrides: Sequence[str], folder: str, environ: Mapping[str, str] = os.environ
) -> list[str]:
    """The command that compiles a run ahead; start it once on every node.

    Args:
        recipe, overrides: as given to `hlat train`.
        folder: a run folder for the short run, which may be thrown away.
        environ: NODES, NODE_RANK, MASTER_ADDR and MASTER_PORT describe the cluster; one node without them.

    Raises:
        UserError: the tool is not installed.
    """
    tool = shutil.which(_TOOL, path=environ.get("PATH"))
    if tool is None:
        raise UserError(f"{_TOOL} is not on the PATH", where="hlat train --precompile", fix=_FIX)
    nodes = environ.get("NODES", "1")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", environ.get("CORES", "32")]
    if nodes != "1":
        launch += ["--nnodes", nodes, "--node_rank", environ.get("NODE_RANK", "0")]
        launch += ["--master_addr", environ.get("MASTER_ADDR", "localhost")]
        launch += ["--master_port", environ.get("MASTER_PORT", "29500")]
    short = [
        f"run.dir={folder}",
        "run.resume=never",
        f"run.stop_at_step={_STEPS}",
        "eval.every=3",
        "checkpoint.every=3",
        "log.every=2",
    ]
    return [tool, *launch, "-m", "hlat", "train", recipe, *overrides, *short]
