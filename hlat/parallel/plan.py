"""Which part of each parameter a rank holds: the plan that turns names into shards.

A role says how a parameter is cut over the tensor-parallel ranks:

    column     rows of the matrix, i.e. output features: query heads, inner features of the MLP
    key_value  like column, by key/value heads; with fewer heads than ranks, ranks share a head
    row        columns of the matrix, i.e. input features; the layer's outputs are partial sums
    vocab      rows, i.e. tokens of the vocabulary; the last rank may hold fewer
    norm       not cut; under sequence parallelism each rank sees a part of the tokens, so that its gradient
               is a partial sum
    replicate  not cut, and every rank sees all tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from hlat.mesh import Layout, Place, split

if TYPE_CHECKING:
    from hlat.model.config import ModelConfig

PLAN = (
    ("embed.weight", "vocab"),
    ("head.weight", "vocab"),
    ("*.attention.q.weight", "column"),
    ("*.attention.k.weight", "key_value"),
    ("*.attention.v.weight", "key_value"),
    ("*.attention.o.weight", "row"),
    ("*.mlp.gate.weight", "column"),
    ("*.mlp.up.weight", "column"),
    ("*.mlp.down.weight", "row"),
    ("*norm.weight", "norm"),
    ("classifier.weight", "replicate"),
)


@dataclass(frozen=True)
class Part:
    """What one rank holds of one parameter: a rectangle of it.

    shape: the whole parameter.
    offset, size: this rank's rectangle.
    copies: ranks of a replica (pipeline x tensor parallel) that hold this same rectangle.
    primary: exactly one of the copies; it is counted in norms and written to checkpoints.
    sum_over: the group ("tp", "kv", "tie") over which the copies' gradients are partial sums; "" where each
        copy has the whole gradient.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    copies: int = 1
    primary: bool = True
    sum_over: str = ""

    @property
    def box(self) -> tuple[slice, ...]:
        """Index expression of the rectangle in the whole parameter."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.size, strict=True))


def role_of(name: str) -> str:
    """The role of a parameter. Raises KeyError for a name the plan does not know."""
    for pattern, role in PLAN:
        if fnmatchcase(name, pattern):
            return role
    raise KeyError(f"no role for parameter '{name}': add it to hlat.parallel.plan.PLAN")


def part_of(
    name: str, shape: Sequence[int], config: ModelConfig, layout: Layout, place: Place, *, path: str = ""
) -> Part:
    """The part of a parameter that the rank at `place` holds (if its pipeline stage holds any).

    Args:
        name: global name.
        shape: of the whole parameter.
        config: the model; its kv_heads decide which ranks share key/value heads.
        layout, place: the mesh and where on it.
        path: the name inside the rank's module where it differs: "head.weight" for a tied embedding on the
            last stage of a pipeline.
    """
    shape, role = tuple(shape), role_of(name)
    if role in ("norm", "replicate"):
        partial = "tp" if layout.sequence and role == "norm" else ""
        return Part(shape, (0,) * len(shape), shape, layout.tp, place.tp == 0, partial)
    if role == "key_value" and layout.tp > config.kv_heads:
        sharing = layout.tp // config.kv_heads
        part = _cut(shape, 0, config.kv_heads, place.tp // sharing)
        return Part(shape, *part, copies=sharing, primary=place.tp % sharing == 0, sum_over="kv")
    part = _cut(shape, 1 if role == "row" else 0, layout.tp, place.tp)
    if config.tie_embeddings and name == "embed.weight" and layout.pp > 1:
        return Part(shape, *part, copies=2, primary=path != "head.weight", sum_over="tie")
    return Part(shape, *part)


def _cut(shape: tuple[int, ...], dim: int, parts: int, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    start, length = split(shape[dim], parts, index)
    offset = tuple(start if i == dim else 0 for i in range(len(shape)))
    return offset, tuple(length if i == dim else n for i, n in enumerate(shape))
