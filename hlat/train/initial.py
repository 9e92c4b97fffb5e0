"""Starting from pretrained weights: `init.from` is opened, compared with the recipe, read part by part."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hlat.checkpoint.hf_tokenizer import tokenizer_texts
from hlat.checkpoint.nxd import newest_nxd
from hlat.checkpoint.peers import Peers
from hlat.checkpoint.provenance import Provenance, provenance_of, recorded
from hlat.checkpoint.reader import newest_in
from hlat.checkpoint.weights import PREFIX, WeightSource, model_config, open_weights, source_tokenizer
from hlat.data.tokenizer import load_tokenizer
from hlat.data.tokenizer_files import copy_files
from hlat.errors import UserError
from hlat.parallel.plan import Part
from hlat.train.weights import Initial, initial_values

if TYPE_CHECKING:
    from hlat.backend.cluster import Cluster
    from hlat.data.tokenizer import Tokenizer
    from hlat.model.config import ModelConfig
    from hlat.recipe import Recipe

WHERE = "init.from"
# What the numbers of a model depend on. The others may be chosen anew: attention kernel, initialisation of
# what is not read, classes, and the longest sequence (rotary positions have no parameters).
SAME = ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "norm_eps", "rope_theta", "tie_embeddings")


_chosen: dict[str, str] = {}  # what `init.from` names -> the checkpoint of it that this process reads


@contextmanager
def one_checkpoint(recipe: Recipe, cluster: Cluster, seconds: float) -> Iterator[None]:
    """While a run starts, everything that is read of a run at `init.from` is of one of its checkpoints, on
    every rank: that run may still be training, and its newest checkpoint another one at each look.

    The first rank chooses; the others wait for it so many seconds. Collective.
    """
    path, found = recipe.init.from_, ""
    if path is None:
        yield
        return
    if cluster.rank == 0:
        with suppress(UserError):  # said where it is needed: a run that continues needs nothing of it
            fresh = not _has_checkpoints(Path(recipe.run.dir))
            found = str(open_source(path, compare=fresh)[0].path)
    if chosen := cluster.from_first("init-from", found, seconds):
        _chosen[path] = chosen
    try:
        yield
    finally:
        _chosen.pop(path, None)


def _has_checkpoints(folder: Path) -> bool:
    """Whether a run folder holds state to continue from: then what it began with is not read again."""
    return any(next((folder / name).glob("step-*"), None) for name in ("checkpoints", "nxd-checkpoints"))


def open_source(path: str, compare: bool = False) -> tuple[WeightSource, ModelConfig]:
    """The weights at `init.from` and their model; with `compare`, of a run those of the newest checkpoint
    whose weights match their checksums. Raises UserError when there are none, or not whole ones.
    """
    try:
        source = open_weights(_chosen.get(path, path), compare=compare)
        return source, model_config(source)
    except UserError as error:
        raise UserError(error.what, where=f"{WHERE}: {error.where}", fix=error.fix) from error


def model_fields(path: str) -> dict[str, Any]:
    """The model section of the weights at `init.from`, for a recipe that has none. Raises UserError."""
    _, config = open_source(path)
    return {name: value for name, value in config.model_dump().items() if name not in ("preset", "classes")}


def source_for(recipe: Recipe) -> tuple[WeightSource, ModelConfig]:
    """The weights that a recipe starts from. Raises UserError when they are not of the recipe's model."""
    assert recipe.init.from_ is not None
    source, config = open_source(recipe.init.from_)
    for name in SAME:
        own, other = getattr(recipe.model, name), getattr(config, name)
        if own != other:
            what = f"model.{name} is {own} in the recipe and {other} in these weights"
            fix = "leave the model section out: it is read from there"
            if recipe.model.preset is not None:  # perhaps of a base, where it cannot be left out
                fix = "write model.preset=null: the model section is then read from there"
            raise UserError(what, where=f"{WHERE}: {source.path}", fix=fix)
    return source, config


def initial_from(recipe: Recipe) -> tuple[Initial, str]:
    """The values training starts from, and what is said of them.

    A tensor is read when it is asked for, whole, and cut: a rank reads those of its layers, one at a time.
    What the weights do not have (a classifier, or one for as many labels) comes from the recipe's seed.
    """
    source, config = source_for(recipe)
    fresh, names = initial_values(recipe), set(source.names())
    if config.classes != recipe.model.classes:
        names.discard(f"{PREFIX}classifier.weight")

    def initial(name: str, part: Part) -> Tensor:
        if PREFIX + name not in names:
            return fresh(name, part)
        value = source.read(PREFIX + name)[part.box]
        return value if value.dtype == torch.bfloat16 else value.float()

    step = source.meta.get("step") or getattr(source, "step", 0)
    text = f"weights of {source.path}" + (f", step {step:,}" if step else "")
    if (bos := provenance_of(source).convention.bos) is not None:
        text += f"; their texts begin with BOS (id {bos})"
    if recipe.model.classes:
        known = f"{PREFIX}classifier.weight" in names
        text += f"; classifier {'from there too' if known else 'new'}"
    return initial, text


def starting_tokenizer(recipe: Recipe, checkpoints: Path) -> Tokenizer | None:
    """The tokenizer of the weights that a run starts from, which knows how they saw texts: that of the run's
    own newest checkpoint, so that a resume needs nothing else, before there is one that of `init.from`. None
    for a recipe without `init.from`.

    Raises UserError when there is none and `data.tokenizer` is `init`.
    """
    if recipe.init.from_ is None:
        return None
    named = recipe.data.tokenizer != "init"
    newest, _ = newest_in(checkpoints, False, Peers()) if checkpoints.is_dir() else (None, {})
    if named and newest is not None and recorded(newest.meta) is None:
        return None  # an earlier version began this run, with nothing but what the recipe names
    files = newest_nxd(checkpoints.with_name("nxd-checkpoints")) if newest is None else None
    source = newest or source_for(recipe)[0]
    tokenizer = source_tokenizer(source)
    if tokenizer is None:
        if named:
            return None
        fix = "set data.tokenizer to the one these weights were trained with"
        raise UserError("these weights have no tokenizer", where=f"{WHERE}: {source.path}", fix=fix)
    tokenizer = _copied(tokenizer, source.tokenizer)
    known = provenance_of(source) if files is None else recorded(files.meta) or Provenance()
    tokenizer.convention, tokenizer.of_weights = known.convention, True
    return tokenizer


def _copied(tokenizer: Tokenizer, folder: Path | None) -> Tokenizer:
    """The tokenizer from a copy of its files and of what lies with them, which goes when the process ends:
    the checkpoint that they come from may be deleted while the run needs them for its own.
    """
    if folder is None or not tokenizer.files():
        return tokenizer
    copies = Path(tempfile.mkdtemp(prefix="hlat-tokenizer-"))
    atexit.register(shutil.rmtree, copies, ignore_errors=True)
    copy_files([*tokenizer_texts(folder), *tokenizer.files()], copies)
    copied = load_tokenizer(copies / tokenizer.files()[0].name)
    copied.spec = tokenizer.spec
    return copied
