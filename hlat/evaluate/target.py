"""What is evaluated: a run, one of its checkpoints, or a Hugging Face folder, read into any layout."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic_core import PydanticCustomError
from torch import nn

from hlat.checkpoint.hf_config import DTYPES
from hlat.checkpoint.hf_generation import generation_defaults
from hlat.checkpoint.peers import Peers
from hlat.checkpoint.provenance import offline_share
from hlat.checkpoint.reader import usable
from hlat.checkpoint.weights import PREFIX, WeightSource, model_config, open_weights, source_name
from hlat.errors import UserError
from hlat.evaluate.chat import ChatTemplates
from hlat.evaluate.live import LiveModel
from hlat.evaluate.team import Team
from hlat.evaluate.text import codec_for
from hlat.mesh import Layout, check_layout
from hlat.model.decoder import Decoder
from hlat.model.fit import check_fits
from hlat.model.init import parameter_shapes
from hlat.parallel.buckets import set_parameter
from hlat.parallel.pipeline import prune, rank_parts
from hlat.parallel.plan import Part, part_of
from hlat.parallel.tensor import shard_model
from hlat.recipe_sections import ParallelSection

if TYPE_CHECKING:
    from collections.abc import Callable

    from hlat.backend.base import Backend
    from hlat.model.config import ModelConfig


@dataclass(frozen=True)
class Target:
    """One checkpoint to evaluate. `step` and `tokens` are 0 for imported weights."""

    name: str
    source: WeightSource

    @property
    def step(self) -> int:
        """Steps of training behind it."""
        return int(self.source.meta.get("step", 0))

    @property
    def tokens(self) -> int:
        """Tokens of training behind it."""
        return int(self.source.meta.get("tokens", 0))

    @property
    def holdout(self) -> float | None:
        """Fraction of the documents that neither its run nor one it goes back to was trained on; None where
        that is not known.
        """
        return offline_share(self.source)


def open_target(path: str | Path) -> Target:
    """The newest usable checkpoint of a run (it may still be training), a step folder, or a Hugging Face
    folder. Every rank calls it; all get the same.

    Raises UserError for anything else.
    """
    peers = Peers.meet()
    source = open_weights(path, _warn if peers.rank == 0 else lambda line: None, peers=peers)
    return Target(source_name(source), source)


def all_checkpoints(path: str | Path) -> Iterator[Target]:
    """Every complete checkpoint of a run, oldest first, but those that are damaged in anything but optimizer
    state: of these a line is said. Every rank calls it; all get the same. Raises UserError when there is
    none.
    """
    from hlat.checkpoint import folder as folders

    root, peers = Path(path) / "checkpoints", Peers.meet()
    steps = folders.step_folders(root) if root.is_dir() else {}
    found = [steps[step] for step in sorted(steps)]
    used = False
    for folder in peers.from_first(found):
        source, problem = usable(folder, True, peers, only=PREFIX)
        if source is not None:
            used = True
            yield Target(source_name(source), source)
        elif peers.rank == 0:
            _warn(f"skipped checkpoint {folder}: {problem}")
    if not used:
        what = "no checkpoint here can be used" if found else "no complete checkpoint here"
        raise UserError(what, where=str(path), fix="give the run.dir of a training run")


def choose_layout(source: WeightSource, world: int, tp: int, pp: int) -> Layout:
    """The mesh of `world` ranks. Raises UserError where the model or the ranks cannot be divided so."""
    if world % (tp * pp):
        what = f"{world} process{'es' * (world > 1)} cannot be divided into replicas of tp {tp} x pp {pp}"
        raise UserError(what, where="--tp", fix=f"start a multiple of {tp * pp} with torchrun")
    config = model_config(source)
    try:
        check_layout(config, config.max_seq_len, ParallelSection(tp=tp, pp=pp))
    except PydanticCustomError as error:
        context = error.context or {}
        where = f"--{str(context.get('key', 'tp')).rpartition('.')[2]}"
        raise UserError(error.message(), where=where, fix=context.get("fix", "")) from None
    return Layout(dp=world // (tp * pp), pp=pp, tp=tp)


def load_team(
    target: Target,
    backend: Backend,
    dtype: torch.dtype,
    tokenizer: str | None = None,
    beat: Callable[[], None] = lambda: None,
) -> Team:
    """The ranks of a backend with a target's weights, each holding its part of them. Every rank calls it.

    Args:
        dtype: of the weights, which is also what is computed in.
        tokenizer: path of another tokenizer than the checkpoint's.
    """
    source = target.source
    config = model_config(source)
    codec = codec_for(source, config.vocab, tokenizer, _warn if backend.rank == 0 else lambda text: None)
    with torch.device("meta"):
        model = Decoder(config)
    parts = rank_parts(config, backend.layout, backend.place)
    prune(model, parts)
    held = _parts(model, config, backend)
    size = sum(math.prod(part.size) for _, part in held.values()) * dtype.itemsize + config.position_bytes()
    check_fits(size, backend.device, f"{config.parameter_count():,} parameters", str(source.path))
    for path, (name, part) in held.items():
        value = source.read(PREFIX + name)[part.box].to(backend.device, dtype)
        value = value.clone(memory_format=torch.contiguous_format)  # not a view of the whole tensor
        set_parameter(model, path, nn.Parameter(value, requires_grad=False))
    model.tie()
    model.rope.to_empty(device=backend.device)
    shard_model(model, backend.groups.tp, backend.layout.sequence)
    chat = ChatTemplates.read(tokenizer or source.tokenizer)
    live = LiveModel(model.eval(), parts, backend)
    return Team(live, codec, beat, chat, generation_defaults(source.meta), target.holdout)


def _parts(model: Decoder, config: ModelConfig, backend: Backend) -> dict[str, tuple[str, Part]]:
    """Path of each of this rank's parameters -> its name among all, and the part of it that the rank has."""
    shapes, found = parameter_shapes(config), {}
    for path, _ in model.named_parameters():
        name = path if path in shapes else "embed.weight"  # a tied head on a stage without the embedding
        found[path] = name, part_of(name, shapes[name], config, backend.layout, backend.place, path=path)
    return found


def _warn(text: str) -> None:
    print(f"hlat: warning: {text}", file=sys.stderr)


def parse_dtype(name: str) -> torch.dtype:
    """fp64, fp32, bf16 or fp16, or the harness's names of them. Raises UserError for another."""
    ours = {"fp64": torch.float64, **DTYPES}
    known = {**ours, **{str(value).removeprefix("torch."): value for value in ours.values()}}
    if name not in known:
        raise UserError(f"unknown format {name!r}", where="dtype", fix=f"write {' or '.join(ours)}")
    return known[name]


def parse_device(name: str | None) -> torch.device | None:
    """A device by name; None for the default one. Raises UserError for what is not there."""
    if not name:
        return None
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if reason.startswith("Expected one of"):  # a dozen words that are no device here
            reason = "there is no such kind of device"
        fix = "write cpu, or cuda where there is a GPU"
        raise UserError(f"device {name!r} cannot be used ({reason})", where="device", fix=fix) from None
    return device
