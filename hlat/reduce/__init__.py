"""Reducers: how ranks agree on a gradient."""

from hlat.reduce.base import Reducer
from hlat.reduce.conef import EF, ConEF, PowerSGD
from hlat.reduce.dense import Dense
from hlat.reduce.hook import ConEFState, conef_hook

__all__ = ["EF", "ConEF", "ConEFState", "Dense", "PowerSGD", "Reducer", "conef_hook"]
