"""The state of a run as a checkpoint holds it: tensors by global name, everything else as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import hlat
from hlat.checkpoint.codec import rng_from_json, rng_to_json
from hlat.checkpoint.piece import piece
from hlat.data.skips import Skips
from hlat.errors import UserError
from hlat.optim.base import create_state
from hlat.recipe import identity_diff
from hlat.train.update import first_other_rate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hlat.backend.host import Direct
    from hlat.checkpoint.reader import Checkpoint
    from hlat.parallel.buckets import Bucket
    from hlat.recipe import Recipe
    from hlat.train.run import Run


_LOCAL = "reduce/local/"  # a reducer's tensors that mean something in the layout they were saved in only


class Turns:
    """Which replica writes each tensor that all of them hold: the one that has the fewest bytes to write so
    far. All replicas ask in the same order and so agree without a message.

    Left to `torch.distributed.checkpoint`, every replica would first copy everything (the copy that a save in
    the background writes from), because duplicates are found only when the plans of all ranks meet.
    """

    def __init__(self, replicas: int, own: int) -> None:
        self.bytes, self.own = [0] * replicas, own

    def mine(self, nbytes: int) -> bool:
        """Whether this replica writes the next tensor, of so many bytes."""
        writer = self.bytes.index(min(self.bytes))
        self.bytes[writer] += nbytes
        return writer == self.own


def tensors(run: Run, memory: Direct | None = None) -> dict[str, Tensor]:
    """What this rank holds of the run's tensors, under their global names: views of the live storage, so a
    load writes into them (or, with `memory`, of what stands for it).

    `model/<parameter>` is the master, `optim/<slot>/<parameter>` an optimizer slot; `optim/<slot>` a scalar
    all parameters share (those that an optimizer lists in `own_scalars` differ by parameter group and are
    named like slots). Where a rank holds a part of a parameter it is a `hlat.checkpoint.piece`. Exactly
    one rank writes each element; whoever else holds it only loads it.
    """
    named: dict[str, Tensor] = {}
    turns, memory = Turns(run.backend.layout.dp, run.backend.place.dp), memory or run.backend.memory()
    for bucket in run.buckets:
        named.update(_named_parts("model", bucket, memory(bucket.master), turns))
        for slot, value in run.optimizer.state[bucket.master].items():
            if not torch.is_tensor(value):
                continue
            if slot in own_scalars(run.optimizer):
                named.update(_named_scalars(f"optim/{slot}", bucket, memory(value), turns))
            elif value.dim() == 0:
                named.setdefault(f"optim/{slot}", memory(value))
            else:
                named.update(_named_parts(f"optim/{slot}", bucket, memory(value), turns))
    for name, held in run.frozen.items():
        flat, part = memory(held.kept).view(-1), held.part
        write = part.primary and turns.mine(flat.nbytes)
        named[f"model/{name}"] = piece(flat, part.shape, part.offset, part.size, 0, flat.numel(), write)
    for kind, owner in (("guard", run.guard), ("reduce", run.reducer), ("method", run.method)):
        state = owner.state() if hasattr(owner, "state") else {}
        named.update((f"{kind}/{name}", memory(value)) for name, value in state.items())
    named["run/updates"] = memory(run.updates)
    return named


def own_scalars(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """State tensors () that are not the same for all parameters."""
    return tuple(getattr(optimizer, "own_scalars", ()))


def _named_scalars(prefix: str, bucket: Bucket, value: Tensor, turns: Turns) -> Iterator[tuple[str, Tensor]]:
    """A bucket's scalar under the name of each of its parameters: another layout has other buckets."""
    for spec in bucket.specs:
        write = spec.part.primary and not any(spec.part.offset) and turns.mine(value.nbytes)
        yield f"{prefix}/{spec.name}", piece(value.view(1), (1,), (0,), (1,), 0, 1, write)


def _named_parts(prefix: str, bucket: Bucket, flat: Tensor, turns: Turns) -> Iterator[tuple[str, Tensor]]:
    """Name and piece of each parameter in a tensor that lies like the bucket's master."""
    if flat.shape != bucket.master.shape:
        raise UserError(
            f"state '{prefix}' has shape {list(flat.shape)} for a parameter of {list(bucket.master.shape)}",
            where="optim.name",
            fix="take an optimizer whose state has one element for each of the parameter",
        )
    everywhere = flat.numel() == bucket.length  # every replica holds all of it, unless ZeRO-1 cut it
    for spec, where, skip in bucket.runs():
        run, part = flat.view(-1)[where], spec.part
        write = part.primary and (not everywhere or turns.mine(run.nbytes))
        last = skip + run.numel()
        yield f"{prefix}/{spec.name}", piece(run, part.shape, part.offset, part.size, skip, last, write)


def meta(run: Run) -> dict[str, Any]:
    """Everything that is not a tensor, as JSON values."""
    recipe = run.recipe
    return {
        "step": run.step,
        "tokens": run.step * recipe.tokens_per_step,
        "tasks_due": run.tasks_due,
        "next_row": (run.skips.position(run.step + 1) - 1) * recipe.data.global_batch,
        "skipped_data": [list(stretch) for stretch in run.skips.found],
        "recipe": recipe.to_dict(),
        "fingerprint": recipe.fingerprint(),
        "data_fingerprint": run.data.fingerprint,
        "content": dict(run.content),
        "model": recipe.model.model_dump(mode="json"),
        "provenance": run.provenance.to_json(),
        "layout": str(run.backend.layout),
        "rng": rng_to_json(),
        "versions": {"hlat": hlat.__version__, "torch": torch.__version__},
    }


def check_same_run(recipe: Recipe, data_fingerprint: str, saved: dict[str, Any], where: str) -> None:
    """Raise UserError if continuing the saved run with this recipe or data would not be a continuation."""
    fresh = "set it back, or start a new run with another run.dir"
    former = saved.get("recipe", {})
    changes = identity_diff(former, recipe.to_dict())
    other = None
    if any(key.startswith("schedule.") for key, _, _ in changes):
        # What counts is which rates the steps so far had, not what the schedule is called or where it ends.
        other = first_other_rate(former, recipe, int(saved["step"]))
        if other is None:
            changes = [change for change in changes if not change[0].startswith("schedule.")]
    if changes:
        key, old, new = changes[0]
        more = f" (and {len(changes) - 1} more changed keys)" if len(changes) > 1 else ""
        if key == "schedule.horizon_steps" and recipe.schedule.horizon_steps is None:
            # The user set run.steps, which the schedule follows; a run may be longer when that is fixed.
            what = f"run.steps is {new} now and the schedule ends with it; in the saved run it ended at {old}"
            what += f", so that step {other} and later ones had other rates"
            fix = f"add schedule.horizon_steps={old} to train on with the schedule as it was"
            fix += ", or start a new run with another run.name or run.dir"
            raise UserError(f"{what}{more}", where=where, fix=fix)
        if key == "precision.rounding":  # its default was nearest whatever is kept in bf16
            fresh = f"write {key}={old} to go on as it was, or start a new run with another run.dir"
        raise UserError(
            f"{key} was {old!r} in the saved run and is {new!r} now{more}", where=where, fix=fresh
        )
    if saved.get("data_fingerprint") != data_fingerprint:
        raise UserError(
            "the data is not what the saved run was trained on (its text, order or tokenizer changed)",
            where=where,
            fix="restore the data, or start a new run with another run.dir",
        )
    found, given = _found(saved), former.get("data", {}).get("skip", ())
    then, now = Skips(tuple(map(tuple, given)), found), Skips(recipe.data.skip, found)
    read = then.position(int(saved["step"]))
    if then.until(read) != now.until(read):
        raise UserError(
            f"the saved run has read the data up to step {read}, and up to there left out "
            f"{then.until(read)}, not {now.until(read)}",
            where=f"{where}: data.skip",
            fix="leave out only what comes later, or continue from an earlier checkpoint",
        )


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's state into a run built from the same recipe, in whichever layout; bitwise. Every
    rank calls it.

    Raises UserError when the checkpoint lacks a tensor, or holds one of another shape, or one that no rank
    has a place for. What a reducer keeps for one layout alone (`local/...` in its state) is loaded in that
    layout; in another one the reducer is told to forget it.
    """
    if any(name.startswith("optim/") for name in checkpoint.names()):
        create_state(run.optimizer)
    for name, held in run.frozen.items():
        if f"model/{name}" in checkpoint.names():
            held.make_room(checkpoint.dtype(f"model/{name}"))
    memory = run.backend.memory()
    wanted = tensors(run, memory)
    change = _layout_change(run, checkpoint, wanted)
    if change:
        wanted = {name: tensor for name, tensor in wanted.items() if not name.startswith(_LOCAL)}
        run.reducer.forget(change)
    checkpoint.load_into(wanted, ignore=_LOCAL if change else "")
    memory.put_back()
    for held in run.frozen.values():
        held.take_up()
    states = [run.optimizer.state[bucket.master] for bucket in run.buckets]
    for state in states[1:]:
        for slot, value in state.items():
            if torch.is_tensor(value) and value.dim() == 0 and slot not in own_scalars(run.optimizer):
                value.copy_(states[0][slot])
    note_position(run, checkpoint.meta)
    rng_from_json(checkpoint.meta["rng"])
    run.publish()
    run.backend.mark_step("checkpoint")


def note_position(run: Run, saved: dict[str, Any]) -> None:
    """Take over where a saved run was: its step, and what it had found to leave out of the data."""
    run.step = int(saved["step"])
    run.skips = Skips(run.recipe.data.skip, _found(saved))
    run.tasks_due = bool(saved.get("tasks_due"))


def same_course(run: Run, saved: dict[str, Any]) -> bool:
    """Whether a saved run has read the same data as this one up to where it was saved."""
    read = run.skips.position(int(saved["step"]))
    return Skips(run.recipe.data.skip, _found(saved)).until(read) == run.skips.until(read)


def _found(saved: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    return tuple((int(first), int(last)) for first, last in saved.get("skipped_data", ()))


def _layout_change(run: Run, checkpoint: Checkpoint, wanted: dict[str, Tensor]) -> str:
    """Why a reducer's local tensors cannot be loaded, the same on every rank; empty when they can or there
    are none.
    """
    own = [name for name in wanted if name.startswith(_LOCAL)]
    stored = {name for name in checkpoint.names() if name.startswith(_LOCAL)}
    layout, saved = str(run.backend.layout), str(checkpoint.meta.get("layout"))
    text = f"saved as {saved}, this is {layout}"
    changed = saved.partition(",")[0] != layout.partition(",")[0]  # with or without ZeRO-1 it is the same
    now, then = run.recipe.to_dict()["parallel"], checkpoint.meta["recipe"].get("parallel", {})
    changed |= any(now[key] != then.get(key, now[key]) for key in ("schedule", "stages", "cuts"))
    fits = all(name in stored and checkpoint.shape(name) == wanted[name].shape for name in own)
    bad = torch.tensor([changed and bool(own or stored), not fits], dtype=torch.float32)
    changed, unfit = (run.backend.all_reduce(bad.to(run.backend.device)) > 0).tolist()
    return text if changed else "saved with other buckets" if unfit else ""
