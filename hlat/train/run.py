"""A run: the parts that a recipe chose, put together."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hlat.backend.base import Backend
from hlat.backend.native import NativeBackend
from hlat.checkpoint.provenance import Provenance
from hlat.data.skips import Skips
from hlat.data.train_tokenizer import trained_vocab
from hlat.errors import UserError
from hlat.model.init import parameter_shapes
from hlat.optim.base import guarded_step
from hlat.optim.groups import Group, Override, assign_groups, examples
from hlat.optim.schedule import Schedule
from hlat.parallel.buckets import Bucket, squared_norm
from hlat.parallel.pipeline import rank_parts
from hlat.parallel.plan import role_of
from hlat.recipe import Recipe
from hlat.reduce.base import Reducer
from hlat.registry import lookup
from hlat.train.assembly import Assembly
from hlat.train.engine import Engine, compile_parts
from hlat.train.nxd import NxdAssembly
from hlat.train.nxd_pipeline import NxdPipelineEngine
from hlat.train.origin import record_of
from hlat.train.pipeline_engine import PipelineEngine
from hlat.train.tasks import refuse_tasks
from hlat.train.update import check_optimizer, needs_backward, schedule_of
from hlat.train.weights import Initial, initial_values

if TYPE_CHECKING:
    from hlat.data.batch import Batch
    from hlat.train.frozen import Frozen

_ASSEMBLIES = {"native": Assembly, "nxd": NxdAssembly}


@dataclass
class Run:
    """Everything one training step touches, as one rank sees it.

    `model` holds this rank's layers and parts of their parameters. `frozen` are the parameters that are not
    trained: global name -> what this rank holds. `step` counts global batches taken, `updates` (int64, ())
    those not skipped. `assembly` made the parts, and makes weights of masters. `skips`: which data is
    left out. `provenance`: what the run and the weights it began from know and held out. `tasks_due`: the
    tasks of `eval.tasks` belong to this step and are still to be run. `content`: what the recipe's paths and
    names stand for (`hlat.train.fingerprint`), on the first rank.
    """

    recipe: Recipe
    backend: Backend
    model: nn.Module
    data: Any
    buckets: list[Bucket]
    engine: Engine | PipelineEngine | NxdPipelineEngine
    objective: Any
    reducer: Reducer
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    guard: Any
    method: Any
    updates: Tensor
    frozen: dict[str, Frozen]
    assembly: Assembly
    skips: Skips
    provenance: Provenance = field(default_factory=Provenance)
    step: int = 0
    tasks_due: bool = False
    content: Mapping[str, str] = field(default_factory=dict)

    def next_batches(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch, on the device; alike on all ranks of a
        replica.
        """
        data, backend = self.recipe.data, self.backend
        rows = self.recipe.accumulate(backend.world)
        number = self.skips.position(self.step + 1) - 1
        batches = self.data.batches(number, data.micro_batch, rows, backend.place.dp, backend.layout.dp)
        return [batch.to(backend.device) for batch in batches]

    def count_targets(self, batches: Sequence[Batch]) -> Tensor:
        """Targets in the global batch, int64 (); at least 1."""
        own = torch.stack([batch.targets_count() for batch in batches]).sum()
        return self.backend.groups.dp.all_reduce(own).clamp(min=1)

    def learning_rate(self, step: int | None = None) -> float:
        """Peak times schedule for the update after `step` updates (default: the next one)."""
        step = self.step if step is None else step
        peak = self.method.peak_rate(step) if hasattr(self.method, "peak_rate") else self.recipe.optim.lr
        return float(peak * self.schedule(step))

    def set_learning_rate(self) -> None:
        """Write the next update's rate into each group, as a tensor: a changed number never reaches a
        compiled graph. The reducer is told the step and how much the rate changed.
        """
        factor = self.schedule(self.step)
        for group in self.optimizer.param_groups:
            if "peak_lr" in group:
                group["lr"].fill_(group["peak_lr"] * factor)
        before = self.schedule(self.step - 1) if self.step else 0.0
        reason = self.reducer.begin(self.step, factor / before if before else 1.0)
        if reason:
            self.backend.expect_graphs(reason)

    def reduce(self) -> list[Tensor]:
        """The gradient of the global batch: this rank's share of each bucket, 1-D.

        The reducer sums over the replicas. What the ranks of one replica hold in common and each saw a part
        of (norms under sequence parallelism, shared key/value heads, an embedding tied across stages) is
        summed after that, in fp32.
        """
        shards = self.reducer.reduce(self.buckets)
        waiting = []
        for i, bucket in enumerate(self.buckets):
            if bucket.sum_over:
                shards[i] = shards[i].float()
                waiting.append(self.backend.groups.named(bucket.sum_over).start_all_reduce(shards[i]))
        for pending in waiting:
            pending.wait()
        return shards

    def agree(self, loss: Tensor, shards: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of the global batch, gradient norm, and the factor that brings the norm down to
        `optim.clip_norm`; fp32 (), the same on every rank.

        One exchange of two numbers: what several ranks hold alike is counted by one of them. A value that is
        not finite anywhere makes the sum so everywhere, and every rank skips the update.
        """
        layout, place = self.backend.layout, self.backend.place
        counts = layout.zero1 or place.dp == 0
        # What another rank counts enters times 0, which is 0 unless it is not finite.
        squares = [
            squared_norm(shard) * float(bucket.primary and counts)
            for bucket, shard in zip(self.buckets, shards, strict=True)
        ]
        unsent = self.reducer.health()  # what was not sent may be bad too
        squares += [] if unsent is None else [unsent]
        zero = torch.zeros((), device=self.backend.device)  # a pipeline rank may train nothing
        parts = [loss * float(place.tp == 0), torch.stack([zero, *squares]).sum()]
        loss, square = self.backend.all_reduce(torch.stack(parts)).unbind(0)
        norm = square.sqrt()
        if self.recipe.optim.clip_norm is None:
            return loss, norm, torch.ones_like(norm)
        return loss, norm, (self.recipe.optim.clip_norm / (norm + 1e-6)).clamp(max=1.0)

    def update(self, shards: Sequence[Tensor], keep: Tensor, clip: Tensor) -> None:
        """Step the optimizer on the master shards (nothing moves when `keep` is False) and publish the
        weights.
        """
        for bucket, shard in zip(self.buckets, shards, strict=True):
            bucket.master.grad = shard.to(bucket.master.dtype)
        guarded_step(self.optimizer, keep, clip)
        self.updates.add_(keep)
        self.reducer.commit(keep)
        for bucket in self.buckets:
            bucket.master.grad = None
        self.publish()

    def metrics(self) -> dict[str, Tensor]:
        """What guard, optimizer and reducer say of themselves; device scalars."""
        own: dict[str, Tensor] = getattr(self.optimizer, "metrics", dict)()
        named = {f"optim/{name}": value for name, value in own.items()}
        return {**self.guard.metrics(), **named, **self.reducer.metrics()}

    def publish(self) -> None:
        """Round the masters into the weights the model computes with, and fetch the other replicas' shares of
        them.
        """
        self.assembly.publish(self)

    def initialise(self) -> None:
        """Create the state of an optimizer that can; others make it in their first step."""
        if hasattr(self.optimizer, "init_state"):
            self.optimizer.init_state()
        self.publish()
        # Its own graph on lazy devices: the first step's is then like every other's.
        self.backend.mark_step("build")


def build_run(
    recipe: Recipe,
    data: Any,
    backend: Backend | None = None,
    *,
    compiled: bool = False,
    initial: Initial | None = None,
    origin: Provenance | None = None,
) -> Run:
    """Put the parts together; weights are initialised from the recipe's seed, or are those of `initial`,
    whose record is `origin`.

    Raises:
        UserError: a part of the recipe that cannot run here, with the reason.
    """
    refuse_unsupported(recipe)
    backend = backend or NativeBackend()
    layout = recipe.layout(backend.world)
    if layout != backend.layout:
        raise ValueError(f"the recipe says {layout}, the backend was made for {backend.layout}")
    assembly = _ASSEMBLIES[backend.name](recipe, backend, initial or initial_values(recipe))
    parts = rank_parts(recipe.model, layout, backend.place, recipe.parallel.cuts)
    model, buckets, frozen = assembly.model(parts, trained_groups(recipe))
    objective = lookup("objective", recipe.objective.name)(**recipe.objective.options)
    method = lookup("method", recipe.method.name)(**recipe.method.options)
    optimizer = assembly.optimizer(buckets, method)
    if compiled:
        compile_parts(model, objective, optimizer)
    reducer = assembly.reducer()
    reducer.prepare(buckets if needs_backward(recipe) else [])
    updates = torch.zeros((), dtype=torch.int64, device=backend.device)
    assembly.round_sums(buckets, updates)
    for bucket in buckets:
        bucket.on_ready = reducer.start
    run = Run(
        recipe=recipe,
        backend=backend,
        model=model,
        data=data,
        buckets=buckets,
        engine=assembly.engine(model, parts, objective, buckets, getattr(data, "rows_per_example", 1)),
        objective=objective,
        reducer=reducer,
        optimizer=optimizer,
        schedule=schedule_of(recipe),
        guard=lookup("guard", recipe.guard.name)(**recipe.guard.options).to(backend.device),
        method=method,
        updates=updates,
        frozen=frozen,
        assembly=assembly,
        skips=Skips(recipe.data.skip),
        provenance=record_of(recipe, data, origin),
    )
    run.initialise()
    return run


def refuse_unsupported(recipe: Recipe, *, here: bool = True) -> None:
    """Raise UserError for what cannot be done, rather than ignore it.

    Args:
        here: whether it is to run in this process; else Neuron packages are not asked for: they may be
            missing (a login node), or are for the processes that this one starts.
    """
    backend = _ASSEMBLIES[recipe.backend]
    backend.check(recipe)
    if here:
        backend.check_here()
    trained_vocab(recipe.data.tokenizer)
    trained_groups(recipe)
    getattr(lookup("method", recipe.method.name), "check", lambda recipe: None)(recipe)
    for kind in ("guard", "reduce"):
        getattr(lookup(kind, getattr(recipe, kind).name), "refuse", lambda recipe: None)(recipe)
    refuse_tasks(recipe)
    if recipe.precision.master == "none" and recipe.precision.compute == "bf16":
        needs = getattr(lookup("optim", recipe.optim.name), "slots", None)
        if needs is None:
            raise UserError(
                f"optimizer {recipe.optim.name!r} cannot keep bf16 weights without fp32 masters",
                where="precision.master",
                fix="write precision.master=fp32, or take one of HLAT's own optimizers",
            )
    narrow = recipe.precision.states == "bf16" and needs_backward(recipe)
    if narrow and not hasattr(lookup("optim", recipe.optim.name), "set_precision"):
        raise UserError(
            f"optimizer {recipe.optim.name!r} keeps its moments in the dtype of its parameters",
            where="precision.states",
            fix="write precision.states=fp32, or take one of HLAT's own optimizers",
        )
    if recipe.parallel.tp > 1 and _needs(recipe) == "matrix":
        raise UserError(
            f"optimizer {recipe.optim.name!r} needs whole matrices, and tensor parallelism cuts every matrix",
            where="parallel.tp",
            fix="write parallel.tp=1 (dp, pp and zero1 keep them whole), or take an elementwise optimizer",
        )
    if needs_backward(recipe):
        check_optimizer(recipe)


def _needs(recipe: Recipe) -> str:
    """What the optimizer wants to see: "elementwise", any run of elements, or "matrix", whole matrices."""
    return str(getattr(lookup("optim", recipe.optim.name), "needs", "elementwise"))


def overrides_of(recipe: Recipe) -> list[Override]:
    """The entries of `optim.groups`."""
    return [Override(group.match, group.lr, group.weight_decay) for group in recipe.optim.groups]


def trained_groups(recipe: Recipe) -> dict[str, Group]:
    """Optimizer group of each parameter of the whole model that is trained, by global name."""
    shapes = list(parameter_shapes(recipe.model).items())
    if recipe.model.classes:
        shapes = [s for s in shapes if s[0] != "head.weight"]  # no loss reaches it: the classifier is used
    patterns = recipe.train_only
    for i, pattern in enumerate(patterns):
        if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in shapes):
            raise UserError(
                f"pattern {pattern!r} matches no parameter",
                where=f"train_only[{i}]",
                fix=f"names look like {examples([name for name, _ in shapes])}; wildcards are * and ?",
            )
    trained = [
        s for s in shapes if not patterns or any(fnmatch.fnmatchcase(s[0], pattern) for pattern in patterns)
    ]
    optim = recipe.optim
    groups = assign_groups(
        trained,
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        decay=optim.decay,
        overrides=overrides_of(recipe),
        untrained=["head.weight", *(name for name, _ in shapes)],  # a tied head is the embedding
    )
    if _needs(recipe) != "matrix":
        return groups
    hidden = {name: role_of(name) not in ("vocab", "norm", "replicate") for name in groups}
    return {name: replace(group, matrix=hidden[name]) for name, group in groups.items()}
