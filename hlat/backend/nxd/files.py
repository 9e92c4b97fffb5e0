"""NxD's own checkpoint files, written by every rank at once: fast, and for this layout alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def save(
    folder: Path,
    tag: str,
    model: dict[str, Any],
    optimizer: dict[str, Any],
    meta: dict[str, Any],
    *,
    sharded: bool,
    keep: int | None = None,
    background: bool = False,
) -> None:
    """Save with NxD; collective.

    Args:
        folder, tag: the checkpoint's place and its name there.
        model, optimizer: nested dicts of tensors; other values are kept as they are. Dicts only: NxD does not
            look into lists.
        meta: JSON values.
        sharded: whether every replica has its own part of `optimizer` (ZeRO-1).
        keep: how many checkpoints to keep.
        background: write while training goes on.
    """
    import neuronx_distributed as nxd

    nxd.save_checkpoint(
        str(folder),
        tag,
        model=model,
        optimizer=optimizer,
        user_content={"meta": json.dumps(meta)},
        use_xser=True,
        num_kept_ckpts=keep,
        async_save=background,
        zero1_optimizer=sharded,
    )


def load(folder: Path, tag: str | None, optimizer: dict[str, Any], *, sharded: bool) -> dict[str, Any]:
    """Load what `save` stored for this rank into the dict `optimizer` (as new tensors); collective. `tag`
    None is the newest complete one. Returns the meta data.

    The weights are not read: they follow from the masters.
    """
    import torch_xla.core.xla_model as xm
    from neuronx_distributed.parallel_layers import parallel_state
    from neuronx_distributed.trainer import checkpoint

    storage = checkpoint.create_checkpoint_storage(str(folder))
    tags = storage.list_completed_checkpoint_tags()
    if tag is None and not tags:
        raise FileNotFoundError(f"no complete checkpoint in {folder}")
    tag = tag or tags[-1]
    # NxD's load_checkpoint tells a sharded optimizer in a dict by the presence of a file of replica 1.
    found = storage.file_exists(f"{tag}/optim/dp_rank_01_tp_rank_00_pp_rank_00.pt")
    content = storage.load_object(f"{tag}/user_content.pt", map_location="cpu")
    if found == sharded or parallel_state.get_data_parallel_size() == 1:
        checkpoint.load_checkpoint(str(folder), tag, optimizer=optimizer)
        xm.mark_step()
    return dict(json.loads(content["meta"]))


def finish() -> None:
    """Wait until everything is on the disk. Call it before the process ends: NxD's own exit handler would
    meet the other ranks after torch.distributed is gone.
    """
    import neuronx_distributed as nxd

    nxd.finalize_checkpoint()
