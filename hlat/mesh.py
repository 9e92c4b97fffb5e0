"""How ranks are laid out: data x pipeline x tensor parallel, and which models and batches such a layout fits.

Tensor-parallel ranks are neighbours (they communicate most), then pipeline ranks, then replicas:
`rank = (dp * PP + pp) * TP + tp`. Needs no torch, so a recipe is checked before anything starts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hlat.section import largest_divisor, near_multiple, nearest_divisor, problem

if TYPE_CHECKING:
    from hlat.model.config import ModelConfig
    from hlat.recipe_sections import ParallelSection


@dataclass(frozen=True)
class Place:
    """A rank's coordinates in a `Layout`."""

    dp: int = 0
    pp: int = 0
    tp: int = 0


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh and what is sharded on it.

    dp, pp, tp: replicas, pipeline ranks, tensor-parallel ranks.
    sequence: norms and residual stream are split along the sequence over the tensor-parallel ranks.
    zero1: masters and optimizer state are split over the replicas.
    stages: model chunks on each pipeline rank; more than one is the interleaved schedule.
    """

    dp: int = 1
    pp: int = 1
    tp: int = 1
    sequence: bool = False
    zero1: bool = False
    stages: int = 1

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.dp * self.pp * self.tp

    def place(self, rank: int) -> Place:
        """Coordinates of a rank."""
        return Place(rank // (self.pp * self.tp), rank // self.tp % self.pp, rank % self.tp)

    def rank(self, place: Place) -> int:
        """The rank at these coordinates."""
        return (place.dp * self.pp + place.pp) * self.tp + place.tp

    def __str__(self) -> str:
        flags = [name for name in ("sequence", "zero1") if getattr(self, name)]
        chunks = [f"{self.stages} stages a rank"] if self.stages > 1 else []
        return ", ".join([f"dp {self.dp} x pp {self.pp} x tp {self.tp}", *chunks, *flags])


ONE_PROCESS = Layout()


def split(total: int, parts: int, index: int) -> tuple[int, int]:
    """Start and length of part `index` when `total` items are cut into `parts` runs of equal length, of which
    the last may be shorter.
    """
    size = -(-total // parts)
    start = min(index * size, total)
    return start, min(size, total - start)


def check_layout(model: ModelConfig, seq_len: int, parallel: ParallelSection) -> None:
    """Raise a recipe problem when the model cannot be cut this way: its key, and the nearest that fits."""
    tp, pp = parallel.tp, parallel.pp
    _check_tensor(model, tp)
    if parallel.sequence and seq_len % tp:
        fix = f"take data.seq_len {near_multiple(seq_len, tp)}, or set parallel.sequence to false"
        what = "sequence needs data.seq_len {a} to be a multiple of tp {b}"
        raise problem(what, "parallel.sequence", fix, a=seq_len, b=tp)
    if parallel.stages > 1 and parallel.schedule != "interleaved":
        what = "stages {a} needs the interleaved schedule"
        raise problem(what, "parallel.stages", "set parallel.schedule to interleaved", a=parallel.stages)
    if parallel.schedule == "interleaved" and pp > 1 and parallel.stages == 1:
        what = "the interleaved schedule with one stage a rank is 1f1b"
        raise problem(what, "parallel.schedule", "set parallel.stages to 2, or schedule to 1f1b")
    if parallel.stages > 1 and pp == 1:
        fix = "set parallel.stages to 1, or parallel.pp to 2 or more"
        raise problem("stages {a} needs a pipeline", "parallel.stages", fix, a=parallel.stages)
    if pp * parallel.stages > model.layers:
        what = "{a} pipeline stages for {b} layers"
        fix = f"take pp x stages of {model.layers} or less"
        raise problem(what, "parallel.pp", fix, a=pp * parallel.stages, b=model.layers)
    _check_cuts(model, parallel)


def micro_batches(parallel: ParallelSection, rows: int, micro_batch: int, dp: int) -> int:
    """Micro-batches of one step on each rank: `rows` / (`micro_batch` x `dp`).

    Raises a recipe problem when that is not whole, or when the pipeline's schedule cannot run so many. Its
    fix keeps the rows of a step: a run that resumes may change neither them nor, with them, its course.
    """
    own, rest = divmod(rows, dp)
    if rest:
        what = "global_batch {a} is not a multiple of dp {b}: no micro_batch fits"
        share = parallel.tp * parallel.pp
        near = nearest_divisor(rows // micro_batch, dp)
        fix = f"start {near * share} process{'es' * (near * share != 1)}, not {dp * share}"
        fix = f"take parallel.dp {near}: {fix}" if parallel.dp != "auto" else fix
        raise problem(what, "data.global_batch", fix, a=rows, b=dp)
    if own % micro_batch:
        what = "global_batch {a} is not a multiple of micro_batch {b} x dp {c}"
        fix = _fitting(parallel, own, micro_batch)
        raise problem(what, "data.micro_batch", fix, a=rows, b=micro_batch, c=dp)
    number, pp, schedule = own // micro_batch, parallel.pp, parallel.schedule
    if schedule == "interleaved" and number % pp:
        what = "interleaved needs a multiple of pp {a} micro-batches a step, not {b}"
    elif number < pp:  # gpipe could do with fewer, but torch 2.9 demands as many there too
        what = "{c} needs at least pp {a} micro-batches a step, not {b}"
    else:
        return number
    fix = _fitting(parallel, own, micro_batch)
    raise problem(what, "data.micro_batch", fix, a=pp, b=number, c=schedule)


def _fitting(parallel: ParallelSection, own: int, micro_batch: int) -> str:
    """The largest micro-batch that fits `own` rows of a rank and its pipeline, as advice."""
    pp, interleaved = parallel.pp, parallel.schedule == "interleaved"
    if own < pp or (interleaved and own % pp):
        near = largest_divisor(own, pp)
        return f"take parallel.pp {near} or fewer replicas: each has {own} rows of a step"
    whole = own // pp if interleaved else own
    return f"take data.micro_batch {largest_divisor(whole, min(micro_batch, own // pp))}"


def _check_tensor(model: ModelConfig, tp: int) -> None:
    heads, kv, ffn = model.heads, model.kv_heads, model.ffn
    if heads % tp:
        fix = f"take tp {nearest_divisor(heads, tp)}"
        raise problem("tp {a} does not divide heads {b}", "parallel.tp", fix, a=tp, b=heads)
    if kv % tp and tp % kv:
        near = min(
            (n for n in range(1, heads + 1) if heads % n == 0 and (kv % n == 0 or n % kv == 0)),
            key=lambda n: (abs(n - tp), n),
        )
        what = "tp {a} neither divides kv_heads {b} nor is a multiple of them"
        raise problem(what, "parallel.tp", f"take tp {near}", a=tp, b=kv)
    if ffn % tp:
        fix = f"take model.ffn {near_multiple(ffn, tp)}"
        raise problem("tp {a} does not divide ffn {b}", "parallel.tp", fix, a=tp, b=ffn)
    if split(model.vocab, tp, tp - 1)[1] < 1:
        fix = f"take model.vocab {near_multiple(model.vocab + tp, tp)}"
        raise problem("vocab {b} leaves one of tp {a} ranks empty", "parallel.tp", fix, a=tp, b=model.vocab)


def _check_cuts(model: ModelConfig, parallel: ParallelSection) -> None:
    cuts, needed = parallel.cuts, parallel.pp * parallel.stages - 1
    if not cuts:
        return
    if len(cuts) != needed:
        fix = f"name {needed}, or none for a balanced cut"
        raise problem("{a} cuts for {b} stages", "parallel.cuts", fix, a=len(cuts), b=needed + 1)
    found = [re.fullmatch(r"layers\.(\d+)", cut) for cut in cuts]
    numbers = [int(match[1]) if match else -1 for match in found]
    if sorted({n for n in numbers if 0 < n < model.layers}) != numbers:
        fix = f"name layers in order, from layers.1 to layers.{model.layers - 1}"
        raise problem("cuts {a} are not ascending layers", "parallel.cuts", fix, a=", ".join(cuts))
