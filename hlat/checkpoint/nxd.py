"""Turning checkpoints in NxD's files (`hlat.train.nxd_checkpoint`) into HLAT's. One process, no NxD.

Every rank's file holds flat tensors and a table of which parameters lie where; the whole parameters are put
together from all of them, one kind at a time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hlat.checkpoint.store import CheckpointStore
from hlat.errors import UserError

_RANK = re.compile(r"dp_rank_(\d+)_tp_rank_(\d+)_pp_rank_(\d+)\.pt")


class _Reference:
    """Stands in a file for a tensor that has a file of its own."""

    tid: int


def from_nxd(source: str | Path, run: str | Path) -> list[str]:
    """Write a checkpoint in NxD's files as one of HLAT's: it continues in any layout, on any backend.

    Args:
        source: folder of the checkpoint.
        run: run folder, to which it is added; created if need be.

    Returns:
        Warnings.

    Raises:
        UserError: a source that is not complete.
    """
    wholes, meta = read_nxd(Path(source))
    store = CheckpointStore(Path(run) / "checkpoints", keep=1 << 30)
    store.save(int(meta["step"]), wholes, meta, int(meta["tokens"]), wait=True)
    return ["the tokenizer is not in NxD's checkpoints: copy it from the run that wrote it"]


def read_nxd(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Whole tensors under HLAT's names (see `hlat.train.state.tensors`), and the meta data.

    Args:
        folder: one checkpoint, the folder that holds `done`.

    Raises:
        UserError: not such a folder, or one that lacks a rank.
    """
    fix = "name a folder that holds the files done, optim/ and user_content.pt"
    if not (folder / "done").exists() or not (folder / "optim").is_dir():
        raise UserError("not a complete NxD checkpoint", where=str(folder), fix=fix)
    meta = json.loads(_load(folder / "user_content.pt")["meta"])
    wholes: dict[str, Tensor] = {}
    filled: dict[str, int] = {}
    for file in sorted(f for f in (folder / "optim").iterdir() if _RANK.fullmatch(f.name)):
        content = _resolve(_load(file), Path(f"{file}.tensors"))
        for name, shape, box, skip, flat in _runs(content):
            if name not in wholes:
                wholes[name], filled[name] = torch.zeros(shape, dtype=flat.dtype), 0
            index = torch.arange(math.prod(shape)).view(shape)[box].reshape(-1)
            wholes[name].view(-1)[index[skip : skip + flat.numel()]] = flat
            filled[name] += flat.numel()
        for name, value in _scalars(content):
            wholes.setdefault(name, value)
    for name, count in filled.items():
        if count < wholes[name].numel():
            what = f"{wholes[name].numel() - count} elements of '{name}' are missing"
            raise UserError(what, where=str(folder), fix="copy the files of all ranks")
    return wholes, meta


def _runs(content: dict[str, Any]) -> Iterator[tuple[str, list[int], tuple[slice, ...], int, Tensor]]:
    """(name, whole shape, rectangle, elements of it before, elements) of each piece a rank holds."""
    for bucket in content["buckets"].values():
        tensors = {"model": bucket["master"]}
        tensors |= {f"optim/{slot}": v for slot, v in bucket["state"].items() if v.dim()}
        first, last = bucket["first"], bucket["first"] + bucket["master"].numel()
        for name, spec in bucket["specs"].items():
            if not spec["primary"]:
                continue
            start = max(spec["at"], first)
            stop = min(spec["at"] + math.prod(spec["size"]), last)
            for kind, flat in tensors.items():
                if start < stop:
                    run = flat.reshape(-1)[start - first : stop - first]
                    yield f"{kind}/{name}", spec["shape"], _box(spec), start - spec["at"], run
    for name, frozen in content["frozen"].items():
        part = frozen["part"]
        yield f"model/{name}", part["shape"], _box(part), 0, frozen["value"].reshape(-1)


def _scalars(content: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """What all ranks hold alike."""
    for bucket in content["buckets"].values():
        yield from ((f"optim/{slot}", v) for slot, v in bucket["state"].items() if not v.dim())
    for owner, values in content["owners"].items():
        kind = "reduce" if owner == "reducer" else owner
        yield from ((f"{kind}/{name}", value) for name, value in values.items())
    yield "run/updates", content["updates"]


def _box(spec: dict[str, Any]) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(spec["offset"], spec["size"], strict=True))


def _load(file: Path) -> Any:
    allowed: list[Any] = [(_Reference, "torch_xla.utils.serialization.TensorReference")]
    with torch.serialization.safe_globals(allowed):
        return torch.load(file, map_location="cpu", weights_only=True)


def _resolve(value: Any, folder: Path) -> Any:
    """Nested dicts with every reference replaced by its tensor."""
    if isinstance(value, dict):
        return {key: _resolve(item, folder) for key, item in value.items()}
    return _load(folder / f"tensor_{value.tid}.pt") if isinstance(value, _Reference) else value
