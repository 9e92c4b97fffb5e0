"""MADA: one optimizer that contains Adam, AVGrad, Yogi, Adan and Lion, and learns where between them to be
(arXiv 2401.08893).

Six coefficients, shared by all parameters, move by hyper-gradient descent: the derivative of the loss with
respect to what the coefficients did in one step is the inner product of that step's sensitivities with the
gradient that follows it. No second backward pass, no retained graph: the step is kept back as its gradient
and replayed, with its derivatives, when the next gradient arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from hlat.model.dtype import at_least_fp32
from hlat.optim.base import CHUNK, COMPILE_FROM, Decay, Elementwise
from hlat.optim.mada_options import LIMITS, Name, PerName, Share, check_coefficients, hyper_options
from hlat.optim.mada_step import (
    COEFFICIENTS,
    LION_BETA2,
    Terms,
    advance,
    at_step,
    direction,
    sensitivities,
)
from hlat.optim.rounding import Average
from hlat.registry import register

_SLOTS = {"m": "exp_avg", "v": "exp_avg_sq", "mean": "mean_sq", "n": "exp_avg_diff", "lion": "lion_avg"}
# Inductor writes intermediate results with many uses to memory; here they are all used in the same loop.
_ONE_LOOP: dict[str, Any] = {
    f"realize_{what}_threshold": 100_000 for what in ("opcount", "reads", "acc_reads")
}
_ROW = 1024  # sums are taken in two levels: one running sum over 1e8 elements would lose digits


@register("optim", "mada")
class MADA(Elementwise):
    """Adam whose betas, and whose place between Adam, AVGrad, Yogi, Adan and Lion, are learned while it
    trains. See docs/methods/mada.md.

    Coefficients start at the values given and, where named in `learn`, move; the others stay and the parts of
    the update they switch off (beta3=0, rho=1, c=1, gamma=1) cost neither memory nor time.

    Args:
        params: parameters of any shape, or groups. A group may say `counted: False` if other ranks hold the
            same elements and count them.
        lr: learning rate; a float or a tensor ().
        all_reduce: sums a tensor over the ranks that hold different elements and returns it; called once a
            step, with one number for each learned coefficient. None: all parameters are here.
        beta1, beta2: decay of the first and second moment.
        beta3: weight of the gradient difference and decay of its moment; 0 is no Adan.
        rho: 1 is Adam's second moment, 0 AVGrad's average of it over time.
        c: 1 is Adam's square, 0 Yogi's signed one.
        gamma: 1 is the adaptive direction, 0 Lion's sign.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, multiplied by `lr`.
        learn: which coefficients are learned.
        hyper_lr: their learning rate; one number, or one by name (others 2.5e-3).
        hyper_momentum: their momentum, likewise. Default: 0.5, gamma 0.
        hyper_clip: largest hyper-gradient, likewise (others 10).
        hyper_start: updates before a coefficient begins to move, at least 1, likewise (others 50).
        compat: "authors" does as the released code does, mistakes included: the previous gradient is zero,
            Lion's average is updated before use.

    Raises:
        ValueError: a coefficient out of its range, or one to learn whose part of the update is off.

    Numbers of hyper_lr and hyper_momentum are those of the authors' character model; their GPT-2 runs
    used 1e-4 for beta1 and beta2, 2e-2 for the others, and no momentum (as listed, over 5 micro-batches).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        all_reduce: Callable[[Tensor], Tensor] | None = None,
        *,
        beta1: Decay = 0.9,
        beta2: Decay = 0.95,
        beta3: Decay = 0.0,
        rho: Share = 1.0,
        c: Share = 1.0,
        gamma: Share = 1.0,
        eps: Annotated[float, Field(gt=0)] = 1e-6,
        weight_decay: float = 0.1,
        learn: tuple[Name, ...] = COEFFICIENTS,  # type: ignore[assignment]
        hyper_lr: float | PerName = 2.5e-3,
        hyper_momentum: float | PerName | None = None,
        hyper_clip: float | PerName = 10.0,
        hyper_start: int | dict[Name, int] = 50,
        compat: Literal["none", "authors"] = "none",
    ) -> None:
        start = {"beta1": beta1, "beta2": beta2, "beta3": beta3, "rho": rho, "c": c, "gamma": gamma}
        self.learn = tuple(name for name in COEFFICIENTS if name in learn)
        check_coefficients(start, learn, compat)
        self._hyper = hyper_options(self.learn, hyper_lr, hyper_momentum, hyper_clip, hyper_start)
        self._start = start
        self.all_reduce = all_reduce
        self.terms = _terms(start, self.learn, compat == "authors")
        self._kinds = [kind for kind in _SLOTS if _has(self.terms, kind)]
        gradients = ["grad"] if self.learn else []
        if self.terms.difference and not self.terms.authors:
            gradients.append("grad_prev")
        self.slots = (*(_SLOTS[kind] for kind in self._kinds), *gradients)  # type: ignore[misc]
        self._shared: dict[str, Tensor] = {}
        self._missed: dict[Tensor, dict[str, Any]] = {}  # of parameters that had no gradient: see `step`
        self._compiled_dots: Callable[..., Tensor] | None = None
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    #: state tensors () that belong to a parameter group rather than to all parameters
    own_scalars = ("lr",)
    foreign = frozenset({"betas"})

    @staticmethod
    def idle(options: Mapping[str, Any]) -> dict[str, str]:
        """Options that these others leave nothing to do, and why."""
        why = "no coefficient is learned (learn is empty)"
        names = ("hyper_lr", "hyper_momentum", "hyper_clip", "hyper_start")
        return {} if options.get("learn", True) else dict.fromkeys(names, why)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises ValueError for a coefficient: a group has none of its own."""
        if own := [name for name in COEFFICIENTS if name in param_group]:
            raise ValueError(f"{own[0]} belongs to the optimizer; a parameter group cannot have its own")
        super().add_param_group(param_group)

    def coefficients(self) -> dict[str, float]:
        """The six coefficients now, read from the device."""
        now = dict(self._start)
        if self._shared:
            now.update((name, float(self._shared[name])) for name in self.learn)
        return now

    def metrics(self) -> dict[str, Tensor]:
        """The learned coefficients, fp32 () each, on the device."""
        return {name: self._shared[name].clone() for name in self.learn if name in self._shared}

    def notes(self, updates: int) -> list[str]:
        """That a run of so many updates is over before coefficients begin to move, where it is."""
        starts = {name: int(self._hyper["start"][name]) for name in self.learn}
        late = [name for name, start in starts.items() if start >= updates]
        if not late:
            return []
        first = min(starts[name] for name in late)
        return [
            f"{', '.join(late)} stand still in this run: they move after hyper_start updates ({first}),"
            f" and the run has {updates}"
        ]

    def compile(self) -> None:
        """Fuse the update of large tensors, and their inner products, into one kernel each."""
        super().compile()
        self._compiled_dots = torch.compile(self._dots, dynamic=True, options=_ONE_LOOP)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        keep: Tensor | None = None,
        clip: Tensor | None = None,
    ) -> Any:
        """One update of every parameter that has a gradient, after one of the coefficients.

        Args:
            closure: recomputes the loss; what it returns is returned.
            keep: bool (); False changes nothing, neither parameters nor coefficients.
            clip: factor () of the gradients for the update. The inner products use the gradients as they are,
                so clip here rather than in `.grad`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not active and self.all_reduce is None:
            return loss
        for p, _ in active:
            self._state_of(p)
        device = self.param_groups[0]["params"][0].device
        self._shared_state(device)
        keep = torch.ones((), dtype=torch.bool, device=device) if keep is None else keep
        before = self._coefficients()
        if self.learn:
            self._note_missing(before)
            self._learn(active, device, keep, before)
        self._now = self._coefficients()
        for p, group in active:
            self._before = self._missed.get(p, before)
            self._step_one(p, group, keep, clip)
            if p in self._missed:
                chosen = {n: (self._now[n], self._missed[p][n]) for n in self.learn}
                self._missed[p] = {**self._now, **{n: torch.where(keep, *two) for n, two in chosen.items()}}
            if self.learn:
                lr = torch.as_tensor(group["lr"], dtype=torch.float32, device=p.device)
                self.state[p]["lr"].copy_(torch.where(keep, lr, self.state[p]["lr"]))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also makes the coefficients one for all parameters again. What is not learned is an argument, not
        state.
        """
        super().load_state_dict(state_dict)
        self._shared, self._missed = {}, {}
        states = [state for state in self.state.values() if "updates" in state]
        for name, shared in self._shared_state(torch.device("cpu")).items() if states else ():
            shared.data = states[0][name].clone()
            for state in states:
                state[name] = shared

    def options(self, group: dict[str, Any], step: Tensor) -> dict[str, Any]:
        """With the coefficients of this step and of the one before."""
        now, before = at_step(self._now, step), at_step(self._before, (step - 1).clamp(min=1))
        return {**super().options(group, step), "now": now, "before": before}

    def update(
        self, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any], lr: Tensor, step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        moments, terms = self._moments(state), self.terms
        if self.learn:  # the step before was kept back for its derivatives: take it now
            moments, _ = advance(moments, state["grad"], group["before"], terms)
            kept = moments
            moments = {**moments, "g_prev": state["grad"]}
        new, extra = advance(moments, g, group["now"], terms)
        move, _ = direction(new, extra, group["now"], terms, group["eps"])
        if not self.learn:
            kept = new
        slots = {_SLOTS[kind]: kept[kind] for kind in self._kinds}
        slots.update(grad=g, grad_prev=state["grad"] if self.learn else g)
        return p * (1 - lr * group["weight_decay"]) - lr * move, slots

    def averages(self) -> dict[str, Average]:
        """See `Elementwise`; a coefficient that is learned counts with the largest value it can take."""
        most = {n: LIMITS[n][1] if n in self.learn else self._start[n] for n in COEFFICIENTS}
        by_kind = {
            "m": Average(most["beta1"]),
            "v": Average(most["beta2"], power=2),
            "mean": Average(None, power=2),
            "n": Average(most["beta3"]),
            "lion": Average(LION_BETA2),
        }
        return {_SLOTS[kind]: by_kind[kind] for kind in self._kinds}

    def _note_missing(self, before: dict[str, Any]) -> None:
        """A parameter without a gradient (an expert nobody chose) keeps its last step back for longer, while
        the coefficients go on: remember which ones that step was taken with.
        """
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None and self.state.get(p):
                    self._missed.setdefault(p, before)

    def _learn(
        self, active: list[tuple[Tensor, dict[str, Any]]], device: torch.device, keep: Tensor, before: Any
    ) -> None:
        """Move the coefficients by the derivative of this gradient's loss. A rank that holds no parameter
        takes part in the sum.
        """
        total = torch.zeros(len(self.learn), device=device)
        for p, group in active:
            if group.get("counted", True):
                self._before = self._missed.get(p, before)
                total = total - self.state[p]["lr"] * self._inner_products(p, group)
        if self.all_reduce is not None:
            total = self.all_reduce(total)
        updates = self._shared["updates"]
        for name, slope in zip(self.learn, total.unbind(0), strict=True):
            value, momentum = self._shared[name], self._shared[f"{name}_momentum"]
            limit, start = self._hyper["clip"][name], self._hyper["start"][name]
            run = momentum * self._hyper["momentum"][name] + slope.clamp(-limit, limit)
            moved = (value - self._hyper["lr"][name] * run).clamp(*LIMITS[name])
            take = keep & (updates >= start) & torch.isfinite(slope)
            value.copy_(torch.where(take, moved, value))
            momentum.copy_(torch.where(take, run, momentum))
        updates.add_(keep.to(updates.dtype))

    def _inner_products(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """fp32 (len(learn),): the gradient, as it is, times the sensitivities of the step before."""
        state = self.state[p]
        tensors = [p.grad.reshape(-1), *(state[s].view(-1) for s in self.slots)]  # type: ignore[union-attr]
        eps, before = group["eps"], at_step(self._before, state["step"].clamp(min=1))
        if self._compiled_dots is not None and p.numel() >= COMPILE_FROM:
            return self._compiled_dots(tensors, before, eps)
        total = torch.zeros(len(self.learn), device=p.device)
        for start in range(0, p.numel(), CHUNK):
            total += self._dots([tensor[start : start + CHUNK] for tensor in tensors], before, eps)
        return total

    def _dots(self, tensors: list[Tensor], before: dict[str, Any], eps: float) -> Tensor:
        if tensors[0].numel() % _ROW == 0:  # rows from the start, so that all of it is one loop
            tensors = [tensor.view(-1, _ROW) for tensor in tensors]
        g, *slots = map(at_least_fp32, tensors)
        state = dict(zip(self.slots, slots, strict=True))
        moments, last = self._moments(state), state["grad"]
        slopes = sensitivities(moments, last, before, self.terms, eps, self.learn)
        return torch.stack([(g * slopes[name]).sum(-1).sum() for name in self.learn])

    def _moments(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Slots by the names `advance` has for them."""
        moments = {kind: state[_SLOTS[kind]] for kind in self._kinds}
        if "grad_prev" in state:
            moments["g_prev"] = state["grad_prev"]
        return moments

    def _coefficients(self) -> dict[str, Any]:
        """The six as the arithmetic takes them: floats where fixed, copies of the tensors where learned."""
        return {n: self._shared[n].clone() if n in self.learn else self._start[n] for n in COEFFICIENTS}

    def _kinds_of_state(self) -> list[set[str]]:
        shared = {"lr", "updates", *self.learn, *(f"{name}_momentum" for name in self.learn)}
        return [{"step", *self.slots, *(shared if self.learn else ())}]

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        if not self.state[p]:
            state = super()._state_of(p)
            if self.learn:
                state["lr"] = torch.zeros((), device=p.device)
                state.update(self._shared_state(p.device))
        return self.state[p]

    def _shared_state(self, device: torch.device) -> dict[str, Tensor]:
        """One set of tensors (), in the state of every parameter so that checkpoints hold them."""
        if self.learn and not self._shared:
            self._shared["updates"] = torch.zeros((), device=device)
            for name in self.learn:
                self._shared[name] = torch.tensor(float(self._start[name]), device=device)
                self._shared[f"{name}_momentum"] = torch.zeros((), device=device)
        return self._shared


@register("optim", "hyperadam")
class HyperAdam(MADA):
    """AdamW that learns beta1 and beta2: MADA without its other four coefficients (arXiv 2401.08893,
    section 5).

    Args: those of `MADA`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        all_reduce: Callable[[Tensor], Tensor] | None = None,
        *,
        beta1: Decay = 0.9,
        beta2: Decay = 0.95,
        eps: Annotated[float, Field(gt=0)] = 1e-6,
        weight_decay: float = 0.1,
        hyper_lr: float | PerName = 2.5e-3,
        hyper_momentum: float | PerName | None = None,
        hyper_clip: float | PerName = 10.0,
        hyper_start: int | dict[Name, int] = 50,
    ) -> None:
        super().__init__(
            params,
            lr,
            all_reduce,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            learn=("beta1", "beta2"),
            hyper_lr=hyper_lr,
            hyper_momentum=hyper_momentum,
            hyper_clip=hyper_clip,
            hyper_start=hyper_start,
        )


def _terms(start: Mapping[str, float], learn: Iterable[str], authors: bool) -> Terms:
    """What fixed coefficients leave of the update."""

    def on(name: str, off: float) -> bool:
        return name in learn or start[name] != off

    adaptive = on("gamma", 0.0)
    return Terms(
        adaptive=adaptive,
        lion=on("gamma", 1.0),
        mean=adaptive and on("rho", 1.0),
        yogi=adaptive and on("c", 1.0),
        difference=adaptive and on("beta3", 0.0),
        authors=authors,
    )


def _has(terms: Terms, kind: str) -> bool:
    if kind in ("m", "v"):
        return terms.adaptive
    return {"mean": terms.mean, "n": terms.difference, "lion": terms.lion}[kind]
