"""Flat buckets: the common currency of gradients, reducers and optimizers.

Parameters that share an optimizer group, a shape class (matrices, vectors) and a kind of replication lie one
behind the other in a bucket. A bucket holds up to three flat tensors:

    weights   what the model computes with (precision.compute); the model's parameters are views of it
    grad      this step's gradients, summed (precision.accumulate); hooks fill it as backward goes; on the
              meta device, without memory, where the method takes no gradients
    master    what the optimizer moves (fp32; the weights themselves with precision.master none): as long as
              the others, or with ZeRO-1 this replica's share of them, elements [first, last)

On XLA devices a view is not memory but an expression, computed anew in every graph that uses it and
sometimes kept, so that the same step would have several graphs. There a bucket is "apart": parameters and
masters are tensors of their own, `weights` has no memory (it is on the meta device, for its length and
dtype), and `publish` copies the rounded masters into the parameters.

Length is padded so that it divides evenly over the replicas and each share into runs of `PAD`; padding is
zero and stays zero. Identity in a checkpoint is always parameter name + global slice, never an offset here.
Matrices that an optimizer must see whole (`Group.matrix`) are laid so that no share cuts one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from hlat.optim.groups import Group
from hlat.parallel.plan import Part

PAD = 1024
MAX_ELEMENTS = 1 << 27  # a bucket is closed here
SUM_AT_ONCE = 1 << 22  # elements whose fp32 sum and random bits are in memory at a time


@dataclass(frozen=True)
class ParamSpec:
    """One parameter's place.

    name: global name, by which checkpoints know it.
    part: which rectangle of the whole parameter this rank holds.
    offset: first element in the bucket; the rectangle lies there row by row.
    path: its name inside this rank's model, which differs for a tied embedding on the last pipeline stage.
    """

    name: str
    part: Part
    offset: int
    path: str

    @property
    def shape(self) -> torch.Size:
        """Shape of this rank's part."""
        return torch.Size(self.part.size)

    @property
    def numel(self) -> int:
        """Elements of this rank's part."""
        return self.shape.numel()

    def view(self, flat: Tensor) -> Tensor:
        """The parameter's elements in a flat bucket tensor, in their own shape."""
        return flat[self.offset : self.offset + self.numel].view(self.shape)


@dataclass
class Bucket:
    """A homogeneous run of parameters; see the module text.

    weights, grad: 1-D, `length` elements. master: 1-D, elements [first, last) of the bucket.
    primary, sum_over: as in `Part`, the same for all parameters of the bucket.
    parameters: those of the specs, where they are not views of the weights.
    own_master: whether the weights are their own masters: the two share memory.
    on_ready: told once a step, when the last gradient of the step has arrived, often while backward goes on.
    round_sum: rounds a 1-D fp32 sum of gradients into the dtype of `grad`, given its first element's place in
        the bucket and how many gradients of the step are still to come; None: to nearest.
    """

    group: Group
    specs: list[ParamSpec]
    weights: Tensor
    grad: Tensor
    master: nn.Parameter
    first: int = 0
    on_ready: Callable[[Bucket], None] | None = None
    parameters: list[nn.Parameter] = field(default_factory=list)
    own_master: bool = False
    round_sum: Callable[[Tensor, int, int], Tensor] | None = None
    _fresh: set[str] = field(default_factory=set)
    _awaited: int = 0

    @property
    def length(self) -> int:
        """Elements, padding included."""
        return self.weights.numel()

    @property
    def last(self) -> int:
        """End of this replica's share."""
        return self.first + self.master.numel()

    @property
    def apart(self) -> bool:
        """Whether the parameters are tensors of their own."""
        return self.weights.device.type == "meta"

    @property
    def copies(self) -> int:
        """Ranks of a replica that hold these same elements."""
        return self.specs[0].part.copies

    @property
    def primary(self) -> bool:
        """Whether this rank's copy is the one that counts in norms and goes to checkpoints."""
        return self.specs[0].part.primary

    @property
    def sum_over(self) -> str:
        """Group over which the copies' gradients are partial sums; "" for none."""
        return self.specs[0].part.sum_over

    def begin(self, micro_batches: int = 1) -> None:
        """Start a step of so many backward passes: the next gradient of each parameter replaces the old
        sum.
        """
        self._fresh = {spec.path for spec in self.specs}
        self._awaited = micro_batches * len(self.specs)

    def accumulate(self, spec: ParamSpec, parameter: Tensor) -> None:
        """Hook: take a parameter's fresh gradient into the flat sum and free it."""
        if parameter.grad is None:
            return
        view = spec.view(self.grad)
        if spec.path in self._fresh:
            self._fresh.discard(spec.path)
            view.copy_(parameter.grad)
        elif self.round_sum is None:
            view.add_(parameter.grad)
        else:
            self._add(spec, parameter.grad)
        parameter.grad = None
        self._awaited -= 1
        if self._awaited == 0 and self.on_ready is not None:
            self.on_ready(self)

    def _add(self, spec: ParamSpec, gradient: Tensor) -> None:
        """Add a gradient in fp32 and round the sum by `round_sum`, a stretch at a time to save memory."""
        assert self.round_sum is not None
        own, new = spec.view(self.grad).view(-1), gradient.detach().reshape(-1)
        size = own.numel() if own.device.type == "xla" else SUM_AT_ONCE
        for start in range(0, own.numel(), size):
            part = own[start : start + size]
            total = part.float() + new[start : start + size].float()
            part.copy_(self.round_sum(total, spec.offset + start, self._awaited))

    def finish(self) -> None:
        """End of the last backward: a parameter that took no part in any has gradient zero."""
        for spec in self.specs:
            if spec.path in self._fresh:
                spec.view(self.grad).zero_()
        self._fresh.clear()

    def computed_with(self) -> list[Tensor]:
        """What the model computes with, of each parameter, in the order of the specs."""
        return [*self.parameters] or [spec.view(self.weights) for spec in self.specs]

    def hand_out(self, flat: Tensor) -> None:
        """Copy the weights, all of the bucket, into parameters that are apart."""
        with torch.no_grad():
            for spec, parameter in zip(self.specs, self.parameters, strict=True):
                parameter.copy_(spec.view(flat))

    def runs(self) -> Iterator[tuple[ParamSpec, slice, int]]:
        """The parameters in this replica's share: each one's spec, where in `master` (and in the optimizer's
        state) its elements are, and how many elements of the parameter come before them.
        """
        for spec in self.specs:
            start, stop = max(spec.offset, self.first), min(spec.offset + spec.numel, self.last)
            if start < stop:
                yield spec, slice(start - self.first, stop - self.first), start - spec.offset


@dataclass(frozen=True)
class BucketDtypes:
    """Storage of the three flat tensors. `master` None means the weights are their own masters, `grad` None
    that there are no gradients.
    """

    weights: torch.dtype
    grad: torch.dtype | None
    master: torch.dtype | None


@dataclass(frozen=True)
class Share:
    """Which of `count` equal shares of every bucket this rank's optimizer keeps; one share without ZeRO-1."""

    index: int = 0
    count: int = 1


def build_buckets(
    model: nn.Module,
    parameters: dict[str, tuple[str, Part, Group]],
    initial: Callable[[str, Part], Tensor],
    *,
    dtypes: BucketDtypes,
    device: torch.device,
    share: Share = Share(),
    max_elements: int = MAX_ELEMENTS,
) -> list[Bucket]:
    """Lay a model's trained parameters into buckets, fill them, and make each parameter a view of its
    bucket's weights.

    Args:
        model: its parameters may be on the meta device and whole; those in `parameters` are replaced by this
            rank's parts. Others are left alone.
        parameters: path in the model -> global name, part, optimizer group.
        initial: the fp32 value of a part, called once for each, one at a time: peak memory is one whole
            parameter above the buckets.
        dtypes, device: storage.
        share: this rank's share of masters and optimizer state.
        max_elements: where a bucket is closed.
    """
    buckets = []
    for paths in _partition(parameters, max_elements):
        group = parameters[paths[0]][2]
        sizes = [torch.Size(parameters[path][1].size).numel() for path in paths]
        offsets, length = _place(sizes, share.count, group.matrix)
        specs = [
            ParamSpec(parameters[path][0], parameters[path][1], offset, path)
            for path, offset in zip(paths, offsets, strict=True)
        ]
        apart = device.type == "xla"
        weights = torch.zeros(length, dtype=dtypes.weights, device="meta" if apart else device)
        first, size = share.index * length // share.count, length // share.count
        master = weights[first : first + size]
        if apart or dtypes.master is not None:
            # Filled on the CPU: piece by piece on an XLA device it would be one large graph.
            where = torch.device("cpu") if apart else device
            master = torch.zeros(size, dtype=dtypes.master or dtypes.weights, device=where)
        grad = torch.zeros(length, dtype=dtypes.grad, device=device if dtypes.grad else "meta")
        bucket = Bucket(group, specs, weights, grad, nn.Parameter(master, requires_grad=False), first)
        bucket.own_master = dtypes.master is None and not apart
        _fill(bucket, initial)
        if apart:
            bucket.master = nn.Parameter(bucket.master.data.to(device), requires_grad=False)
            bucket.parameters = [
                nn.Parameter(torch.zeros(spec.shape, dtype=dtypes.weights, device=device)) for spec in specs
            ]
        _adopt(model, bucket)
        buckets.append(bucket)
    return buckets


def _place(sizes: Sequence[int], shares: int, whole: bool) -> tuple[list[int], int]:
    """Where each parameter of a bucket begins, and the bucket's length.

    One behind the other, cut wherever a share ends; or, with `whole`, each on one share: the largest first,
    always to the emptiest share, and all shares as long as the fullest.
    """
    if not whole or shares == 1:
        ends = list(accumulate(sizes))
        step = PAD * shares
        return [end - size for end, size in zip(ends, sizes, strict=True)], -(-ends[-1] // step) * step
    filled, places = [0] * shares, {}
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        share = filled.index(min(filled))
        places[index] = share, filled[share]
        filled[share] += sizes[index]
    length = -(-max(filled) // PAD) * PAD
    return [places[i][0] * length + places[i][1] for i in range(len(sizes))], length * shares


def _fill(bucket: Bucket, initial: Callable[[str, Part], Tensor]) -> None:
    """Initial values: the weights rounded from them, the masters exactly. Parameters that are apart get
    theirs when the masters are published.
    """
    share = {spec.path: (where, skip) for spec, where, skip in bucket.runs()}
    for spec in bucket.specs:
        value = initial(spec.name, spec.part).to(bucket.master.device)
        if not bucket.apart:
            spec.view(bucket.weights).copy_(value)
        if not bucket.own_master and spec.path in share:
            where, skip = share[spec.path]
            run = value.reshape(-1)[skip : skip + where.stop - where.start]
            bucket.master.data[where].copy_(run)


def round_masters(
    buckets: Iterable[Bucket], rounder: Callable[[Bucket, torch.dtype], Tensor] | None = None
) -> None:
    """Round every master into the weights the model computes with; only this replica's share of them."""
    for bucket in buckets:
        if not (bucket.own_master or bucket.apart):
            own = bucket.weights[bucket.first : bucket.last]
            new = bucket.master if rounder is None else rounder(bucket, bucket.weights.dtype)
            own.copy_(new)


def squared_norm(flat: Tensor) -> Tensor:
    """Sum of squares of a tensor, 1-D with a length that is a multiple of PAD, or with more dimensions; fp32.

    In two levels: rows (of PAD elements where there are none), then the rows. A single running sum over 1e8
    elements would lose digits.
    """
    table = (
        flat.view(-1, PAD) if flat.dim() == 1 and flat.numel() % PAD == 0 else flat.view(flat.shape[0], -1)
    )
    rows = torch.linalg.vector_norm(table, dim=1, dtype=torch.float32)
    return rows.square().sum()


def _partition(parameters: dict[str, tuple[str, Part, Group]], max_elements: int) -> Iterator[list[str]]:
    """Paths of each bucket, in the model's order; what differs in group, shape class or replication is kept
    apart, and so is an embedding that two pipeline stages share: its buckets must be alike on both.
    """
    open_buckets: dict[tuple[object, ...], list[str]] = {}
    sizes: dict[tuple[object, ...], int] = {}
    for path, (_, part, group) in parameters.items():
        elements = torch.Size(part.size).numel()
        key = (group, len(part.shape) > 1, part.copies, part.primary, part.sum_over)
        if key in open_buckets and sizes[key] + elements > max_elements:
            yield open_buckets.pop(key)
            sizes.pop(key)
        open_buckets.setdefault(key, []).append(path)
        sizes[key] = sizes.get(key, 0) + elements
    yield from open_buckets.values()


def _adopt(model: nn.Module, bucket: Bucket) -> None:
    """Replace the model's parameters by views of the bucket's weights, with the accumulation hook on each
    where there are gradients.
    """
    shared = dict(model.named_parameters(remove_duplicate=False))
    for i, spec in enumerate(bucket.specs):
        old = shared[spec.path]
        new = bucket.parameters[i] if bucket.apart else nn.Parameter(spec.view(bucket.weights))
        for alias, parameter in shared.items():  # a tied head is the same parameter under a second name
            if parameter is old:
                set_parameter(model, alias, new)
        if bucket.grad.device.type == "meta":
            new.requires_grad_(False)
        else:
            new.register_post_accumulate_grad_hook(partial(_hook, bucket, spec))


def set_parameter(model: nn.Module, path: str, parameter: nn.Parameter) -> None:
    """Put a parameter, perhaps a part of the old one, in its place in a model."""
    owner, _, leaf = path.rpartition(".")
    module = model.get_submodule(owner)
    setattr(module, leaf, parameter)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = parameter.shape


def _hook(bucket: Bucket, spec: ParamSpec, parameter: Tensor) -> None:
    bucket.accumulate(spec, parameter)
