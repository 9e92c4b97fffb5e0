"""Reducers: how ranks agree on a gradient."""

from hlat.reduce.dense import Dense

__all__ = ["Dense"]
