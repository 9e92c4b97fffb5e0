"""Muon (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; rates matched to
AdamW's as in Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hlat.backend.precision import round_to
from hlat.model.dtype import at_least_fp32
from hlat.model.products import matmul
from hlat.optim.adamw import AdamW
from hlat.optim.base import Decay, Elementwise
from hlat.optim.rounding import Average
from hlat.registry import register

_POLYNOMIAL = (3.4445, -4.7750, 2.0315)  # a x + b x³ + c x⁵: steepest at 0 while it keeps (0, 1] near 1
_TINY = 1e-7


@register("optim", "muon")
class Muon(Elementwise):
    """Momentum whose matrices are replaced by the nearest orthogonal ones; everything that is no hidden
    matrix (embedding, head, norm gains) takes AdamW.

    b = momentum b + (1-momentum) g;  u = momentum b + (1-momentum) g;  p = p - lr (wd p + s orthogonal(u)).

    Args:
        params: parameters, or groups of them. Matrices are the parameters of two dimensions; a group with
            `matrix: False` (embeddings, heads) takes AdamW whatever its shapes. In a run, HLAT says which
            matrices lie in a flat shard; they are whole on one rank.
        lr: learning rate; a float or a tensor ().
        momentum: decay of the running mean of gradients, with Nesterov's look-ahead.
        adjust: s. "rms": 0.2 √max(rows, columns), so that rate and decay are those of AdamW;
            "original": √max(1, rows / columns), for rates such as 0.02.
        iterations: Newton-Schulz iterations, in bf16.
        betas, eps: of AdamW.
        weight_decay: decoupled decay, multiplied by `lr`.
    """

    needs: ClassVar[str] = "matrix"
    slots: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        momentum: Decay = 0.95,
        adjust: Literal["rms", "original"] = "rms",
        iterations: Annotated[int, Field(ge=1)] = 5,
        betas: tuple[Decay, Decay] = (0.9, 0.95),
        eps: Annotated[float, Field(gt=0)] = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        if adjust not in ("rms", "original"):
            raise ValueError(f"adjust must be 'rms' or 'original', not {adjust!r}")
        self.adjust, self.iterations = adjust, iterations
        self._matrices: set[Tensor] = set()
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "momentum": momentum, "matrix": True})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Also notes which of its parameters are matrices."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["matrix"]:
            self._matrices.update(p for p in group["params"] if _is_matrix(p, group))

    def _kinds_of_state(self) -> list[set[str]]:
        return [{"step", "momentum_buffer"}, *super()._kinds_of_state()]

    def averages(self) -> dict[str, Average]:
        """See `Elementwise`."""
        return {"momentum_buffer": Average(self.param_groups[0]["momentum"]), **AdamW.averages(self)}  # type: ignore[arg-type]

    update = AdamW.update
    second_moment = AdamW.second_moment

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state and p in self._matrices:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["momentum_buffer"] = self._zeros(p)
        return super()._state_of(p)

    def _step_one(self, p: Tensor, group: dict[str, Any], keep: Tensor | None, clip: Tensor | None) -> None:
        if p not in self._matrices:
            super()._step_one(p, group, keep, clip)
            return
        state = self._state_of(p)
        keep = torch.ones((), dtype=torch.bool, device=p.device) if keep is None else keep
        lr = torch.as_tensor(group["lr"], dtype=torch.float32, device=p.device)
        step = state["step"] + 1
        own, first = p.detach().reshape(-1), group.get("first", 0)
        gradient, buffer = p.grad.reshape(-1), state["momentum_buffer"].view(-1)  # type: ignore[union-attr]
        for where, shape in _places(p, group):
            g = at_least_fp32(gradient[where])
            g = g if clip is None else g * clip
            mean = at_least_fp32(buffer[where]).lerp(g, 1 - group["momentum"])
            move = orthogonal(g.lerp(mean, group["momentum"]).view(shape), self.iterations)
            move = at_least_fp32(move).view(-1) * self._size(shape)
            moved = at_least_fp32(own[where]) * (1 - lr * group["weight_decay"]) - lr * move
            for i, (old, new) in enumerate(((own[where], moved), (buffer[where], mean))):
                seed, offset = self.seed + 7919 * i, first + where.start
                new = round_to(new, old.dtype, self.rounding, seed=seed, step=step, offset=offset)
                old.copy_(torch.where(keep, new, old))
        if not p.is_contiguous():
            p.copy_(own.view(p.shape))
        state["step"].copy_(torch.where(keep, step, state["step"]))

    def _size(self, shape: tuple[int, ...]) -> float:
        rows, columns = shape
        original = float(max(1.0, rows / columns) ** 0.5)
        return original if self.adjust == "original" else float(0.2 * max(rows, columns) ** 0.5)


def orthogonal(x: Tensor, iterations: int = 5) -> Tensor:
    """About U Vᵀ of a matrix x = U S Vᵀ: its singular values brought near 1 (between 0.7 and 1.2).

    Args:
        x: (rows, columns), any float dtype.
        iterations: of the quintic Newton-Schulz iteration.

    Returns:
        bf16, the same shape; zeros for zeros.
    """
    a, b, c = _POLYNOMIAL
    y = x.bfloat16()
    tall = y.shape[0] > y.shape[1]
    y = y.T if tall else y
    y = y / y.norm().clamp(min=_TINY)
    for _ in range(iterations):
        gram = matmul(y, y.T)
        y = a * y + matmul(b * gram + matmul(c * gram, gram), y)
    return y.T if tall else y


def _is_matrix(p: Tensor, group: dict[str, Any]) -> bool:
    return "pieces" in group or p.dim() == 2


def _places(p: Tensor, group: dict[str, Any]) -> Iterator[tuple[slice, tuple[int, ...]]]:
    """Where each matrix lies in the flattened parameter, and its shape."""
    if "pieces" not in group:
        yield slice(0, p.numel()), tuple(p.shape)
        return
    for spec, where, skip in group["pieces"]:
        if skip or where.stop - where.start != spec.numel or tuple(spec.shape) != tuple(spec.part.shape):
            raise ValueError(f"{spec.name}: muon needs the whole matrix on one rank")
        yield where, tuple(spec.shape)
