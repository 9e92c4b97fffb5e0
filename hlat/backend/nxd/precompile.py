"""Compiling every graph of a run before it starts, on the nodes' idle cores.

`neuron_parallel_compile` starts a short run in which nothing is computed, collects its graphs and compiles
them side by side into the cache. The short run has everything in it that makes a graph of its own: the first
step and the steady one, an evaluation, a checkpoint, a step after each, and the step from which a reducer
compresses. A second one continues from its checkpoint, as the real run will some day.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hlat.errors import UserError
from hlat.host.python import module, torchrun_module

if TYPE_CHECKING:
    from hlat.recipe import Recipe

_STOPS = (8, 12)  # of the short run, and of the one that continues it
_EVERY = 3
_SUFFIX = ".precompile"
_TOOL = "neuron_parallel_compile"
_FIX = "install neuronx-cc and torch-neuronx from https://pip.repos.neuron.amazonaws.com"


@contextmanager
def scratch(run_dir: str, environ: Mapping[str, str] = os.environ) -> Iterator[str]:
    """A run folder for the short run, beside the real one: all nodes write its checkpoint together, so it
    must be where they all see it. The first node clears it away, before and after.
    """
    folder = Path(run_dir).absolute()
    folder = folder.with_name(folder.name + _SUFFIX)
    first = environ.get("NODE_RANK", "0") == "0"
    if first:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        yield str(folder)
    finally:
        if first:
            shutil.rmtree(folder, ignore_errors=True)


def commands(
    name: str,
    overrides: Sequence[str],
    recipe: Recipe,
    folder: str,
    environ: Mapping[str, str] = os.environ,
) -> list[list[str]]:
    """The commands that compile a run ahead, one after the other; start them once on every node.

    Args:
        name, overrides: as given to `hlat train`.
        recipe: what they say.
        folder: a run folder for the short run, which may be thrown away: see `scratch`.
        environ: NODES, NODE_RANK, MASTER_ADDR and MASTER_PORT describe the cluster, CORES the processes of a
            node (32); one node without them.

    Raises:
        UserError: the tool is not installed.
    """
    tool = shutil.which(_TOOL, path=environ.get("PATH"))
    if tool is None:
        raise UserError(f"{_TOOL} is not on the PATH", where="hlat train --precompile", fix=_FIX)
    nodes = environ.get("NODES", "1")
    launch = module("torch.distributed.run", "--nproc_per_node", environ.get("CORES", "32"))
    if nodes != "1":
        launch += ["--nnodes", nodes, "--node_rank", environ.get("NODE_RANK", "0")]
        launch += ["--master_addr", environ.get("MASTER_ADDR", "localhost")]
        launch += ["--master_port", environ.get("MASTER_PORT", "29500")]
    short = [f"run.dir={folder}", f"eval.every={_EVERY}", f"checkpoint.every={_EVERY}", "log.every=2"]
    if recipe.reduce.options.get("start_step", 0) > _EVERY:  # a reducer that is dense for so many steps
        short.append(f"reduce.start_step={_EVERY}")
    train = [tool, *launch, *torchrun_module(["hlat", "train", name, *overrides, *short])]
    rounds = 2 * recipe.method.options.get("anchor_every", 0)  # a method with two kinds of steps
    stops = dict.fromkeys(min(stop + rounds, recipe.run.steps) for stop in _STOPS)
    return [[*train, f"run.stop_at_step={stop}", "run.resume=auto"] for stop in stops]
