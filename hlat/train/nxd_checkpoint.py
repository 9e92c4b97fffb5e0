"""Checkpoints in NxD's own files: every rank writes what it holds, as it lies in memory. They load only into
the same layout; `hlat.checkpoint.nxd` turns them into HLAT's, which load anywhere.

The optimizer's part holds, for every bucket, its masters and the optimizer's state, and a table of which
parameters lie where in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hlat.checkpoint.nxd import file_bytes, newest_nxd, open_nxd
from hlat.data.tokenizer_files import kept_name
from hlat.errors import UserError
from hlat.optim.base import create_state
from hlat.train import state

if TYPE_CHECKING:
    from hlat.parallel.buckets import Bucket
    from hlat.train.run import Run

_OWNERS = ("guard", "reducer", "method")


def save(
    run: Run,
    folder: Path,
    *,
    keep: int | None = None,
    background: bool = False,
    tokenizer: Sequence[Path] = (),
) -> str:
    """Save a run, and the files of its tokenizer; collective. Returns the checkpoint's name in the folder.

    See `hlat.backend.nxd.files.save`.
    """
    from hlat.backend.nxd import files

    tag = f"step-{run.step:09d}"
    run.backend.mark_step("checkpoint")
    contents = _contents(run)
    files.save(
        folder,
        tag,
        _weights(run),
        contents,
        {**state.meta(run), "own_scalars": list(state.own_scalars(run.optimizer))},
        sharded=run.backend.layout.zero1 or _apart(contents),
        keep=keep,
        background=background,
        extra={"tokenizer": {kept_name(file): file_bytes(file) for file in tokenizer}},
    )
    return tag


def restore(run: Run, folder: Path, tag: str | None = None) -> None:
    """Put a checkpoint into a run of the same recipe and layout, bitwise; collective.

    Raises:
        UserError: it was saved in another layout, or lacks something.
    """
    from hlat.backend.nxd import files

    found = newest_nxd(folder) if tag is None else open_nxd(folder / tag)
    if found is None:
        raise UserError("no complete checkpoint here", where=str(folder), fix="start from step 0")
    meta = found.meta
    if meta["layout"] != str(run.backend.layout):
        fix = f"run: hlat convert from-nxd {found.path} {folder.parent}; that loads in any layout"
        what = f"NxD's checkpoint was saved as {meta['layout']}, this run is {run.backend.layout}"
        raise UserError(what, where=str(found.path), fix=fix)
    loaded: dict[str, Any] = {}
    files.load(folder, found.path.name, loaded)
    if any(bucket["state"] for bucket in loaded["buckets"].values()):
        create_state(run.optimizer)
    for name, held in run.frozen.items():
        if name in loaded["frozen"]:
            held.make_room(loaded["frozen"][name]["value"].dtype)
    _put(_contents(run), loaded, str(folder))
    for held in run.frozen.values():
        held.take_up()
    state.note_position(run, meta)
    run.publish()
    run.backend.mark_step("checkpoint")


def _apart(contents: dict[str, Any]) -> bool:
    """Whether the replicas differ even without ZeRO-1: a reducer remembers what it did not send."""
    return any(name.startswith("local/") for name in contents["owners"]["reducer"])


def _weights(run: Run) -> dict[str, Tensor]:
    """What the model computes with, by global name."""
    out = {name: held.value for name, held in run.frozen.items()}
    for bucket in run.buckets:
        held = zip(bucket.specs, bucket.computed_with(), strict=True)
        out |= {spec.path: weights.detach() for spec, weights in held}
    return out


def _contents(run: Run) -> dict[str, Any]:
    """The live tensors of everything but the weights."""
    owners: dict[str, dict[str, Tensor]] = {
        kind: getattr(getattr(run, kind), "state", dict)() for kind in _OWNERS
    }
    frozen = {name: {"value": held.kept, "part": _table(held.part)} for name, held in run.frozen.items()}
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
