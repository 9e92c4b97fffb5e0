"""Parameters that are not trained (`train_only`): rounded to compute with, kept as they came."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hlat.parallel.plan import Part


@dataclass
class Frozen:
    """What one rank holds of a parameter that is not trained.

    value: what the model computes with (precision.compute), on the device.
    part: which rectangle of the whole parameter.
    exact: the fp32 values it came with, in the host's memory; None where `value` is exactly what came.
    """

    value: Tensor
    part: Part
    exact: Tensor | None = None

    @classmethod
    def of(cls, came: Tensor, part: Part, dtype: torch.dtype, device: torch.device) -> Frozen:
        """Keep a part, a view on the CPU of the whole parameter, to compute with in `dtype` on `device`.

        Whether a copy is kept follows from the format alone, never from values: all ranks must agree.
        """
        own = came.clone(memory_format=torch.contiguous_format)  # not a view of the whole tensor
        exact = None if torch.promote_types(own.dtype, dtype) == dtype else own
        return cls(own.to(device, dtype), part, exact)

    @property
    def kept(self) -> Tensor:
        """What checkpoints hold."""
        return self.value if self.exact is None else self.exact

    def make_room(self, dtype: torch.dtype) -> None:
        """Get ready to read, into `kept`, values that were saved in another format than those this run was
        built with: a resume is built without the weights it began from, and earlier versions saved what was
        rounded.
        """
        if dtype == self.value.dtype:
            self.exact = None
        elif dtype == torch.float32 and self.exact is None:
            self.exact = torch.empty(self.part.size, dtype=dtype)

    def take_up(self) -> None:
        """Compute with what was read into `kept`."""
        if self.exact is not None:
            with torch.no_grad():
                self.value.copy_(self.exact)
