"""Turning checkpoints in NxD's files (`hlat.train.nxd_checkpoint`) into HLAT's. One process, no NxD.

Every rank's file holds flat tensors and a table of which parameters lie where; the whole parameters are put
together from all of them, one kind at a time.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hlat.checkpoint.store import CheckpointStore
from hlat.data.tokenizer_files import place_in
from hlat.errors import UserError
from hlat.observe.lock import Lock

_RANK = re.compile(r"dp_rank_(\d+)_tp_rank_(\d+)_pp_rank_(\d+)\.pt")


class _Reference:
    """Stands in a file for a tensor that has a file of its own."""

    tid: int


@dataclass(frozen=True)
class NxdFolder:
    """A complete checkpoint in NxD's files.

    Attributes:
        path: its folder, which holds `done`.
        step: optimizer steps done.
        meta: see `hlat.train.state.meta`.
        tokenizer: its files by name, uint8 (bytes,).
    """

    path: Path
    step: int
    meta: dict[str, Any]
    tokenizer: dict[str, Tensor]


def open_nxd(path: Path) -> NxdFolder:
    """Open one checkpoint without reading its tensors. Raises UserError if it is not a complete one."""
    fix = "name a run folder, or a folder that holds the files done, optim/ and user_content.pt"
    if not (path / "done").exists() or not (path / "optim").is_dir():
        raise UserError("not a complete NxD checkpoint", where=str(path), fix=fix)
    try:
        content = _load(path / "user_content.pt")
        meta = json.loads(content["meta"])
        return NxdFolder(path, int(meta["step"]), meta, content.get("tokenizer", {}))
    except Exception as error:  # torch.load fails in many ways
        what = f"not a checkpoint that HLAT wrote with NxD ({error!r})"
        raise UserError(what, where=str(path), fix=fix) from error


def newest_nxd(folder: Path) -> NxdFolder | None:
    """The complete checkpoint of the latest step in a folder of them; None if there is none."""
    done = [path.parent for path in folder.glob("step-*/done")]
    return open_nxd(max(done, key=lambda path: int(path.name.removeprefix("step-")))) if done else None


def unfinished_nxd(folder: Path) -> list[str]:
    """Names of the checkpoints in a folder of them that are not marked as complete, sorted."""
    return sorted(
        path.name for path in folder.glob("step-*") if path.is_dir() and not (path / "done").exists()
    )


def file_bytes(file: Path) -> Tensor:
    """A file as a tensor, uint8 (bytes,)."""
    return torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)


def from_nxd(source: str | Path, run: str | Path) -> list[str]:
    """Write a checkpoint in NxD's files as one of HLAT's: it continues in any layout, on any backend.

    Args:
        source: folder of the checkpoint, or a run folder (its newest one).
        run: run folder, to which it is added; created if need be.

    Returns:
        Warnings.

    Raises:
        UserError: a source that is not complete, or a process trains in the run folder.
    """
    source = Path(source)
    inside = source / "nxd-checkpoints"
    found = newest_nxd(inside if inside.is_dir() else source) or open_nxd(source)
    wholes = read_nxd(found)
    Path(run).mkdir(parents=True, exist_ok=True)
    lock = Lock(Path(run))
    try:
        store = CheckpointStore(Path(run) / "checkpoints", keep=1 << 30, claim=lock)
        with tempfile.TemporaryDirectory() as folder:
            files = [place_in(Path(folder), name) for name in found.tokenizer]
            for file, content in zip(files, found.tokenizer.values(), strict=True):
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(content.numpy().tobytes())
            store.save(found.step, wholes, found.meta, int(found.meta["tokens"]), tokenizer=files, wait=True)
    finally:
        lock.release()
    return []


def read_nxd(checkpoint: NxdFolder) -> dict[str, Tensor]:
    """Whole tensors under HLAT's names (see `hlat.train.state.tensors`).

    Raises:
        UserError: the files of a rank are missing, or one cannot be read. (They have no checksums: bytes that
            were changed are not noticed.)
    """
    wholes: dict[str, Tensor] = {}
    filled: dict[str, int] = {}
    for file in sorted(f for f in (checkpoint.path / "optim").iterdir() if _RANK.fullmatch(f.name)):
        content = _of_rank(file)
        for name, shape, box, skip, flat in _runs(content):
            if name not in wholes:
                wholes[name], filled[name] = torch.zeros(shape, dtype=flat.dtype), 0
            index = torch.arange(math.prod(shape)).view(shape)[box].reshape(-1)
            wholes[name].view(-1)[index[skip : skip + flat.numel()]] = flat
            filled[name] += flat.numel()
        for name, value in _scalars(content, checkpoint.meta.get("own_scalars", ())):
            wholes.setdefault(name, value)
    for name, count in filled.items():
        if count < wholes[name].numel():
            what = f"{wholes[name].numel() - count} elements of '{name}' are missing"
            raise UserError(what, where=str(checkpoint.path), fix="copy the files of all ranks")
    return wholes


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


def _scalars(content: dict[str, Any], own: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """What is not cut: the state of all parameters together, that of each (`own`), of guard and reducer."""
    for bucket in content["buckets"].values():
        for slot, value in bucket["state"].items():
            if slot in own:
                yield from ((f"optim/{slot}/{name}", value.view(1)) for name in bucket["specs"])
            elif not value.dim():
                yield f"optim/{slot}", value
    for owner, values in content["owners"].items():
        kind = "reduce" if owner == "reducer" else owner
        yield from ((f"{kind}/{name}", value) for name, value in values.items())
    yield "run/updates", content["updates"]


def _box(spec: dict[str, Any]) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(spec["offset"], spec["size"], strict=True))


def _of_rank(file: Path) -> Any:
    try:
        return _resolve(_load(file), Path(f"{file}.tensors"))
    except Exception as error:  # torch.load fails in many ways
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"cannot be read ({reason})", where=str(file), fix="copy it again") from error


def _load(file: Path) -> Any:
    allowed: list[Any] = [(_Reference, "torch_xla.utils.serialization.TensorReference")]
    with torch.serialization.safe_globals(allowed):
        return torch.load(file, map_location="cpu", weights_only=True)


def _resolve(value: Any, folder: Path) -> Any:
    """Nested dicts with every reference replaced by its tensor."""
    if isinstance(value, dict):
        return {key: _resolve(item, folder) for key, item in value.items()}
    return _load(folder / f"tensor_{value.tid}.pt") if isinstance(value, _Reference) else value
