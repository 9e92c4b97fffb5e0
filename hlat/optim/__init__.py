"""Optimizers: each usable in any PyTorch loop, each a choice of the recipe's `optim.name`."""

from hlat.optim.adamw import AdamW
from hlat.optim.adan import Adan
from hlat.optim.amsgrad import AMSGrad
from hlat.optim.avgrad import AVGrad
from hlat.optim.lion import Lion
from hlat.optim.mada import MADA, HyperAdam
from hlat.optim.muon import Muon
from hlat.optim.sgd import SGD
from hlat.optim.yogi import Yogi

__all__ = ["MADA", "SGD", "AMSGrad", "AVGrad", "AdamW", "Adan", "HyperAdam", "Lion", "Muon", "Yogi"]
