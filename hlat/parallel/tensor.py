"""Tensor and sequence parallelism: collectives put around the layers of a decoder from outside.

The layers themselves count heads and features from their tensors, so with a part of the weights (see `plan`)
they run unchanged; here their inputs and outputs get the borders of `hlat.backend.collectives.Region`. Two
regions a block, one for the embedding, one for head and loss.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hlat.backend.collectives import Region, VocabShard
from hlat.backend.groups import Group
from hlat.mesh import split
from hlat.model.decoder import Decoder


class VocabEmbedding(nn.Module):
    """An embedding of which this rank holds some rows; other ids contribute zero, and the ranks' results are
    summed.

    Args:
        weight: (rows of this rank, D).
        shard: which rows.
    """

    def __init__(self, weight: nn.Parameter, shard: VocabShard) -> None:
        super().__init__()
        self.weight, self.shard = weight, shard

    def forward(self, ids_BS: Tensor) -> Tensor:
        """int64 (B, S) -> (B, S, D), or (B, S / tp, D) under sequence parallelism."""
        rows = self.weight.shape[0]
        local = ids_BS - self.shard.start
        held = (local >= 0) & (local < rows)
        x_BSD = F.embedding(local.clamp(0, rows - 1), self.weight) * held[..., None]
        return self.shard.region.leave(x_BSD)


def shard_model(model: Decoder, group: Group, sequence: bool) -> None:
    """Make a decoder whose parameters are this rank's parts compute what the whole one does. Call it before
    recompute and compilation are applied.

    Args:
        model: a whole decoder or what a pipeline stage keeps of one.
        group: the tensor-parallel ranks; nothing is done when there is one.
        sequence: split the stream between the regions along the sequence.
    """
    if group.size == 1:
        return
    region = Region(group.name, group.size, group.rank, sequence)
    start, _ = split(model.config.vocab, group.size, group.rank)
    shard = VocabShard(region, start, split(model.config.vocab, group.size, 0)[1])
    for block in model.layers.values():
        block.attention.forward = region.inside(block.attention.forward)  # type: ignore[union-attr,assignment]
        block.mlp.forward = region.inside(block.mlp.forward)  # type: ignore[union-attr,assignment]
    if model.embed is not None:
        model.embed = VocabEmbedding(model.embed.weight, shard)  # type: ignore[assignment,arg-type]
    if model.head is not None:
        model.head.shard = shard  # type: ignore[assignment]
