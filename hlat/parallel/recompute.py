"""Activation recompute: trade a second forward of some modules for the memory of their inner activations.

`selective` is HLAT's choice: core attention (whose scores grow with the square of the sequence) and the
SwiGLU product, the two that are large to keep and cheap to redo. `full` redoes whole blocks. Wrapped modules
keep their names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def apply_recompute(model: nn.Module, mode: str, checkpoint: Callable[..., Any]) -> None:
    """Wrap the modules that `mode` (none, selective, full) names. Call it before compiling.

    Args:
        checkpoint: `checkpoint(function, *args)` calls the function so that backward calls it again.
    """
    for block in model.layers.values():  # type: ignore[operator,union-attr]
        if mode == "selective":
            _wrap(block.attention.core, checkpoint)
            _wrap(block.mlp.product, checkpoint)
        elif mode == "full":
            _wrap(block, checkpoint)


def _wrap(module: nn.Module, checkpoint: Callable[..., Any]) -> None:
    forward = module.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not module.training:
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **kwargs)

    module.forward = recomputed  # type: ignore[method-assign]
