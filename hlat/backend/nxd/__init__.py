"""trn1 through NeuronX Distributed (NxD) on torch-xla: everything that imports either of them, always inside
functions, so that HLAT needs neither elsewhere.

start    joining, and the groups NxD makes
groups   collectives of one group through torch-xla
backend  what the training loop asks of a backend
layers   NxD's parallel layers put into a decoder
probe    a sum over two cores, for `hlat doctor`
"""

from hlat.backend.nxd.backend import NxdBackend

__all__ = ["NxdBackend"]
