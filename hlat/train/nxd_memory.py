"""What one NeuronCore holds of a model for good, from the shapes alone: before any node is started.

Activations, the compiler's scratch space and the runtime come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from hlat.backend.precision import DTYPES
from hlat.mesh import Layout, Place
from hlat.model.decoder import Decoder
from hlat.model.init import parameter_shapes
from hlat.parallel.buckets import set_parameter
from hlat.parallel.pipeline import prune, rank_parts
from hlat.parallel.plan import part_of
from hlat.registry import lookup

if TYPE_CHECKING:
    from hlat.recipe import Recipe

CORE_BYTES = 16 << 30  # of one NeuronCore of trn1: 32 GiB a chip, two cores


@dataclass(frozen=True)
class CoreMemory:
    """Bytes on a core of one pipeline stage."""

    stage: int
    parameters: int
    weights: int
    gradients: int
    masters: int
    states: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.masters + self.states


def meta_stage(recipe: Recipe, layout: Layout, place: Place) -> Decoder:
    """What the rank at `place` holds of the model, with its parts of the parameters, on the meta device."""
    with torch.device("meta"):
        model = Decoder(recipe.model)
    prune(model, rank_parts(recipe.model, layout, place, recipe.parallel.cuts))
    shapes, dtype = parameter_shapes(recipe.model), DTYPES[recipe.precision.compute]
    for path in [path for path, _ in model.named_parameters()]:
        name = path if path in shapes else "embed.weight"
        part = part_of(name, shapes[name], recipe.model, layout, place, path=path)
        set_parameter(model, path, nn.Parameter(torch.empty(part.size, dtype=dtype, device="meta")))
    model.tie()
    return model


def stage_memory(recipe: Recipe, model: nn.Module, layout: Layout, stage: int) -> CoreMemory:
    """Bytes of a stage that `meta_stage` made, NxD's layers in it or not."""
    precision, share = recipe.precision, layout.dp if layout.zero1 else 1
    count = sum(parameter.numel() for parameter in model.parameters())
    size = {kind: DTYPES[kind].itemsize for kind in ("fp32", "bf16")}
    own = -(-count // share)
    slots = len(getattr(lookup("optim", recipe.optim.name), "slots", (1, 2)))
    master = precision.compute if precision.master == "none" else "fp32"
    return CoreMemory(
        stage,
        count,
        weights=count * size[precision.compute],
        gradients=count * size[precision.accumulate],
        masters=own * size[master],
        states=own * slots * size[precision.states],
    )


def table(rows: Sequence[CoreMemory]) -> str:
    """A line for each stage, in GB (1e9 bytes), and how much of a core's memory that is."""
    lines = ["stage  parameters  weights  gradients  masters  states  together  of 16 GiB"]
    for row in rows:
        sizes = (row.weights, row.gradients, row.masters, row.states, row.total)
        columns = "".join(f"{n / 1e9:{w}.2f}" for n, w in zip(sizes, (9, 11, 9, 8, 10), strict=True))
        lines.append(f"{row.stage:5} {row.parameters:11,}{columns}{row.total / CORE_BYTES:10.0%}")
    return "\n".join(lines)
