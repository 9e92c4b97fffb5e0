"""What a run began from, and what it adds to that: the record its checkpoints carry, and what is said when
the recipe and the weights do not agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from hlat.backend.precision import DTYPES
from hlat.checkpoint.provenance import (
    DOCUMENTS,
    EXAMPLES,
    Provenance,
    provenance_of,
    recorded,
    template_digest,
)
from hlat.checkpoint.weights import PREFIX, source_name, source_tokenizer
from hlat.data.convention import difference, extends
from hlat.data.packed import TokenFolder, holdout_threshold
from hlat.data.sources import STDLIB
from hlat.errors import UserError
from hlat.train.initial import source_for

if TYPE_CHECKING:
    from hlat.checkpoint.weights import WeightSource
    from hlat.recipe import Recipe


def origin_of(recipe: Recipe, saved: Mapping[str, Any] | None) -> Provenance | None:
    """The record that a run goes on from: of the meta of its own checkpoint, else of `init.from`. None for a
    run that begins from a seed, or that an earlier version began.
    """
    if saved is not None:
        return recorded(saved, recipe.run.dir)
    if recipe.init.from_ is None:
        return None
    source, _ = source_for(recipe)
    record = provenance_of(source)
    dtype = str(_widest(source)).removeprefix("torch.")
    if "huggingface" in source.meta and record.ancestors:  # an export: the run behind it is the last of them
        return replace(record, dtype=dtype)
    return replace(record, dtype=dtype, ancestors=(*record.ancestors, source_name(source)))


def record_of(recipe: Recipe, data: Any, origin: Provenance | None) -> Provenance:
    """The record of a run that trains on `data`."""
    began, tokenizer = origin or Provenance(), getattr(data, "tokenizer", None)
    if tokenizer is None:  # made-up data, in tests
        return began
    convention, bos = tokenizer.convention, getattr(data, "bos_id", None)
    if bos is not None and convention.bos is None:  # tokenized with BOS beforehand
        convention = replace(convention, bos=bos, empty=bos)
    if getattr(data, "marks", False) and not convention.special:
        convention = replace(convention, template=True)
    record = replace(
        began,
        convention=convention,
        tokenizer=tokenizer.identity,
        chat_template=template_digest(tokenizer.kept_files()),
        files=_files(began if convention.special else Provenance(), data),
    )
    return record.holding_out(shares(recipe, data))


def _files(began: Provenance, data: Any) -> Mapping[str, Any]:
    """The parts of Hugging Face's files, where the token that ends an answer of conversations ends a text."""
    end, eos = getattr(data, "turn_end", None), data.tokenizer.eos_id
    if end is None or end == eos:
        return began.files
    generation = dict(began.files.get("generation_config") or {})
    known = generation.get("eos_token_id", eos)
    stops = {*(known if isinstance(known, list) else [known]), end} - {None}
    return {**began.files, "generation_config": {**generation, "eos_token_id": sorted(stops)}}


def shares(recipe: Recipe, data: Any) -> dict[str, float]:
    """The share of its data that a run holds out, by kind: see `Provenance.held_out`. All that hashes decide:
    examples with held-out ones of their own are all trained on.
    """
    section = recipe.data.examples
    if section is not None:
        kind = f"{EXAMPLES} by {section.group_field}" if section.group_field else EXAMPLES
        return {kind: 0.0 if section.eval_path or section.eval_dataset else recipe.data.holdout}
    found: dict[str, float] = {}
    for folder in getattr(data, "folders", ()):
        labels = {entry["label"] for entry in folder.manifest.get("sources", ())}
        for kind in (DOCUMENTS, STDLIB) if STDLIB in labels else (DOCUMENTS,):
            found[kind] = min(_held_out(folder), found.get(kind, 1.0))
    return found


def _held_out(folder: TokenFolder) -> float:
    """The share below which all documents of a folder are held out."""
    below = int(folder.manifest.get("holdout_below", holdout_threshold(folder.holdout)))
    return folder.holdout if below >= holdout_threshold(folder.holdout) else below / 2**64


def remarks(recipe: Recipe, data: Any, origin: Provenance) -> list[str]:
    """One line for each thing in which a run that starts from weights departs from what they know.

    Args:
        origin: of `init.from`.
    """
    source, _ = source_for(recipe)
    lines = _tokenizer_remarks(recipe, data, source)
    if not lines and recipe.data.examples is None:
        lines += _bos_remarks(data, origin)
    lines += _label_remarks(recipe, source)
    return [*lines, *_share_remarks(recipe, origin), *_rounding_remarks(recipe, source)]


def _tokenizer_remarks(recipe: Recipe, data: Any, source: WeightSource) -> list[str]:
    theirs, own = source_tokenizer(source), data.tokenizer
    if theirs is None or not (what := difference(own, theirs)):
        return []
    if extends(own, theirs):
        more = own.vocab_size - theirs.vocab_size
        return [
            f"data.tokenizer has {more} more ids than the tokenizer of {source.path}: they start untrained"
        ]
    return [
        f"data.tokenizer '{recipe.data.tokenizer}' is not the tokenizer of {source.path} ({what}), so its "
        "ids do not mean what these weights learned; write data.tokenizer: init to use theirs"
    ]


def _bos_remarks(data: Any, origin: Provenance) -> list[str]:
    known, found = origin.convention.bos, data.bos_id
    if known == found:
        return []
    if found is None:
        return [
            f"the documents of data.sources do not begin with BOS (id {known}), and the texts that these "
            "weights were trained on did; tokenize them with hlat data tokenize --bos"
        ]
    return [f"the documents of data.sources begin with BOS (id {found}), which these weights do not know"]


def _label_remarks(recipe: Recipe, source: WeightSource) -> list[str]:
    """A line where the classifier of the weights, which is taken over, was trained for other labels."""
    section, saved = recipe.data.examples, source.meta.get("recipe", {})
    known = list(((saved.get("data") or {}).get("examples") or {}).get("labels") or ())
    taken = recipe.model.classes and source.meta["model"].get("classes") == recipe.model.classes
    if section is None or not taken or not known or known == list(section.labels):
        return []
    names = ["; ".join(labels) for labels in (known, section.labels)]
    return [
        f"the classifier of init.from was trained for the labels {names[0]}, in this order, and goes on with "
        f"{names[1]}: list them as there, or its rows begin as those of other labels"
    ]


def _share_remarks(recipe: Recipe, origin: Provenance) -> list[str]:
    """A line where this run measures on what the weights were trained on; a share by another field counts as
    none.
    """
    own, share = next(iter(shares(recipe, None)), DOCUMENTS), recipe.data.holdout
    plural = own.partition(" ")[0]
    earlier = {kind: least for kind, least in origin.held_out.items() if kind.partition(" ")[0] == plural}
    least = min((found if kind == own else 0.0 for kind, found in earlier.items()), default=share)
    section = recipe.data.examples
    if least >= share or (section is not None and (section.eval_path or section.eval_dataset)):
        return []
    remedy = f"; data.holdout={least:g} avoids that" if least else ""
    return [
        f"data.holdout is {share:g}, and {least:g} of the {plural} were held out from the weights of "
        f"init.from: where the data is the same, they were trained on some of the held-out {plural}{remedy}"
    ]


def _rounding_remarks(recipe: Recipe, source: WeightSource) -> list[str]:
    compute, stored = DTYPES[recipe.precision.compute], _widest(source)
    if recipe.precision.master != "none" or torch.promote_types(stored, compute) == compute:
        return []
    names = [str(dtype).removeprefix("torch.") for dtype in (stored, compute)]
    which = "trained weights" if recipe.train_only else "weights"  # frozen ones stay as they are
    text = f"the {which} of init.from are {names[0]} and are rounded to {names[1]} at the start"
    return [f"{text}, as precision.master is none; precision.master=fp32 keeps them exact"]


def _widest(source: WeightSource) -> torch.dtype:
    """The narrowest format that holds all of the weights exactly; fp32 where they are stored in another than
    HLAT's own, for that is what they are read as.
    """
    found: torch.dtype | None = None
    try:
        for name in source.names():
            if name.startswith(PREFIX):
                dtype = source.dtype(name)
                found = dtype if found is None else torch.promote_types(found, dtype)
    except UserError:
        return torch.float32
    return found or torch.float32
