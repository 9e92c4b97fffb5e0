"""What a layout costs a rank, in closed form: bytes it sends in a step, bytes it keeps between steps.

Convention for bytes sent, that of ring algorithms: over n ranks, an all-reduce of N bytes sends 2 (n-1)/n N,
a reduce-scatter or all-gather (n-1)/n of the whole tensor's N, point to point N. A group of one sends
nothing. Evaluation, checkpoints, the comparison of replicas (`parallel.verify_every`) and an optimizer's own
sums are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from hlat.mesh import Layout, Place
from hlat.parallel.plan import Part, part_of

if TYPE_CHECKING:
    from hlat.recipe import Recipe

BYTES = {"fp32": 4, "bf16": 2}
PAD = 1024  # elements; of each replica's share of a bucket
CLOSE = 1 << 27  # elements; the largest bucket without replicas
CLOSE_OVERLAPPED, CLOSE_A_REPLICA = 1 << 23, 1 << 20  # with replicas: the first, or the second times dp


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends in a training step, by the group it sends them in.

    tp: activations, per-token sums of the loss, gradients of norms under sequence parallelism. kv: gradients
    of shared key/value heads. pp: residual stream and its gradient. tie: the gradient of a tied embedding.
    dp: gradients, with ZeRO-1 also weights, and the number of targets. world: loss and norm.
    """

    world: float = 0.0
    dp: float = 0.0
    pp: float = 0.0
    tp: float = 0.0
    kv: float = 0.0
    tie: float = 0.0

    @property
    def total(self) -> float:
        """Over all groups."""
        return float(sum(getattr(self, field.name) for field in fields(self)))


@dataclass(frozen=True)
class Kept:
    """Bytes that a rank keeps from step to step, padding of buckets included; activations come on top.

    masters is 0 where the weights are their own masters: fp32 compute, or precision.master none. received are
    the buffers for states and gradients from other pipeline stages, one for each micro-batch of a step.
    frozen are the fp32 values of parameters that are not trained and computed with in bf16, in the host's
    memory; weights to start from that are bf16 themselves need none.
    """

    weights: int
    gradients: int
    masters: int
    states: int
    received: int = 0
    frozen: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.masters + self.states + self.received + self.frozen


@dataclass(frozen=True)
class FlatBucket:
    """Length of a bucket in elements, padding included, and over which group its gradient is partial."""

    length: int
    sum_over: str


def sent(recipe: Recipe, layout: Layout, place: Place) -> Sent:
    """Bytes the rank at `place` sends in one training step.

    Args:
        recipe: batch, model, precision, recompute.
        layout: the mesh, `recipe.layout(world)`.
        place: which rank.
    """
    precision, parts = recipe.precision, _micro_batches(recipe, layout)
    tokens = recipe.data.micro_batch * recipe.data.seq_len
    reduce, compute = BYTES[precision.reduce], BYTES[precision.compute]
    dp = all_reduce(8, layout.dp)
    sums = {"tp": 0.0, "kv": 0.0, "tie": 0.0}
    sharing = max(1, layout.tp // recipe.model.kv_heads)
    sizes = {"tp": layout.tp, "kv": sharing, "tie": 2}
    for bucket in buckets(recipe, layout, place):
        if layout.zero1:
            dp += one_way(bucket.length * reduce, layout.dp) + one_way(bucket.length * compute, layout.dp)
        else:
            dp += all_reduce(bucket.length * reduce, layout.dp)
        if bucket.sum_over:
            share = bucket.length // (layout.dp if layout.zero1 else 1)
            sums[bucket.sum_over] += all_reduce(share * 4, sizes[bucket.sum_over])
    first, last, layers = _stages(recipe, layout, place)
    inside = parts * _regions(recipe, layout, len(layers), first, last)
    if last:
        inside += parts * all_reduce(3 * 4 * tokens, layout.tp)  # a maximum and two sums a token, fp32
    return Sent(
        world=all_reduce(8, layout.world),
        dp=dp,
        pp=float(_across_borders(recipe, layout, place)),
        tp=inside + sums["tp"],
        kv=sums["kv"],
        tie=sums["tie"],
    )


def kept(recipe: Recipe, layout: Layout, place: Place, slots: int = 2) -> Kept:
    """Bytes the rank at `place` keeps between steps.

    Args:
        recipe, layout, place: as for `sent`.
        slots: tensors of optimizer state for each parameter: 2 for AdamW, 1 for SGD with momentum.
    """
    precision = recipe.precision
    lengths = sum(bucket.length for bucket in buckets(recipe, layout, place))
    share = lengths // (layout.dp if layout.zero1 else 1)
    trained = _trained(recipe)
    frozen = sum(math.prod(p.size) for name, p in parts_of(recipe, layout, place) if name not in trained)
    compute = BYTES[precision.compute]
    own_masters = precision.compute != "fp32" and precision.master == "fp32"
    return Kept(
        weights=(lengths + frozen) * compute,
        gradients=lengths * BYTES[precision.accumulate],
        masters=share * 4 if own_masters else 0,
        states=slots * share * BYTES[precision.states],
        received=_across_borders(recipe, layout, place),  # what is sent over a border one way comes back
        frozen=0 if precision.compute == "fp32" else 4 * frozen,
    )


def all_reduce(size: float, ranks: int) -> float:
    """Bytes each rank sends to sum `size` bytes over a ring."""
    return 2 * one_way(size, ranks)


def one_way(size: float, ranks: int) -> float:
    """Bytes each rank sends in a reduce-scatter or all-gather of a tensor of `size` bytes."""
    return (ranks - 1) * size / ranks


def parts_of(recipe: Recipe, layout: Layout, place: Place) -> Iterator[tuple[str, Part]]:
    """Global name and part of every parameter the rank at `place` holds, in the model's order. A tied
    embedding on the last stage of a pipeline comes under its own name again.
    """
    from hlat.model.init import parameter_shapes

    config = recipe.model
    first, last, layers = _stages(recipe, layout, place)
    for name, shape in parameter_shapes(config).items():
        words = name.split(".")
        here = words[1] in layers if words[0] == "layers" else first if words[0] == "embed" else last
        if here:
            yield name, part_of(name, shape, config, layout, place)
    if config.tie_embeddings and last and not first:
        shape = (config.vocab, config.hidden)
        yield "embed.weight", part_of("embed.weight", shape, config, layout, place, path="head.weight")


def buckets(recipe: Recipe, layout: Layout, place: Place) -> list[FlatBucket]:
    """The flat buckets of the rank at `place`: trained parameters with equal optimizer options, shape class
    and replication, closed where the next one would make it too long.
    """
    close = min(CLOSE, max(CLOSE_OVERLAPPED, layout.dp * CLOSE_A_REPLICA)) if layout.dp > 1 else CLOSE
    trained = _trained(recipe)
    sizes: dict[tuple[object, ...], list[int]] = {}
    for name, part in parts_of(recipe, layout, place):
        if name not in trained:
            continue
        key = (trained[name], len(part.shape) > 1, part.copies, part.primary, part.sum_over)
        elements = math.prod(part.size)
        runs = sizes.setdefault(key, [0])
        if runs[-1] and runs[-1] + elements > close:
            runs.append(0)
        runs[-1] += elements
    step = PAD * (layout.dp if layout.zero1 else 1)
    return [FlatBucket(-(-run // step) * step, str(key[-1])) for key, runs in sizes.items() for run in runs]


def _trained(recipe: Recipe) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of every parameter that is trained, by global name."""
    from hlat.model.init import parameter_shapes

    optim, out = recipe.optim, {}
    for name, shape in parameter_shapes(recipe.model).items():
        if recipe.model.classes and name == "head.weight":
            continue  # the classifier is trained in its place
        if recipe.train_only and not any(fnmatchcase(name, pattern) for pattern in recipe.train_only):
            continue
        rate, decay = optim.lr, optim.weight_decay if optim.decay == "all" or len(shape) > 1 else 0.0
        for group in optim.groups:
            if fnmatchcase(name, group.match):
                rate = rate if group.lr is None else group.lr
                decay = decay if group.weight_decay is None else group.weight_decay
                break
        out[name] = (rate, decay)
    return out


def _stages(recipe: Recipe, layout: Layout, place: Place) -> tuple[bool, bool, set[str]]:
    """Whether a rank holds the embedding, whether the head, and the names of its layers."""
    from hlat.parallel.pipeline import rank_parts

    parts = rank_parts(recipe.model, layout, place, recipe.parallel.cuts)
    layers = {name for part in parts for name in part.layers}
    return any(part.first for part in parts), any(part.last for part in parts), layers


def _micro_batches(recipe: Recipe, layout: Layout) -> int:
    return recipe.data.global_batch // (recipe.data.micro_batch * layout.dp)


def _stream(recipe: Recipe) -> int:
    """Bytes of the whole residual stream of one micro-batch."""
    data = recipe.data
    return data.micro_batch * data.seq_len * recipe.model.hidden * BYTES[recipe.precision.compute]


def _regions(recipe: Recipe, layout: Layout, layers: int, first: bool, last: bool) -> float:
    """Bytes of activations a tensor-parallel rank sends for one micro-batch.

    A block has two regions. Each is entered and left once forward and once backward; of the four, two cost an
    all-reduce of the stream, or under sequence parallelism all four cost half of one. The embedding is a
    region that is left, the head one that is entered. Full recompute runs a block's forward again up to its
    last matrix product: both regions are entered, one is left.
    """
    again = 0.0
    if recipe.parallel.recompute == "full":
        again = layers * (1.5 if layout.sequence else 1.0)
    return (4 * layers + first + last + again) * all_reduce(_stream(recipe), layout.tp)


def _across_borders(recipe: Recipe, layout: Layout, place: Place) -> int:
    """Bytes of stream a rank sends to its pipeline neighbours in a step, and receives from them: onwards from
    every stage but the last, its gradient back from every stage but the first.
    """
    if layout.pp == 1:
        return 0
    borders = 2 * layout.stages - (place.pp == 0) - (place.pp == layout.pp - 1)
    share = _stream(recipe) // (layout.tp if layout.sequence else 1)
    return _micro_batches(recipe, layout) * borders * share
