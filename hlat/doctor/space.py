"""Whether the disk has room for the checkpoints a recipe keeps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hlat.checkpoint.folder import entries, step_folders
from hlat.checkpoint.retention import most_at_once
from hlat.doctor.finding import Finding
from hlat.doctor.machine import Machine
from hlat.registry import lookup

if TYPE_CHECKING:
    from hlat.recipe import Recipe

_BYTES = {"fp32": 4, "bf16": 2}
_SLOTS = 2  # of an optimizer that does not say


def checkpoint_bytes(recipe: Recipe) -> int:
    """About the size of a checkpoint: weights (the masters if there are any) and the optimizer's slots."""
    precision, optim = recipe.precision, recipe.optim
    weight = 4 if precision.master == "fp32" else _BYTES[precision.compute]
    slots = len(getattr(lookup("optim", optim.name, "optim.name"), "slots", ())) or _SLOTS
    return recipe.model.parameter_count() * (weight + slots * _BYTES[precision.states])


def check(machine: Machine, recipe: Recipe) -> Finding:
    """Room for the checkpoints that the disk holds at once (`most_at_once`), less those there are; permanent
    ones take none of this room.
    """
    name, folder = "disk.checkpoints", Path(recipe.run.dir) / "checkpoints"
    if "://" in recipe.run.dir:
        return Finding(name, "ok", f"checkpoints go to {recipe.run.dir}")
    kept = {step: _size(path) for step, path in step_folders(folder).items()} if folder.is_dir() else {}
    one = kept[max(kept)] if kept else checkpoint_bytes(recipe)
    permanent = {entry.step for entry in entries(folder) if entry.permanent}
    count = most_at_once(recipe.checkpoint.keep, recipe.checkpoint.remote is not None)
    free = machine.free(folder)
    wanted = max(one, count * one - sum(size for step, size in kept.items() if step not in permanent))
    size = f"{'' if kept else 'about '}{one / 1e9:,.2f} GB"
    fact = f"{count} checkpoints of {size} need {wanted / 1e9:,.2f} GB more"
    if free is None or free >= wanted:
        return Finding(name, "ok", f"{fact}; {(free or 0) / 1e9:,.2f} GB are free")
    advice = "make room, lower checkpoint.keep, or choose another run.dir"
    status = "fail" if free < one else "warn"
    return Finding(name, status, f"{fact}, only {free / 1e9:,.2f} GB are free", advice=advice)  # type: ignore[arg-type]


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue  # deleted meanwhile
    return total
