"""Whether a recipe can run on some machines, as far as it says itself: asked before anything is started."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hlat.data.presence import check_tokenizer
from hlat.train.run import refuse_unsupported

if TYPE_CHECKING:
    from hlat.recipe import Recipe


def check_recipe(recipe: Recipe, nodes: int = 0, processes: int = 0) -> None:
    """`check_runnable` but for the variables: raise UserError for what any job with this recipe would."""
    section = recipe.parallel
    # One replica is the easiest to serve: what it refuses, any number of them refuses.
    least = section.tp * section.pp * (1 if section.dp == "auto" else section.dp)
    recipe.accumulate(nodes * processes or least)
    refuse_unsupported(recipe, here=False)
    if recipe.backend == "nxd":
        from hlat.backend.neuron.limits import check_cores, check_nodes
        from hlat.backend.neuron.profile import CORES

        check_cores(recipe, processes or CORES)
        if nodes:
            check_nodes(recipe, nodes, processes or CORES)


def check_runnable(
    recipe: Recipe, nodes: int = 0, processes: int = 0, environ: Mapping[str, str] = os.environ
) -> None:
    """Raise UserError when a recipe cannot run on `nodes` machines of `processes` each, or, where these are
    0 and so not known, on any number of them.

    Args:
        environ: variables that the processes will have.
    """
    check_recipe(recipe, nodes, processes)
    check_tokenizer(recipe)
    if recipe.backend == "nxd":
        from hlat.backend.neuron.profile import CORES, conflicts, preview, profile

        nodes, cores = nodes or 1, processes or CORES
        settings = profile(recipe, nodes=nodes, cores=cores)
        conflicts(recipe, preview(settings, environ), nodes=nodes, cores=cores)
