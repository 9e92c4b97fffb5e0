"""NxD's own checkpoint files, written by every rank at once: fast, and for this layout alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hlat.errors import SaveFailed, UserError


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
    extra: dict[str, Any] | None = None,
) -> None:
    """Save with NxD; collective. In the background it is complete only after `finish` or the next save.

    Args:
        folder, tag: the checkpoint's place and its name there.
        model, optimizer: nested dicts of tensors; other values are kept as they are. Dicts only: NxD does not
            look into lists.
        meta: JSON values.
        sharded: whether every replica has its own part of `optimizer` (ZeRO-1).
        keep: how many checkpoints to keep.
        background: write while training goes on. The same in all saves of a process: NxD keeps the first.
        extra: more for the file of the meta data: dicts of tensors.

    Raises:
        SaveFailed: the disk is full or cannot be written. What was complete before is untouched.
    """
    import neuronx_distributed as nxd

    if dist.get_rank() == 0:  # NxD would call it complete while it is written again
        (folder / tag / "done").unlink(missing_ok=True)
    with _explained(folder):
        nxd.save_checkpoint(
            str(folder),
            tag,
            model=model,
            optimizer=optimizer,
            user_content={"meta": json.dumps(meta), **(extra or {})},
            use_xser=True,
            num_kept_ckpts=keep,
            async_save=background,
            zero1_optimizer=sharded,
        )


def load(folder: Path, tag: str, optimizer: dict[str, Any]) -> None:
    """Load what `save` stored for this rank, in the same layout, into the dict `optimizer` (as new tensors);
    collective.

    The weights are not read: they follow from the masters.

    Raises:
        UserError: a file is damaged or missing.
    """
    import torch_xla.core.xla_model as xm
    from neuronx_distributed.trainer import checkpoint

    try:
        checkpoint.load_checkpoint(str(folder), tag, optimizer=optimizer)
    except (OSError, RuntimeError, EOFError) as error:
        what = f"NxD's checkpoint cannot be read ({str(error).splitlines()[0]})"
        fix = "move this folder away: the run then continues from the checkpoint before it"
        raise UserError(what, where=str(folder / tag), fix=fix) from error
    xm.mark_step()


def finish(folder: Path) -> None:
    """Wait for what `save` writes in the background and mark it complete; collective. Raises what `save`
    raises.

    Call it before the process ends: NxD's own exit handler would meet the other ranks after
    torch.distributed is gone.
    """
    import neuronx_distributed as nxd

    with _explained(folder):
        nxd.finalize_checkpoint()


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn a failure to write into a SaveFailed."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(folder).free if folder.is_dir() else 0
        what = f"NxD's checkpoint was not saved ({error.strerror or error}; {free / 1e9:.1f} GB free)"
        fix = "make room, or set checkpoint.keep lower or run.dir elsewhere, then start again"
        raise SaveFailed(what, where=str(folder), fix=fix) from error
