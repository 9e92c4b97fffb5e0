"""NxD's parallel layers, put into a decoder whose parameters are this rank's parts already.

Each layer is made on the meta device, in the compute dtype, and given the parameters that are there: nothing
is initialised twice, and names do not change. Every layer gets its dtype when it is made, because casting it
later leaves its own `dtype` as it was: an embedding then gives fp32. `reduce_dtype` is the compute dtype
too: with any other, a column-parallel layer without sequence parallelism sums a cast copy of its input's
gradient and returns the unsummed one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hlat.backend.collectives import Region, VocabShard
from hlat.backend.groups import Group
from hlat.backend.neuron.limits import check_vocab
from hlat.mesh import Layout

if TYPE_CHECKING:
    from hlat.model.config import ModelConfig

_SEQUENCE = 1  # dimension of the sequence in (B, S, D)


class NxdRegion(Region):
    """Borders of a tensor-parallel region made of NxD's mappings."""

    def enter(self, x: Tensor) -> Tensor:
        """See `Region`."""
        from neuronx_distributed.parallel_layers import mappings

        if self.sequence:
            return mappings.gather_from_sequence_parallel_region(x, _SEQUENCE)
        return mappings.copy_to_tensor_model_parallel_region(x)  # type: ignore[no-any-return]

    def leave(self, x: Tensor) -> Tensor:
        """See `Region`."""
        from neuronx_distributed.parallel_layers import mappings

        if self.sequence:
            return mappings.reduce_scatter_to_sequence_parallel_region(x, _SEQUENCE)
        return mappings.reduce_from_tensor_model_parallel_region(x)  # type: ignore[no-any-return]


class _Swap(torch.autograd.Function):
    """(B, S, D) <-> (S, B, D), contiguous in both directions: NxD's backward takes views of its gradients,
    which a CPU, unlike XLA, only gives of contiguous tensors.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.transpose(0, 1).contiguous()


class QueryKeyValue(nn.Module):
    """Query, key and value projections as one `GQAQKVColumnParallelLinear`: the input is gathered once and
    its gradient summed once. With fewer key/value heads than ranks it repeats them.
    """

    def __init__(self, layer: nn.Module, sequence: bool) -> None:
        super().__init__()
        self.layer, self.sequence = layer, sequence

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, ...]:
        """(B, S or S / tp, D) -> q, k, v, each (B, S, …). The layer gathers along its first dimension."""
        if not self.sequence:
            return tuple(self.layer(x_BSD))
        return tuple(_Swap.apply(y) for y in self.layer(_Swap.apply(x_BSD)))


class GateUp(nn.Module):
    """Gate and up projections as one column-parallel product, for the same reason. Their weights stay two
    parameters; joining them costs a copy, far less than a second gather.
    """

    def __init__(self, gate: nn.Linear, up: nn.Linear, options: dict[str, Any]) -> None:
        super().__init__()
        self.gate, self.up, self.options = gate, up, options

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, ...]:
        """(B, S or S / tp, D) -> gate and up, each (B, S, F / tp)."""
        from neuronx_distributed.parallel_layers.layers import linear_with_async_allreduce

        weight = torch.cat((self.gate.weight, self.up.weight))
        out = linear_with_async_allreduce(x_BSD, weight, None, **self.options)
        return tuple(out.chunk(2, -1))


class Embedding(nn.Module):
    """`ParallelEmbedding` with the sequence where HLAT has it: NxD's gives (S / tp, B, D)."""

    def __init__(self, layer: nn.Module, sequence: bool) -> None:
        super().__init__()
        self.layer, self.sequence = layer, sequence

    @property
    def weight(self) -> nn.Parameter:
        """This rank's rows."""
        return self.layer.weight  # type: ignore[return-value]

    def forward(self, ids_BS: Tensor) -> Tensor:
        """int64 (B, S) -> (B, S or S / tp, D)."""
        x: Tensor = self.layer(ids_BS)
        return _Swap.apply(x) if self.sequence else x  # type: ignore[no-any-return]


def shard_model(model: Any, layout: Layout, group: Group, dtype: torch.dtype) -> None:
    """Replace the linear layers and the embedding of a decoder by NxD's.

    Args:
        model: a `hlat.model.decoder.Decoder`, or what a pipeline stage keeps of one; its parameters are this
            rank's parts.
        layout: the mesh.
        group: the tensor-parallel ranks.
        dtype: compute dtype, that of the parameters.

    Raises:
        UserError: a vocabulary that does not divide over the ranks.
    """
    if layout.tp == 1:
        return
    config: ModelConfig = model.config
    check_vocab(config.vocab, layout.tp)
    with torch.device("meta"):
        for block in model.layers.values():
            _shard_attention(block.attention, config, layout, dtype)
            _shard_mlp(block.mlp, config, layout, dtype)
        if model.embed is not None:
            model.embed = _embedding(model.embed.weight, config, layout, dtype)
    if layout.sequence:
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.sequence_parallel_enabled = True
    if model.head is not None:
        rows = config.vocab // layout.tp
        region = NxdRegion(group, group.size, group.rank, layout.sequence)
        model.head.shard = VocabShard(region, group.rank * rows, rows)


def _shard_attention(attention: Any, config: ModelConfig, layout: Layout, dtype: torch.dtype) -> None:
    from neuronx_distributed.modules.qkv_linear import GQAQKVColumnParallelLinear

    width = config.head_dim
    layer = GQAQKVColumnParallelLinear(
        config.hidden,
        [config.heads * width, config.kv_heads * width],
        bias=False,
        gather_output=False,
        dtype=dtype,
        device=torch.device("meta"),
        sequence_parallel_enabled=layout.sequence,
        kv_size_multiplier=max(1, layout.tp // config.kv_heads),
        fuse_qkv=False,
        reduce_dtype=dtype,
    )
    for name in ("q", "k", "v"):
        _adopt(layer, f"weight_{name}", getattr(attention, name).weight, 0, layout.tp)
    attention.joint = QueryKeyValue(layer, layout.sequence)
    attention.o = _row(attention.o, config.heads * width, config.hidden, layout, dtype)


def _shard_mlp(mlp: Any, config: ModelConfig, layout: Layout, dtype: torch.dtype) -> None:
    from neuronx_distributed.parallel_layers.parallel_state import get_tensor_model_parallel_group

    options = {
        "async_grad_allreduce": not layout.sequence,
        "sequence_parallel_enabled": layout.sequence,
        "sequence_dimension": _SEQUENCE,
        "process_group": get_tensor_model_parallel_group(),
        "reduce_dtype": dtype,
    }
    for layer in (mlp.gate, mlp.up):
        _mark(layer.weight, 0, layout.tp)
    mlp.joint = GateUp(mlp.gate, mlp.up, options)
    mlp.down = _row(mlp.down, config.ffn, config.hidden, layout, dtype)


def _row(linear: nn.Linear, size: int, out: int, layout: Layout, dtype: torch.dtype) -> nn.Module:
    from neuronx_distributed.parallel_layers.layers import RowParallelLinear

    layer: nn.Module = RowParallelLinear(
        size,
        out,
        bias=False,
        input_is_parallel=True,
        dtype=dtype,
        device=torch.device("meta"),
        sequence_parallel_enabled=layout.sequence,
        sequence_dimension=_SEQUENCE,
        reduce_dtype=dtype,
    )
    _adopt(layer, "weight", linear.weight, 1, layout.tp)
    return layer


def _embedding(weight: nn.Parameter, config: ModelConfig, layout: Layout, dtype: torch.dtype) -> nn.Module:
    from neuronx_distributed.parallel_layers.layers import ParallelEmbedding

    layer = ParallelEmbedding(
        config.vocab,
        config.hidden,
        device=torch.device("meta"),
        dtype=dtype,
        sequence_parallel_enabled=layout.sequence,
    )
    _adopt(layer, "weight", weight, 0, layout.tp)
    return Embedding(layer, layout.sequence)


def _adopt(layer: nn.Module, name: str, parameter: Any, dim: int, parts: int) -> None:
    """Give a layer made on the meta device the parameter that holds this rank's part."""
    if getattr(layer, name).shape != parameter.shape:
        raise ValueError(f"NxD expects {name} {getattr(layer, name).shape}, the plan cut {parameter.shape}")
    _mark(parameter, dim, parts)
    setattr(layer, name, parameter)


def _mark(parameter: nn.Parameter, dim: int, parts: int) -> None:
    """The attributes by which NxD knows a part of a parameter."""
    from neuronx_distributed.parallel_layers.utils import set_tensor_model_parallel_attributes

    if not hasattr(parameter, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(
            tensor=parameter, is_parallel=True, dim=dim, stride=1, num_partitions=parts
        )
