"""Joining the ranks of a run, and which of them NxD groups together."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from hlat.backend.neuron.limits import heads_not_shared
from hlat.errors import UserError
from hlat.mesh import Layout, Place

Mesh = list[list[int]]  # ranks of every group of one kind; each rank is in exactly one
_FIX = (
    "write backend=native for GPUs and CPUs; for trn1 install AWS's packages, which"
    " https://pip.repos.neuron.amazonaws.com has, not PyPI"
)


def missing() -> str:
    """Why NxD cannot be imported here, in a line; empty when it can."""
    for name in ("torch_xla", "neuronx_distributed"):
        try:
            importlib.import_module(name)
        except Exception as error:  # its own imports fail in many ways
            return f"{name} cannot be imported ({type(error).__name__}: {error})"
    return ""


def cpu_mode() -> bool:
    """Whether NxD computes on the CPU instead of a Neuron device (its variable NXD_CPU_MODE)."""
    return os.environ.get("NXD_CPU_MODE", "0") == "1"


def process_group() -> str:
    """What torch.distributed is to be initialised with before a `NxdBackend` is made; NxD asks for it even in
    one process.

    Raises UserError where NxD is not installed.
    """
    reason = missing()
    if reason:
        raise UserError(f"backend nxd: {reason}", where="backend", fix=_FIX)
    if cpu_mode():
        return "gloo"
    import torch_xla.distributed.xla_backend  # noqa: F401  # registers the backend "xla"

    return "xla"


def device() -> torch.device:
    """What NxD computes on in this process."""
    from neuronx_distributed.utils import get_device

    found: torch.device = get_device()
    return found


@dataclass(frozen=True)
class Ranks:
    """Where this rank stands and who communicates with whom, as NxD laid it out: pipeline ranks slowest,
    tensor-parallel ranks fastest, except where the hardware wants another order.

    place: this rank's coordinates.
    heads: which run of attention heads it works on. Not always place.tp: with more tensor-parallel ranks
        than key/value heads trn1 gives neighbouring ranks different heads.
    dp, pp, tp, tie: all groups of a kind; tie joins the first and the last rank of each pipeline.
    """

    rank: int
    place: Place
    heads: int
    dp: Mesh
    pp: Mesh
    tp: Mesh
    tie: Mesh


def arrange(layout: Layout, kv_heads: int) -> Ranks:
    """Make NxD's groups for a layout; collective over all ranks.

    Args:
        layout: the mesh, of as many ranks as have joined.
        kv_heads: of the model; 0: no heads to share.
    """
    from neuronx_distributed.parallel_layers import parallel_state as state

    if dist.get_world_size() != layout.world:
        raise ValueError(f"{layout} needs {layout.world} ranks, there are {dist.get_world_size()}")
    if state.model_parallel_is_initialized():
        state.destroy_model_parallel()
        state.destroy_kv_group()
    state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp
    )
    rank = dist.get_rank()
    place = Place(
        state.get_data_parallel_rank(),
        state.get_pipeline_model_parallel_rank(),
        state.get_tensor_model_parallel_rank(),
    )
    tp, pp = (
        state.get_tensor_model_parallel_replica_groups(),
        state.get_pipeline_model_parallel_replica_groups(),
    )
    ends = [[group[0], group[-1]] for group in pp if layout.pp > 1]
    alone = sorted(set(range(layout.world)) - {r for group in ends for r in group})
    return Ranks(
        rank=rank,
        place=place,
        heads=_heads(state, layout, kv_heads, rank, next(group for group in tp if rank in group)),
        dp=state.get_data_parallel_replica_groups(),
        pp=pp,
        tp=tp,
        tie=[*ends, *([r] for r in alone)],
    )


def _heads(state: Any, layout: Layout, kv_heads: int, rank: int, own: list[int]) -> int:
    """This rank's run of query heads. NxD decides which ranks share a key/value head: that depends on the
    hardware. A rank's query heads must be those of its key head.
    """
    sharing = layout.tp // kv_heads if kv_heads and layout.tp > kv_heads else 1
    if sharing == 1:
        return own.index(rank)
    state.initialize_kv_group(sharing)
    shared = [g for g in state.get_kv_shared_replica_groups() if g[0] in own]
    if sorted(r for group in shared for r in group) != sorted(own):
        raise heads_not_shared(layout.tp, kv_heads)
    groups = sorted(sorted(own.index(r) for r in group) for group in shared)
    place = own.index(rank)
    number = next(i for i, group in enumerate(groups) if place in group)
    return number * sharing + groups[number].index(place)
