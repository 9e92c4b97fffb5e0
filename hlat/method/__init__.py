"""Methods: where the update of the parameters comes from."""

from hlat.method.backprop import Backprop

__all__ = ["Backprop"]
