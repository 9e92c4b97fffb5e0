"""Whether what is about to be held fits the memory there is: said in a line before anything is allocated.

Only what cannot fit at all is refused: more than all the memory of the machine, of this process's control
groups, or of the GPU. Whether other programs leave enough of it is not known before.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hlat.errors import UserError
from hlat.host.limits import memory

if TYPE_CHECKING:
    import torch


def check_fits(size: int, device: torch.device, what: str, where: str, fix: str = "") -> None:
    """Raise UserError where `size` bytes in this process, and as many in each other one of its launcher on
    this machine, are more than the memory of a CPU or CUDA device; other devices are not asked.

    Args:
        what: what needs so much ("the model's weights in fp32").
    """
    shared = local_ranks() if device.type == "cpu" else 1
    total = _total(device)
    if total is None or size * shared <= total:
        return
    times = f" in each of {shared} processes" if shared > 1 else ""
    place = "this machine" if device.type == "cpu" else str(device)
    raise UserError(
        f"{what} take {readable(size)}{times}, and {place} has {readable(total)} of memory",
        where=where,
        fix=fix,
    )


def local_ranks() -> int:
    """Processes that a launcher has started on this machine, 1 or more."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(text)) if text.isascii() and text.isdecimal() and len(text) < 6 else 1


def readable(size: int) -> str:
    """Bytes in GB, or in MB where they are few."""
    return f"{size / 1e9:,.1f} GB" if size >= 10**9 else f"{size / 1e6:,.1f} MB"


def _total(device: torch.device) -> int | None:
    if device.type == "cpu":
        found = memory()
        return None if found is None else found.total
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    return None
