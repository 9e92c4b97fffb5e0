"""The weights of a rank: its parts of the model's parameters, trained ones in buckets, frozen ones beside."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hlat.backend.precision import DTYPES
from hlat.model.decoder import Decoder
from hlat.model.fit import check_fits
from hlat.model.init import init_tensor, parameter_shapes
from hlat.parallel.buckets import MAX_ELEMENTS, Bucket, BucketDtypes, Share, build_buckets, set_parameter
from hlat.parallel.plan import Part, part_of
from hlat.registry import lookup
from hlat.train.frozen import Frozen
from hlat.train.update import needs_backward

if TYPE_CHECKING:
    from hlat.backend.base import Backend
    from hlat.optim.groups import Group
    from hlat.recipe import Recipe

Initial = Callable[[str, Part], Tensor]
"""The value, on the CPU, of a part of a parameter, by its global name: fp32, or bf16 if it is stored so."""
_OVERLAP_ELEMENTS = 1 << 23  # 32 MiB of fp32: small enough that most reductions start during backward


def build_weights(
    recipe: Recipe,
    model: Decoder,
    groups: dict[str, Group],
    backend: Backend,
    lay_out: Callable[..., list[Bucket]] | None = None,
    initial: Initial | None = None,
) -> tuple[list[Bucket], dict[str, Frozen]]:
    """Replace a meta model's parameters by this rank's parts.

    The values do not depend on the layout: each tensor is made or read whole, and cut.

    Args:
        recipe: precision, seed, layout.
        model: whole parameters on the meta device; layers of other pipeline stages are gone already.
        groups: optimizer group of each trained parameter, by global name.
        backend: the rank and its device.
        lay_out: how trained parameters become buckets; default: `flat_buckets`.
        initial: the values training starts from; default: those of the recipe's seed.

    Returns:
        The buckets, and the frozen parameters by global name.
    """
    layout = backend.layout
    shapes = parameter_shapes(recipe.model)
    parts = {}
    for path, _ in model.named_parameters():
        name = path if path in shapes else "embed.weight"  # a tied head on a stage without the embedding
        where = backend.head_place if ".attention." in name else backend.place
        parts[path] = name, part_of(name, shapes[name], recipe.model, layout, where, path=path)

    _check_memory(recipe, backend, [(part.size, name in groups) for name, part in parts.values()])
    initial = initial or initial_values(recipe)
    trained = {path: (name, part, groups[name]) for path, (name, part) in parts.items() if name in groups}
    buckets = (lay_out or flat_buckets)(recipe, backend, model, trained, initial)
    frozen = {}
    for path, (name, part) in parts.items():
        if name not in groups:
            held = Frozen.of(initial(name, part), part, DTYPES[recipe.precision.compute], backend.device)
            set_parameter(model, path, nn.Parameter(held.value, requires_grad=False))
            frozen[name] = held
    model.tie()
    model.rope.to_empty(device=backend.device)
    return buckets, frozen


def _check_memory(recipe: Recipe, backend: Backend, sizes: list[tuple[tuple[int, ...], bool]]) -> None:
    """Raise UserError where what this rank keeps between steps is more than the memory there is.

    Args:
        sizes: of its parts of the parameters, and whether each is trained.
    """
    precision, layout = recipe.precision, backend.layout
    held = sum(math.prod(size) for size, _ in sizes)
    trained = sum(math.prod(size) for size, moves in sizes if moves)
    share = layout.dp if layout.zero1 else 1
    size = held * DTYPES[precision.compute].itemsize + recipe.model.position_bytes()
    if needs_backward(recipe):
        slots = len(getattr(lookup("optim", recipe.optim.name, "optim.name"), "slots", ()))
        size += trained * DTYPES[precision.accumulate].itemsize
        size += trained * slots * DTYPES[precision.states].itemsize // share
    if precision.master == "fp32" and precision.compute != "fp32":
        size += trained * 4 // share
    if backend.device.type == "cpu" and recipe.init.from_ is None and precision.compute != "fp32":
        size += (held - trained) * 4  # see `Frozen`; weights of init.from may be narrow themselves
    check_fits(
        size,
        backend.device,
        f"the weights of {recipe.model.parameter_count():,} parameters and what training keeps beside them",
        where="model",
        fix="take a smaller model, or divide it over more memory (parallel.tp, parallel.pp)",
    )


def initial_values(recipe: Recipe) -> Initial:
    """The fp32 value, on the CPU, of a part of a parameter when training starts."""

    def initial(name: str, part: Part) -> Tensor:
        return init_tensor(recipe.model, name, part.shape, recipe.run.seed)[part.box]

    return initial


def flat_buckets(
    recipe: Recipe,
    backend: Backend,
    model: nn.Module,
    trained: dict[str, tuple[str, Part, Group]],
    initial: Initial,
) -> list[Bucket]:
    """Lay the trained parameters (path -> global name, part, group) into flat buckets as the recipe says."""
    layout, precision = backend.layout, recipe.precision
    # With many replicas a bucket is larger, so that each one's share of it is worth a message.
    overlapping = min(MAX_ELEMENTS, max(_OVERLAP_ELEMENTS, layout.dp << 20))
    own_master = precision.master == "none" or precision.compute == "fp32"
    return build_buckets(
        model,
        trained,
        initial,
        dtypes=BucketDtypes(
            DTYPES[precision.compute],
            DTYPES[precision.accumulate] if needs_backward(recipe) else None,
            None if own_master else torch.float32,
        ),
        device=backend.device,
        share=Share(backend.place.dp, layout.dp) if layout.zero1 else Share(),
        max_elements=overlapping if layout.dp > 1 else MAX_ELEMENTS,
    )
