"""The zeroth-order methods of a recipe: `MeZO` and `MeZOSVRG` on the masters of a run.

Every rank computes the same directions, each for what it holds. Losses are the only thing that ranks
exchange, a few numbers a step; weights of replicas stay bitwise equal by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field as Range
from torch import Tensor, nn

from hlat.errors import UserError
from hlat.method.field import Piece
from hlat.method.mezo import MeZO
from hlat.method.mezo_svrg import Compat, MeZOSVRG, Snapshot
from hlat.method.noise import Grid, Kind
from hlat.method.zeroth_order import Closure, Restore, ZerothOrder
from hlat.registry import register
from hlat.section import near_multiple

if TYPE_CHECKING:
    from hlat.data.batch import Batch
    from hlat.parallel.buckets import Bucket
    from hlat.recipe import Recipe
    from hlat.train.run import Run

Rate = Annotated[float, Range(gt=0)]
Count = Annotated[int, Range(ge=1)]


class ForwardOnly:
    """What the zeroth-order methods of a recipe share.

    A run builds no gradients for them, and takes from `make_optimizer` what moves the masters.
    """

    needs_backward = False
    name = ""
    mu: float
    noise: Kind
    restore: Restore
    optimizer: ZerothOrder

    @staticmethod
    def check(recipe: Recipe) -> None:
        """Raise UserError for what cannot be done, or would be ignored, without gradients."""
        name, section, precision = recipe.method.name, recipe.parallel, recipe.precision
        what, where, fix = "", "", ""
        if section.zero1:
            what = f"method {name!r} has neither gradients nor moments that ZeRO-1 could divide"
            where, fix = "parallel.zero1", "write parallel.zero1=false"
        elif section.recompute != "none":
            what = f"method {name!r} has no backward pass to recompute for"
            where, fix = "parallel.recompute", "write parallel.recompute=none"
        elif recipe.reduce.name != "dense":
            what = f"method {name!r} sends losses, no gradients for reducer {recipe.reduce.name!r}"
            where, fix = "reduce.name", "leave the reduce section out"
        elif precision.master == "none" and precision.compute == "bf16":
            what = f"method {name!r} moves weights by less than bf16 can hold"
            where, fix = "precision.master", "write precision.master=fp32, or precision.compute=fp32"
        if what:
            raise UserError(what, where=where, fix=fix)

    def make_optimizer(self, recipe: Recipe, buckets: Sequence[Bucket], device: torch.device) -> ZerothOrder:
        """What moves the masters of the buckets; one for the life of a run."""
        groups = [{"params": [bucket.master], "pieces": _pieces(bucket)} for bucket in buckets]
        # Nothing of what a pipeline rank holds may be trained, and torch's optimizers want a parameter.
        nothing = [{"params": [nn.Parameter(torch.zeros(0, device=device))], "pieces": []}]
        options = {"mu": self.mu, "seed": recipe.run.seed, "noise": self.noise, "restore": self.restore}
        self.optimizer = self._make(groups or nothing, options)
        return self.optimizer

    def step(self, run: Run, batches: list[Batch], tokens: Tensor) -> dict[str, Tensor]:
        """One update from the losses of a global batch, or of the anchor's examples.

        Args, and the returned `loss`, `grad_norm` and `skipped`: as in `hlat.method.backprop`, with the loss
        as the mean of those around the parameters, and as norm the slope along a random direction, whose
        mean square is the gradient's.
        """
        optimizer = self.optimizer
        optimizer.agree, optimizer.guard = _agreement(run), run.guard
        optimizer.count = run.step
        # As data with a dimension: torch-xla makes a constant of a lone 0 or 1, and with it another graph.
        factor = torch.tensor([run.schedule(run.step)], dtype=optimizer.scale.dtype)
        optimizer.scale.copy_(factor.to(optimizer.scale.device)[0])
        self._move(run, lambda: run.engine.forward(batches, tokens))
        report = optimizer.report
        run.updates.add_(report["keep"])
        run.publish()
        own = {"lr": report["rate"]} if "rate" in report else {}
        return {
            "loss": report["loss"].float(),
            "grad_norm": report["norm"].float(),
            "skipped": ~report["keep"],
            **own,
            **run.metrics(),
        }

    def state(self) -> dict[str, Tensor]:
        """Tensors that belong in a checkpoint, beside the copy of the anchor."""
        return self.optimizer.own

    def queries(self, recipe: Recipe, steps: int) -> int:
        """Examples that went forward through the model in the first `steps` steps, on all ranks."""
        raise NotImplementedError

    def work(self, recipe: Recipe) -> float:
        """FLOPs of a step over those of a forward and backward pass (three forwards) of the global batch, in
        the mean of the run.
        """
        steps = recipe.run.steps
        return self.queries(recipe, steps) / (3 * recipe.data.global_batch * steps)

    def peak_rate(self, step: int) -> float:
        """Learning rate of the step after `step` steps, before the schedule."""
        raise NotImplementedError

    def describe(self) -> str:
        """The method in a line."""
        raise NotImplementedError

    def _make(self, groups: Iterable[Any], options: dict[str, Any]) -> ZerothOrder:
        raise NotImplementedError

    def _move(self, run: Run, closure: Closure) -> None:
        self.optimizer.step(closure)


@register("method", "mezo")
class MeZOMethod(ForwardOnly):
    """Two forward passes of the batch a step and no backward pass. See docs/methods/mezo_svrg.md.

    Args:
        lr: peak learning rate; the schedule multiplies it.
        mu: how far from the parameters losses are taken.
        noise: distribution of the directions.
        restore: how the parameters come back; see `hlat.method.zeroth_order.ZerothOrder`.
    """

    def __init__(
        self, *, lr: Rate = 1e-6, mu: Rate = 1e-3, noise: Kind = "normal", restore: Restore = "auto"
    ) -> None:
        self.lr, self.mu, self.noise, self.restore = lr, mu, noise, restore

    def queries(self, recipe: Recipe, steps: int) -> int:
        """Two forward passes of the global batch a step."""
        return 2 * recipe.data.global_batch * steps

    def peak_rate(self, step: int) -> float:
        """`lr`."""
        return self.lr

    def describe(self) -> str:
        """The method in a line."""
        return f"two forward passes a step, lr {self.lr:g}, mu {self.mu:g}, {self.noise} noise"

    def _make(self, groups: Iterable[Any], options: dict[str, Any]) -> ZerothOrder:
        return MeZO(groups, self.lr, **options)


class _WithAnchor:
    """Examples that are always the same: the first rows of the training data."""

    anchor_examples: int
    anchor_batch: int | None
    _tokens: Tensor | None = None

    @staticmethod
    def check(recipe: Recipe) -> None:
        """Raise UserError where the anchor's examples are not whole batches, or for what `ForwardOnly`
        refuses.
        """
        ForwardOnly.check(recipe)
        data, options = recipe.data, recipe.method.options
        examples, rows = options["anchor_examples"], options["anchor_batch"]
        if examples % data.global_batch:
            raise UserError(
                f"anchor_examples {examples} is not a multiple of data.global_batch {data.global_batch}",
                where="method.anchor_examples",
                fix=f"take {near_multiple(examples, data.global_batch)}",
            )
        if rows is not None and rows % data.micro_batch:
            raise UserError(
                f"anchor_batch {rows} is not a multiple of data.micro_batch {data.micro_batch}",
                where="method.anchor_batch",
                fix=f"take {near_multiple(rows, data.micro_batch)}, or leave it out",
            )

    def _anchor_loss(self, run: Run) -> Tensor:
        """This rank's part of the mean loss over the anchor's examples, fp32 ()."""
        if self._tokens is None:
            own = torch.stack([batch.targets_count() for batch in self._batches(run)]).sum()
            self._tokens = run.backend.groups.dp.all_reduce(own).clamp(min=1)
        total = torch.zeros((), device=run.backend.device)
        for batch in self._batches(run):
            total = total + run.engine.forward([batch], self._tokens)
            run.backend.mark_step("anchor")  # each batch a graph, the same one
        return total

    def _batches(self, run: Run) -> Iterator[Batch]:
        """This rank's examples of the anchor, `anchor_batch` at a time, fewer in the last batch."""
        recipe, backend = run.recipe, run.backend
        size, rows = recipe.data.micro_batch, recipe.accumulate(backend.world)
        together = (self.anchor_batch or size) // size
        waiting: list[Batch] = []
        for number in range(self.anchor_examples // recipe.data.global_batch):
            for batch in run.data.batches(number, size, rows, backend.place.dp, backend.layout.dp):
                waiting.append(batch)
                if len(waiting) == together:
                    yield _joined(waiting).to(backend.device)
                    waiting = []
        if waiting:
            yield _joined(waiting).to(backend.device)


@register("method", "mezo_svrg")
class MeZOSVRGMethod(_WithAnchor, ForwardOnly):
    """MeZO with the noise of the mini-batch taken out, by an anchor on many examples. See
    docs/methods/mezo_svrg.md.

    Args:
        lr_anchor, lr_inner: peak learning rates of anchor and inner steps; the schedule multiplies them.
        anchor_every: an anchor step every so many steps.
        anchor_examples: examples of an anchor step, the first of the training data; a multiple of the batch.
        anchor_batch: those of one forward pass on one rank; default: data.micro_batch. What fits memory: a
            forward pass alone needs less of it.
        mu, noise, restore: as for `mezo`.
        shared_z, snapshot, compat, anneal, anneal_every: see `hlat.method.MeZOSVRG`.
    """

    def __init__(
        self,
        *,
        lr_anchor: Rate = 1e-4,
        lr_inner: Rate = 1e-6,
        anchor_every: Annotated[int, Range(ge=2)] = 2,
        anchor_examples: Count = 512,
        anchor_batch: Count | None = None,
        mu: Rate = 1e-3,
        shared_z: bool = True,
        snapshot: Snapshot = "copy",
        compat: Compat = "none",
        noise: Kind = "normal",
        restore: Restore = "auto",
        anneal: Annotated[float, Range(ge=1)] = 1.0,
        anneal_every: Count = 8,
    ) -> None:
        self.lr_anchor, self.lr_inner, self.anchor_every = lr_anchor, lr_inner, anchor_every
        self.anchor_examples, self.anchor_batch = anchor_examples, anchor_batch
        self.mu, self.shared_z = mu, shared_z
        self.snapshot, self.compat, self.noise, self.restore = snapshot, compat, noise, restore
        self.anneal, self.anneal_every = anneal, anneal_every
        self._rounds = 0  # of an anchor and its inner steps, since this process started

    @staticmethod
    def idle(options: Mapping[str, Any]) -> dict[str, str]:
        """Options that these others leave nothing to do, and why."""
        return {"anneal_every": "anneal 1 divides no rate"} if options.get("anneal") == 1 else {}

    def queries(self, recipe: Recipe, steps: int) -> int:
        """Two passes of the anchor's examples, or four of the global batch."""
        anchors = -(-steps // self.anchor_every)
        return 2 * self.anchor_examples * anchors + 4 * recipe.data.global_batch * (steps - anchors)

    def peak_rate(self, step: int) -> float:
        """`lr_anchor` or `lr_inner`."""
        return self.lr_inner if step % self.anchor_every else self.lr_anchor

    def describe(self) -> str:
        """The method in a line."""
        kind = "as the authors' code" if self.compat == "authors" else f"anchor kept as {self.snapshot}"
        return (
            f"anchor of {self.anchor_examples} rows every {self.anchor_every} steps (lr {self.lr_anchor:g}), "
            f"inner steps lr {self.lr_inner:g}, mu {self.mu:g}, {self.noise} noise, {kind}"
        )

    def _make(self, groups: Iterable[Any], options: dict[str, Any]) -> ZerothOrder:
        return MeZOSVRG(
            groups,
            self.lr_anchor,
            self.lr_inner,
            anchor_every=self.anchor_every,
            shared_z=self.shared_z,
            snapshot=self.snapshot,
            compat=self.compat,
            anneal=self.anneal,
            anneal_every=self.anneal_every,
            **options,
        )

    def _move(self, run: Run, closure: Closure) -> None:
        if self._rounds < 2:  # the first anchor and the steps after it start from fresh tensors
            for phase in ("step", "anchor"):
                run.backend.expect_graphs("the first two rounds of anchor and inner steps", phase)
        self._rounds += (run.step + 1) % self.anchor_every == 0
        self.optimizer.step(closure, lambda: self._anchor_loss(run))


@register("method", "full_batch_zo")
class FullBatchMethod(_WithAnchor, MeZOMethod):
    """MeZO on the same `anchor_examples` every step: no noise of mini-batches, a control.

    Args:
        lr, mu, noise, restore: as for `mezo`.
        anchor_examples, anchor_batch: the examples of every step, as in `mezo_svrg`.
    """

    same_rows = True  # in every step

    def __init__(
        self,
        *,
        lr: Rate = 1e-4,
        mu: Rate = 1e-3,
        anchor_examples: Count = 512,
        anchor_batch: Count | None = None,
        noise: Kind = "normal",
        restore: Restore = "auto",
    ) -> None:
        super().__init__(lr=lr, mu=mu, noise=noise, restore=restore)
        self.anchor_examples, self.anchor_batch = anchor_examples, anchor_batch

    def queries(self, recipe: Recipe, steps: int) -> int:
        """Two forward passes of the anchor's examples a step."""
        return 2 * self.anchor_examples * steps

    def describe(self) -> str:
        """The method in a line."""
        return f"{super().describe()}, always on the first {self.anchor_examples} rows"

    def _move(self, run: Run, closure: Closure) -> None:
        self.optimizer.step(lambda: self._anchor_loss(run))


def _pieces(bucket: Bucket) -> list[Piece]:
    """The parameters of a bucket; the masters are moved, and the model computes with the weights."""
    live = [None] * len(bucket.specs) if bucket.own_master else bucket.computed_with()
    return [
        Piece(
            spec.name,
            Grid(spec.part.shape, spec.part.offset, spec.part.size),
            bucket.master,
            spec.view,
            None if weights is None else weights.detach(),
        )
        for spec, weights in zip(bucket.specs, live, strict=True)
    ]


def _joined(batches: Sequence[Batch]) -> Batch:
    """Micro-batches as one."""
    parts = {part.name: [getattr(batch, part.name) for batch in batches] for part in fields(batches[0])}
    return replace(batches[0], **{k: torch.cat(v) for k, v in parts.items() if v[0] is not None})


def _agreement(run: Run) -> Callable[[Tensor], Tensor]:
    """Losses of this rank's rows -> those of the global batch, by one exchange between all ranks."""
    counts = float(run.backend.place.tp == 0)  # tensor-parallel ranks all have the same; others have 0

    def agree(losses: Tensor) -> Tensor:
        return run.backend.all_reduce(losses * counts)

    return agree
