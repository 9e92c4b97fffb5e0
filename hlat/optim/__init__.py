"""Optimizers: each usable in any PyTorch loop, each a choice of the recipe's `optim.name`."""

from hlat.optim.adamw import AdamW
from hlat.optim.sgd import SGD

__all__ = ["SGD", "AdamW"]
