"""Checkpoints in NxD's own files: every rank writes what it holds, as it lies in memory. They load only into
the same layout; `hlat.checkpoint.nxd` turns them into HLAT's, which load anywhere.

The optimizer's part holds, for every bucket, its masters and the optimizer's state, and a table of which
parameters lie where in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hlat.errors import UserError
from hlat.train import state

if TYPE_CHECKING:
    from hlat.parallel.buckets import Bucket
    from hlat.train.run import Run

_OWNERS = ("guard", "reducer", "method")


def save(run: Run, folder: Path, *, keep: int | None = None, background: bool = False) -> str:
    """Save a run; collective. Returns the checkpoint's name in the folder."""
    from hlat.backend.nxd import files

    tag = f"step-{run.step:09d}"
    run.backend.mark_step("checkpoint")
    sharded = run.backend.layout.zero1
    files.save(
        folder,
        tag,
        _weights(run),
        _contents(run),
        {**state.meta(run), "zero1": sharded},
        sharded=sharded,
        keep=keep,
        background=background,
    )
    return tag


def restore(run: Run, folder: Path, tag: str | None = None) -> None:
    """Put a checkpoint into a run of the same recipe and layout, bitwise; collective.

    Raises:
        UserError: it was saved in another layout, or lacks something.
    """
    from hlat.backend.nxd import files

    loaded: dict[str, Any] = {}
    meta = files.load(folder, tag, loaded, sharded=run.backend.layout.zero1)
    if meta["layout"] != str(run.backend.layout):
        fix = "convert it to an HLAT checkpoint, which loads in any layout"
        what = f"NxD's checkpoint was saved as {meta['layout']}, this run is {run.backend.layout}"
        raise UserError(what, where=str(folder), fix=fix)
    _put(_contents(run), loaded, str(folder))
    run.step = int(meta["step"])
    run.publish()
    run.backend.mark_step("checkpoint")


def _weights(run: Run) -> dict[str, Tensor]:
    """What the model computes with, by global name."""
    out = {name: value for name, (value, _) in run.frozen.items()}
    for bucket in run.buckets:
        held = zip(bucket.specs, bucket.computed_with(), strict=True)
        out |= {spec.path: weights.detach() for spec, weights in held}
    return out


def _contents(run: Run) -> dict[str, Any]:
    """The live tensors of everything but the weights."""
    owners = {kind: owner.state() for kind in _OWNERS if hasattr(owner := getattr(run, kind), "state")}
    frozen = {name: {"value": value, "part": _table(part)} for name, (value, part) in run.frozen.items()}
    return {
        "buckets": {str(i): _bucket(run, bucket) for i, bucket in enumerate(run.buckets)},
        "owners": owners,
        "frozen": frozen,
        "updates": run.updates,
    }


def _bucket(run: Run, bucket: Bucket) -> dict[str, Any]:
    slots = run.optimizer.state[bucket.master]
    return {
        "master": bucket.master.detach(),
        "state": {name: value for name, value in slots.items() if torch.is_tensor(value)},
        "first": bucket.first,
        "specs": {
            spec.name: {**_table(spec.part), "at": spec.offset, "primary": spec.part.primary}
            for spec in bucket.specs
        },
    }


def _table(part: Any) -> dict[str, Any]:
    return {"shape": list(part.shape), "offset": list(part.offset), "size": list(part.size)}


def _put(live: dict[str, Any], loaded: dict[str, Any], where: str) -> None:
    for name, value in live.items():
        if name not in loaded:
            raise UserError(f"NxD's checkpoint has no '{name}'", where=where, fix="take another checkpoint")
        if torch.is_tensor(value):
            with torch.no_grad():
                value.copy_(loaded[name])
        elif isinstance(value, dict):
            _put(value, loaded[name], f"{where}/{name}")
        elif value != loaded[name]:
            what = f"'{name}' is {loaded[name]} in NxD's checkpoint and {value} in this run"
            raise UserError(what, where=where, fix="convert it to an HLAT checkpoint, which loads anywhere")
