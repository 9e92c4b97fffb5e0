"""Flat buckets: the common currency of gradients, reducers and optimizers.

Parameters that share an optimizer group and a shape class (matrices, vectors) lie one behind the other in a
bucket. A bucket holds up to three flat tensors of equal length:

    weights   what the model computes with (precision.compute); the model's parameters are views of it
    grad      this step's gradients, summed (precision.accumulate); hooks fill it as backward goes
    master    what the optimizer moves (fp32; the weights themselves with precision.master none)

Length is padded to `PAD`, so that a reduce-scatter over any power-of-two number of ranks up to it divides
evenly; padding is zero and stays zero. Identity in a checkpoint is always parameter name + global slice,
never an offset in here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from hlat.optim.groups import Group

PAD = 1024
MAX_ELEMENTS = 1 << 27  # a bucket is closed here, so that its collective can overlap the rest of backward


@dataclass(frozen=True)
class ParamSpec:
    """One parameter's place: global name and shape, and its run of elements in the bucket."""

    name: str
    shape: torch.Size
    offset: int

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return self.shape.numel()

    def view(self, flat: Tensor) -> Tensor:
        """The parameter's part of a flat bucket tensor, in its own shape."""
        return flat[self.offset : self.offset + self.numel].view(self.shape)


@dataclass
class Bucket:
    """A homogeneous run of parameters; see the module text. Tensors are 1-D of `length` elements."""

    group: Group
    specs: list[ParamSpec]
    weights: Tensor
    grad: Tensor
    master: nn.Parameter
    _fresh: set[str] = field(default_factory=set)

    @property
    def length(self) -> int:
        """Elements, padding included."""
        return self.weights.numel()

    def begin(self) -> None:
        """Start a step: the next gradient of each parameter replaces the old sum."""
        self._fresh = {spec.name for spec in self.specs}

    def accumulate(self, spec: ParamSpec, parameter: Tensor) -> None:
        """Hook: take a parameter's fresh gradient into the flat sum and free it."""
        if parameter.grad is None:
            return
        view = spec.view(self.grad)
        if spec.name in self._fresh:
            self._fresh.discard(spec.name)
            view.copy_(parameter.grad)
        else:
            view.add_(parameter.grad)
        parameter.grad = None

    def finish(self) -> None:
        """End of backward: a parameter that took no part in it has gradient zero."""
        for spec in self.specs:
            if spec.name in self._fresh:
                spec.view(self.grad).zero_()
        self._fresh.clear()

    def named_views(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name and view of each parameter in a flat tensor of this bucket's length."""
        for spec in self.specs:
            yield spec.name, spec.view(flat)


@dataclass(frozen=True)
class BucketDtypes:
    """Storage of the three flat tensors. `master` None means the weights are their own masters."""

    weights: torch.dtype
    grad: torch.dtype
    master: torch.dtype | None


def build_buckets(
    model: nn.Module,
    groups: dict[str, Group],
    initial: Callable[[str, torch.Size], Tensor],
    *,
    dtypes: BucketDtypes,
    device: torch.device,
    max_elements: int = MAX_ELEMENTS,
) -> list[Bucket]:
    """Lay a model's trained parameters into buckets, fill them, and make each parameter a view of its
    bucket's weights.

    Args:
        model: its parameters may be on the meta device; those named in `groups` are replaced.
        groups: optimizer group of each parameter to train, by name. Others are left alone.
        initial: the fp32 value of a parameter, called once for each, one at a time: peak memory is one
            parameter above the buckets.
        dtypes, device: storage.
        max_elements: where a bucket is closed.
    """
    parameters = {name: p for name, p in model.named_parameters() if name in groups}
    buckets = []
    for names in _partition(parameters, groups, max_elements):
        specs, offset = [], 0
        for name in names:
            specs.append(ParamSpec(name, parameters[name].shape, offset))
            offset += parameters[name].numel()
        length = -(-offset // PAD) * PAD
        weights = torch.zeros(length, dtype=dtypes.weights, device=device)
        master = weights if dtypes.master is None else torch.zeros(length, dtype=dtypes.master, device=device)
        for spec in specs:
            spec.view(master).copy_(initial(spec.name, spec.shape))
        grad = torch.zeros(length, dtype=dtypes.grad, device=device)
        bucket = Bucket(groups[names[0]], specs, weights, grad, nn.Parameter(master, requires_grad=False))
        _adopt(model, bucket)
        buckets.append(bucket)
    publish(buckets)
    return buckets


def publish(
    buckets: Iterable[Bucket], rounder: Callable[[Tensor, torch.dtype], Tensor] | None = None
) -> None:
    """Round every master into the weights the model computes with."""
    for bucket in buckets:
        if bucket.master.data_ptr() != bucket.weights.data_ptr():
            new = bucket.master if rounder is None else rounder(bucket.master, bucket.weights.dtype)
            bucket.weights.copy_(new)


def squared_norm(flat: Tensor) -> Tensor:
    """Sum of squares of a 1-D tensor whose length is a multiple of PAD, fp32 ().

    In two levels: rows of PAD elements, then the rows. A single running sum over 1e8 elements would lose
    digits.
    """
    rows = torch.linalg.vector_norm(flat.view(-1, PAD), dim=1, dtype=torch.float32)
    return rows.square().sum()


def _partition(
    parameters: dict[str, nn.Parameter], groups: dict[str, Group], max_elements: int
) -> Iterator[list[str]]:
    """Names of each bucket, in the model's order; equal group and equal shape class go together."""
    open_buckets: dict[tuple[Group, bool], list[str]] = {}
    sizes: dict[tuple[Group, bool], int] = {}
    for name, parameter in parameters.items():
        key = (groups[name], parameter.ndim > 1)
        if key in open_buckets and sizes[key] + parameter.numel() > max_elements:
            yield open_buckets.pop(key)
            sizes.pop(key)
        open_buckets.setdefault(key, []).append(name)
        sizes[key] = sizes.get(key, 0) + parameter.numel()
    yield from open_buckets.values()


def _adopt(model: nn.Module, bucket: Bucket) -> None:
    """Replace the model's parameters by views of the bucket's weights, with the accumulation hook on each."""
    by_name = {spec.name: spec for spec in bucket.specs}
    shared = dict(model.named_parameters(remove_duplicate=False))
    for name, spec in by_name.items():
        old = shared[name]
        new = nn.Parameter(spec.view(bucket.weights))
        for alias, parameter in shared.items():  # a tied head is the same parameter under a second name
            if parameter is old:
                owner, _, leaf = alias.rpartition(".")
                setattr(model.get_submodule(owner), leaf, new)
        new.register_post_accumulate_grad_hook(partial(_hook, bucket, spec))


def _hook(bucket: Bucket, spec: ParamSpec, parameter: Tensor) -> None:
    bucket.accumulate(spec, parameter)
