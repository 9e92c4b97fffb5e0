"""What HLAT asks of an optimizer, and the base class of the elementwise ones.

Any `torch.optim.Optimizer` works. HLAT's own derive from `Elementwise`, which adds, without a copy of the
parameters:

* `keep`: a bool tensor () from the guard. False leaves parameters, moments and the step counter bitwise as
  they were: a select, so a NaN in the rejected update cannot leak through.
* `clip`: the factor () of global-norm clipping, applied to the gradient on the way in.
* low-precision storage: arithmetic is fp32 whatever the dtype of parameters and moments (fp64 for fp64
  parameters); results are rounded to nearest or stochastically when they are written back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hlat.backend.precision import round_to
from hlat.model.dtype import at_least_fp32
from hlat.optim.rounding import Average

Decay = Annotated[float, Field(ge=0, lt=1)]  # checked when it comes from a recipe

COMPILE_FROM = 1 << 16  # smaller tensors are not worth a compiled kernel
# What the run says of a shard in its group, which the arithmetic does not need.
NOT_OPTIONS = ("params", "lr", "peak_lr", "first", "counted", "pieces", "matrix")
CHUNK = 1 << 18  # elements an eager update works on at a time: temporaries stay in the cache


class Elementwise(torch.optim.Optimizer):
    """An optimizer whose update of an element reads only that element's parameter, gradient and state.

    A subclass names its state in `slots` and writes `update`, a pure function of tensors; everything else is
    here. Eager unless `compile` is called.

    Args:
        params: parameters or groups of them, of any shape and float dtype; plain tensors, not DTensors.
        defaults: group options; `lr` may be a float or a tensor ().

    Raises:
        ValueError: an option out of its range.
    """

    needs: ClassVar[str] = "elementwise"
    slots: ClassVar[tuple[str, ...]] = ()
    #: options of other optimizers whose slots have the same names: a state with one is not this optimizer's
    foreign: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        check_options(defaults)
        super().__init__(params, defaults)
        self.state_dtype, self.rounding, self.seed = torch.float32, "nearest", 0
        self._compiled: Callable[..., None] | None = None

    def set_precision(self, state_dtype: torch.dtype, rounding: str = "stochastic", seed: int = 0) -> None:
        """How results are stored; call it before the first step.

        Args:
            state_dtype: dtype of the slots; those of an fp64 parameter are fp64.
            rounding: "nearest" or "stochastic", for parameters and slots stored in bf16. To nearest a slot
                loses every change below 1/512 of its value (see `hlat.optim.rounding`).
            seed: seed of stochastic rounding.
        """
        self.state_dtype, self.rounding, self.seed = state_dtype, rounding, seed

    def update(
        self, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any], lr: Tensor, step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """New parameter and slots; fp32 (or fp64) in and out, nothing in place. `step` () counts from 1."""
        raise NotImplementedError

    def averages(self) -> dict[str, Average]:
        """The slots that are running averages, by name, with the decay of the first group's options."""
        return {}

    def compile(self) -> None:
        """Fuse the update of large tensors into one kernel (any size of tensor shares one graph)."""
        self._compiled = torch.compile(self._apply, dynamic=True)

    def init_state(self) -> None:
        """Create every slot now (a checkpoint is loaded into them); without it the first step does."""
        for group in self.param_groups:
            for p in group["params"]:
                self._state_of(p)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        keep: Tensor | None = None,
        clip: Tensor | None = None,
    ) -> Any:
        """One update of every parameter that has a gradient. Returns what `closure` returns, as torch's
        optimizers do.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_one(p, group, keep, clip)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but every tensor keeps the dtype it was saved with: torch would round fp32 moments to
        the dtype of a bf16 parameter.

        Raises:
            ValueError: a parameter's state, or a group's options, are not what this optimizer keeps; nothing
                has been loaded then.
        """
        for number, saved_state in state_dict["state"].items():
            if saved_state and set(saved_state) not in self._kinds_of_state():
                own = " or ".join(", ".join(sorted(kind)) for kind in self._kinds_of_state())
                raise ValueError(
                    f"the state of parameter {number} is that of another optimizer or of other options: it "
                    f"has {', '.join(sorted(map(str, saved_state)))}; {type(self).__name__} keeps {own}"
                )
        for number, group in enumerate(state_dict["param_groups"]):
            lacking = sorted({*self.defaults} - {*group})
            if lacking or (foreign := sorted(self.foreign & {*group})):
                what = f"lacks {lacking[0]!r}" if lacking else f"has {foreign[0]!r}"
                raise ValueError(f"parameter group {number} of the state is another optimizer's: it {what}")
        super().load_state_dict(state_dict)
        saved = [name for group in state_dict["param_groups"] for name in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for name, p in zip(saved, params, strict=True):
            for slot, value in state_dict["state"].get(name, {}).items():
                if torch.is_tensor(value):
                    self.state[p][slot] = value.detach().to(p.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: torch's, which has no attribute of a subclass, and those. Kernels are left
        out, to be compiled again, and the `step` that a learning-rate scheduler has wrapped.
        """
        torchs = {*vars(torch.optim.SGD([torch.empty(0)])), "step"}
        own = {name: value for name, value in vars(self).items() if name not in torchs}
        own.update((name, None) for name in own if name.startswith("_compiled"))
        return {**own, **super().__getstate__()}

    def _kinds_of_state(self) -> list[set[str]]:
        """What may be in the state of a parameter."""
        return [{"step", *self.slots}]

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for slot in self.slots:
                state[slot] = self._zeros(p)
        return state

    def _zeros(self, p: Tensor) -> Tensor:
        """A new slot."""
        dtype = torch.float64 if p.dtype == torch.float64 else self.state_dtype
        return torch.zeros(p.shape, dtype=dtype, device=p.device)

    def _step_one(self, p: Tensor, group: dict[str, Any], keep: Tensor | None, clip: Tensor | None) -> None:
        state, device = self._state_of(p), p.device
        keep = torch.ones((), dtype=torch.bool, device=device) if keep is None else keep
        clip = torch.ones((), device=device) if clip is None else clip
        wide = torch.promote_types(p.dtype, torch.float32)
        lr = torch.as_tensor(group["lr"], dtype=wide, device=device)
        step = state["step"].to(wide) + 1
        own = p.detach().reshape(-1)  # a copy where the parameter does not lie in one piece
        tensors = [own, p.grad.reshape(-1), *(state[s].view(-1) for s in self.slots)]  # type: ignore[union-attr]
        options = self.options(group, step)
        first = group.get("first", 0)  # where a shard begins: its elements round as in the whole
        if self._compiled is not None and p.numel() >= COMPILE_FROM:
            self._compiled(tensors, first, options, lr, step, keep, clip)
        else:
            size = CHUNK if device.type == "cpu" else max(1, p.numel())
            for start in range(0, p.numel(), size):
                chunk = [t[start : start + size] for t in tensors]
                self._apply(chunk, first + start, options, lr, step, keep, clip)
        if not p.is_contiguous():
            p.copy_(own.view(p.shape))
        state["step"].copy_(torch.where(keep, step, state["step"]))

    def options(self, group: dict[str, Any], step: Tensor) -> dict[str, Any]:
        """What `update` gets as `group`: the options of the optimizer, and what follows from them and the
        step for all elements alike. No power and no division by a number belongs in an elementwise kernel.

        unbias: with `betas`, the bias corrections 1 / (1 - beta^t) of each, tensors ().
        """
        options = {k: v for k, v in group.items() if k not in NOT_OPTIONS}
        if "betas" in options:
            options["unbias"] = tuple(1 / (1 - beta**step) for beta in options["betas"])
        return options

    def _apply(
        self,
        tensors: list[Tensor],
        offset: int,
        options: dict[str, Any],
        lr: Tensor,
        step: Tensor,
        keep: Tensor,
        clip: Tensor,
    ) -> None:
        """Update 1-D slices in place: wide arithmetic, select by `keep`, rounding into the stored dtype."""
        p, g, *slots = tensors
        wide_p, wide_g, *wide_slots = map(at_least_fp32, tensors)
        state = dict(zip(self.slots, wide_slots, strict=True))
        new_p, new_state = self.update(wide_p, wide_g * clip, state, options, lr, step)
        chosen = []  # all before the first is written: a new slot may be an old one under another name
        for i, (old, new) in enumerate(
            zip([p, *slots], [new_p, *(new_state[s] for s in self.slots)], strict=True)
        ):
            rounded = round_to(
                new, old.dtype, self.rounding, seed=self.seed + 7919 * i, step=step, offset=offset
            )
            chosen.append(torch.where(keep, rounded, old))
        for old, new in zip([p, *slots], chosen, strict=True):
            old.copy_(new)


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError for a rate, decay, beta or eps outside its range; a tensor is not read."""
    for name in ("lr", "weight_decay"):
        value = options.get(name, 0.0)
        if not torch.is_tensor(value) and not value >= 0.0:
            raise ValueError(f"{name} must be at least 0, not {value}")
    if not all(0.0 <= beta < 1.0 for beta in options.get("betas", ())):
        raise ValueError(f"betas must lie in [0, 1), not {options['betas']}")
    if not options.get("eps", 1.0) > 0.0:
        raise ValueError(f"eps must be positive, not {options['eps']}")


def guarded_step(optimizer: torch.optim.Optimizer, keep: Tensor, clip: Tensor) -> None:
    """Step any optimizer so that `keep` () bool False changes nothing; `clip` () scales the gradients first.

    An optimizer that does not know `keep` is stepped on and put back by a select, at the cost of one copy of
    its parameters and state. While it has no state, `keep` is read on the host: the first step makes it, of
    values only the optimizer knows, and must not be one to be put back.
    """
    if isinstance(optimizer, Elementwise):
        optimizer.step(keep=keep, clip=clip)
        return
    if not optimizer.state and not bool(keep):
        return
    with torch.no_grad():
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        old_params = [p.detach().clone() for p in params]
        old_state = [
            {k: v.clone() for k, v in optimizer.state[p].items() if torch.is_tensor(v)} for p in params
        ]
        for p in params:
            p.grad.mul_(clip)  # type: ignore[union-attr]
        optimizer.step()
        for p, was, state in zip(params, old_params, old_state, strict=True):
            p.copy_(torch.where(keep, p, was))
            for name, value in optimizer.state[p].items():
                if name in state:
                    value.copy_(torch.where(keep.to(value.device), value, state[name]))


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer's state exist, so that a checkpoint can be loaded into it.

    An optimizer without `init_state` takes one step with zero gradients, after which parameters are put back.
    What is in its state then is of no use but to be overwritten: not every optimizer starts from zeros.
    """
    if hasattr(optimizer, "init_state"):
        optimizer.init_state()
        return
    if optimizer.state:
        return
    with torch.no_grad():
        params = [p for group in optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for p, was in zip(params, before, strict=True):
            p.copy_(was)
            p.grad = None
