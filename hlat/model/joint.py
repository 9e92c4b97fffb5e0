"""Several linear layers of one input as one product.

A CPU's matrix units work better on one wide product than on three narrow ones (3 % of a step of the
benchmark model). The price is a copy of the weights for each call, which a CPU does not notice and an
accelerator would; so a backend decides, and one that splits the layers over ranks leaves them alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hlat.model.products import linear


def project(
    x_BSD: Tensor, layers: Sequence[nn.Linear], joint: bool | Callable[[Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """The outputs of layers without bias, each (B, S, rows of its weight).

    Args:
        x_BSD: their common input.
        layers: called one by one, or, with `joint`, multiplied as one matrix.
        joint: or what a backend computes all of them with.
    """
    if callable(joint):
        return joint(x_BSD)
    if not joint:
        return tuple(layer(x_BSD) for layer in layers)
    weights = [layer.weight for layer in layers]
    return linear(x_BSD, torch.cat(weights)).split([len(w) for w in weights], -1)
