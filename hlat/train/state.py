"""The state of a run as a checkpoint holds it: tensors by global name, everything else as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import hlat
from hlat.checkpoint.codec import rng_from_json, rng_to_json
from hlat.errors import UserError
from hlat.recipe import identity_diff

if TYPE_CHECKING:
    from hlat.checkpoint.reader import Checkpoint
    from hlat.recipe import Recipe
    from hlat.train.run import Run


def tensors(run: Run) -> dict[str, Tensor]:
    """Every tensor of the run under its global name; views of the live storage, so a load writes into them.

    `model/<parameter>` is the master, `optim/<slot>/<parameter>` an optimizer slot; `optim/<slot>` a scalar
    all parameters share.
    """
    named: dict[str, Tensor] = {}
    bucketed: set[str] = set()
    for bucket in run.buckets:
        for name, view in bucket.named_views(bucket.master.detach()):
            named[f"model/{name}"] = view
            bucketed.add(name)
        for slot, value in run.optimizer.state[bucket.master].items():
            if not torch.is_tensor(value):
                continue
            if value.dim() == 0:
                named.setdefault(f"optim/{slot}", value)
            else:
                named.update((f"optim/{slot}/{name}", view) for name, view in bucket.named_views(value))
    for name, parameter in run.model.named_parameters():
        if name not in bucketed:
            named[f"model/{name}"] = parameter.detach()
    for part, owner in (("guard", run.guard), ("reduce", run.reducer), ("method", run.method)):
        state = owner.state() if hasattr(owner, "state") else {}
        named.update((f"{part}/{name}", value) for name, value in state.items())
    named["run/updates"] = run.updates
    return named


def meta(run: Run) -> dict[str, Any]:
    """Everything that is not a tensor, as JSON values."""
    recipe = run.recipe
    return {
        "step": run.step,
        "tokens": run.step * recipe.tokens_per_step,
        "next_row": run.step * recipe.data.global_batch,
        "recipe": recipe.to_dict(),
        "fingerprint": recipe.fingerprint(),
        "data_fingerprint": run.data.fingerprint,
        "model": recipe.model.model_dump(mode="json"),
        "rng": rng_to_json(),
        "versions": {"hlat": hlat.__version__, "torch": torch.__version__},
    }


def check_same_run(recipe: Recipe, data_fingerprint: str, saved: dict[str, Any], where: str) -> None:
    """Raise UserError if continuing the saved run with this recipe or data would not be a continuation."""
    fresh = "set it back, or start a new run with another run.dir"
    changes = identity_diff(saved.get("recipe", {}), recipe.to_dict())
    if changes:
        key, old, new = changes[0]
        more = f" (and {len(changes) - 1} more changed keys)" if len(changes) > 1 else ""
        raise UserError(
            f"{key} was {old!r} in the saved run and is {new!r} now{more}", where=where, fix=fresh
        )
    if saved.get("data_fingerprint") != data_fingerprint:
        raise UserError(
            "the data is not what the saved run was trained on (its text, order or tokenizer changed)",
            where=where,
            fix="restore the data, or start a new run with another run.dir",
        )


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's state into a run built from the same recipe, bitwise.

    Raises UserError when the checkpoint lacks a tensor, or holds one of another shape.
    """
    checkpoint.load_into(tensors(run))
    first = run.optimizer.state[run.buckets[0].master]
    for bucket in run.buckets[1:]:
        for slot, value in run.optimizer.state[bucket.master].items():
            if torch.is_tensor(value) and value.dim() == 0:
                value.copy_(first[slot])
    run.step = int(checkpoint.meta["step"])
    rng_from_json(checkpoint.meta["rng"])
    run.publish()
