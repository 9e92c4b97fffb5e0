"""What NxD and trn1 cannot do, as far as a recipe and the number of cores tell: asked on any machine.

`check_recipe` holds wherever NxD runs, `check_cores` and `check_nodes` on trn1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hlat.backend.neuron.table import TP_ON_TRN1
from hlat.errors import UserError

if TYPE_CHECKING:
    from hlat.recipe import Recipe

FLASH_ROWS = 2048  # positions NxD's flash kernel works on at a time
SPREAD_TP = 4  # of this size NxD makes groups of cores that lie apart, within a node


def flash_unfit(seq_len: int, document_mask: bool) -> str:
    """Why NxD's flash kernel cannot work on such rows, in a line; empty when it can."""
    if document_mask:
        return "NxD's flash kernel takes no mask, and data.document_mask is true"
    if seq_len % FLASH_ROWS:
        return f"NxD's flash kernel works on rows of {FLASH_ROWS} positions, and data.seq_len is {seq_len}"
    return ""


def flash_refused(reason: str) -> UserError:
    """The error for `model.attention: flash` where the kernel cannot be used."""
    return UserError(reason, where="model.attention", fix="write model.attention=auto, or plain")


def check_recipe(recipe: Recipe) -> None:
    """Raise UserError for what NxD cannot do, whatever it runs on."""
    section = recipe.parallel
    if recipe.objective.name == "classification":
        fix = "write backend=native, or objective.name=causal_lm"
        raise UserError("classification has not been proven on NxD", where="objective.name", fix=fix)
    if section.pp > 1 and (section.schedule != "1f1b" or section.stages > 1):
        what = f"NxD runs pipelines as 1f1b with one stage a rank, not {section.schedule}"
        fix = "write parallel.schedule=1f1b and parallel.stages=1"
        raise UserError(what, where="parallel.schedule", fix=fix)
    if recipe.model.attention == "flash":
        reason = flash_unfit(recipe.data.seq_len, recipe.data.document_mask)
        if reason:
            raise flash_refused(reason)
    check_vocab(recipe.model.vocab, section.tp)


def check_vocab(vocab: int, tp: int) -> None:
    """Raise UserError for a vocabulary that does not divide over the tensor-parallel ranks."""
    if vocab % tp:
        what, fix = f"NxD cannot cut vocab {vocab} over tp {tp}", f"take model.vocab {-(-vocab // tp) * tp}"
        raise UserError(what, where="model.vocab", fix=fix)


def check_cores(recipe: Recipe, cores: int) -> None:
    """Raise UserError for tensor parallelism that trn1 has no rings for, or NxD no groups.

    Args:
        cores: processes on a node, one a core.
    """
    tp, kv_heads = recipe.parallel.tp, recipe.model.kv_heads
    if tp not in TP_ON_TRN1:
        near = min(TP_ON_TRN1, key=lambda size: abs(size - tp))
        possible = ", ".join(map(str, TP_ON_TRN1))
        what = f"trn1 has no ring of {tp} cores"
        raise UserError(what, where="parallel.tp", fix=f"take tp {near} (possible: {possible})")
    if tp == SPREAD_TP != cores and kv_heads < tp:
        raise heads_not_shared(tp, kv_heads)


def heads_not_shared(tp: int, kv_heads: int) -> UserError:
    """The error for more ranks than key/value heads where NxD's groups of both do not go together."""
    what = f"NxD cannot share key/value heads at tp {tp} here"
    fix = f"take a tp that divides kv_heads {kv_heads}, or one above {SPREAD_TP}"
    return UserError(what, where="parallel.tp", fix=fix)


def check_nodes(recipe: Recipe, nodes: int, cores: int) -> None:
    """Raise UserError where NxD cannot spread the pipeline over so many nodes.

    With tp 4 the groups of a node fill it, each with a replica of the same stage.
    """
    tp, pp = recipe.parallel.tp, recipe.parallel.pp
    if tp == SPREAD_TP < cores and nodes % pp:
        what = f"with tp {tp} NxD gives every pipeline stage whole nodes: pp {pp} does not divide {nodes}"
        fix = "take another tp, or a multiple of pp nodes"
        raise UserError(what, where="parallel.pp", fix=fix)
