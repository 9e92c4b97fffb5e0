"""The weights of a rank: its parts of the model's parameters, trained ones in buckets, frozen ones beside."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hlat.backend.precision import DTYPES
from hlat.model.decoder import Decoder
from hlat.model.init import init_tensor, parameter_shapes
from hlat.parallel.buckets import MAX_ELEMENTS, Bucket, BucketDtypes, Share, build_buckets, set_parameter
from hlat.parallel.plan import Part, part_of

if TYPE_CHECKING:
    from hlat.backend.base import Backend
    from hlat.optim.groups import Group
    from hlat.recipe import Recipe

_OVERLAP_ELEMENTS = 1 << 23  # 32 MiB of fp32: small enough that most reductions start during backward


def build_weights(
    recipe: Recipe, model: Decoder, groups: dict[str, Group], backend: Backend
) -> tuple[list[Bucket], dict[str, tuple[Tensor, Part]]]:
    """Replace a meta model's parameters by this rank's parts, initialised from the recipe's seed.

    The values do not depend on the layout: each tensor is made whole from its own generator and cut.

    Args:
        recipe: precision, seed, layout.
        model: whole parameters on the meta device; layers of other pipeline stages are gone already.
        groups: optimizer group of each trained parameter, by global name.
        backend: the rank and its device.

    Returns:
        The buckets, and the frozen parameters by global name.
    """
    layout, place = backend.layout, backend.place
    shapes = parameter_shapes(recipe.model)
    parts = {}
    for path, _ in model.named_parameters():
        name = path if path in shapes else "embed.weight"  # a tied head on a stage without the embedding
        where = backend.head_place if ".attention." in name else place
        parts[path] = name, part_of(name, shapes[name], recipe.model, layout, where, path=path)

    def initial(name: str, part: Part) -> Tensor:
        return init_tensor(recipe.model, name, part.shape, recipe.run.seed)[part.box]

    # With many replicas a bucket is larger, so that each one's share of it is worth a message.
    overlapping = min(MAX_ELEMENTS, max(_OVERLAP_ELEMENTS, layout.dp << 20))
    precision = recipe.precision
    own_master = precision.master == "none" or precision.compute == "fp32"
    buckets = build_buckets(
        model,
        {path: (name, part, groups[name]) for path, (name, part) in parts.items() if name in groups},
        initial,
        dtypes=BucketDtypes(
            DTYPES[precision.compute], DTYPES[precision.accumulate], None if own_master else torch.float32
        ),
        device=backend.device,
        share=Share(place.dp, layout.dp) if layout.zero1 else Share(),
        max_elements=overlapping if layout.dp > 1 else MAX_ELEMENTS,
    )
    frozen = {}
    for path, (name, part) in parts.items():
        if name not in groups:
            value = initial(name, part).to(backend.device, DTYPES[precision.compute])
            set_parameter(model, path, nn.Parameter(value, requires_grad=False))
            frozen[name] = value, part
    model.tie()
    model.rope.to_empty(device=backend.device)
    return buckets, frozen
