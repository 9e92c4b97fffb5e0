"""Reducers: how ranks agree on a gradient."""

from hlat.reduce.conef import EF, ConEF, PowerSGD
from hlat.reduce.dense import Dense

__all__ = ["EF", "ConEF", "Dense", "PowerSGD"]
