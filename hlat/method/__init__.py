"""Methods: where the update of the parameters comes from.

`MeZO` and `MeZOSVRG` also work by themselves, in any PyTorch loop.
"""

from hlat.method.backprop import Backprop
from hlat.method.forward_only import FullBatchMethod, MeZOMethod, MeZOSVRGMethod
from hlat.method.mezo import MeZO
from hlat.method.mezo_svrg import MeZOSVRG

__all__ = ["Backprop", "FullBatchMethod", "MeZO", "MeZOMethod", "MeZOSVRG", "MeZOSVRGMethod"]
