"""NxD's ZeRO-1: its reduce, update and publish pieces, one by one, so that what lies between them (norm,
guard, clipping) is the training method's own. NxD's `step` does all at once and clips to 1.0 whatever its
configuration says.

Each parameter is padded to a multiple of the replicas along its first dimension and cut into as many runs of
rows. Gradients are summed in fp32 over the micro-batches (`main_grad`, filled by NxD's hooks) and over the
replicas; a shard is the fp32 master of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_BUCKET_MB = 130  # of one reduce-scatter; NxD's own default


class Zero1:
    """`NeuronZero1Optimizer` over this rank's parameters.

    Args:
        groups: optimizer groups; `params` are the model's own parameters.
        optimizer: class of the optimizer of the shards.
        options: its keyword arguments.
        replicas: data-parallel ranks.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        optimizer: type[torch.optim.Optimizer],
        options: dict[str, Any],
        replicas: int,
    ) -> None:
        from neuronx_distributed.optimizer import NeuronZero1Optimizer

        self.nxd = NeuronZero1Optimizer(
            list(groups),
            optimizer,
            optimizer_dtype=torch.float32,
            grad_clipping=False,
            pin_layout=False,
            bucket_cap_mb_all_gather=max(1, _BUCKET_MB // replicas),
            bucket_cap_mb_reduce_scatter=_BUCKET_MB,
            use_grad_acc_hook=True,
            higher_cc_precision=True,
            save_master_weights=True,
            **options,
        )
        # NxD divides by the number of replicas. HLAT's gradients are parts of the global mean: summed.
        self._scheme = [
            {
                "scale_factor": float(replicas),
                "sharding_group": self.nxd.sharding_groups,
                "group_size": replicas,
            }
        ]
        for parameter, shard in self.pairs():
            # Made by NxD in the first backward otherwise: a second graph, and nothing published before it.
            gradient = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            shard.main_grad = parameter.main_grad = gradient  # type: ignore[attr-defined]

    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Every parameter and this rank's shard of it."""
        both = zip(self.nxd.param_groups, self.nxd.base_optimizer.param_groups, strict=True)
        return [pair for a, b in both for pair in zip(a["params"], b["params"], strict=True)]

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the shards."""
        return self.nxd.base_optimizer  # type: ignore[no-any-return]

    def reduce(self) -> None:
        """Sum the gradients over the replicas: each shard's `grad`, fp32, receives its rows."""
        self.nxd._reduce_gradients(sharding_scheme=self._scheme)

    def publish(self) -> None:
        """Round all shards into the parameters, on all replicas."""
        with torch.no_grad():
            self.nxd.allgather_weights_and_update_full_parameter(self._scheme)

    def rows(self, whole: Tensor, index: int) -> Tensor:
        """The rows of a tensor that shard `index` holds, zeros below the last one."""
        size = self._scheme[0]["group_size"]
        length = -(-whole.shape[0] // size)
        out = whole.new_zeros((length, *whole.shape[1:]))
        own = whole[index * length : (index + 1) * length]
        out[: own.shape[0]] = own
        return out
