"""Pipeline stages: where the model is cut, and what of it a pipeline rank holds.

The layers are cut into P · C contiguous stages for P pipeline ranks with C stages each. Rank p holds stages
p, p + P, p + 2P, …: with one stage a rank that is the plain pipeline; with more, a micro-batch goes round the
ranks C times, which shortens the time at both ends of a step when ranks wait (interleaving, Narayanan et al.
2021, arXiv 2104.04473, section 2.2).
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from hlat.mesh import Layout, Place
from hlat.model.flops import matmul_parameters

if TYPE_CHECKING:
    from hlat.model.config import ModelConfig
    from hlat.model.decoder import Decoder


@dataclass(frozen=True)
class StagePart:
    """One stage of a model.

    index, count: which stage, of how many.
    layers: names of its layers in `Decoder.layers`, in order.
    """

    index: int
    count: int
    layers: list[str]

    @property
    def first(self) -> bool:
        """Whether the stage starts with the embedding."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether the stage ends with the final norm and the head."""
        return self.index == self.count - 1


def cut_stages(config: ModelConfig, count: int, cuts: Sequence[str] = ()) -> list[list[str]]:
    """Names of the layers of each of `count` stages.

    Without `cuts` the stage with the most work has as little as any cut allows; among such cuts, the stage
    with the most weights has as few as possible; among those the work is spread most evenly. Work is weights
    of matrices that a token is multiplied with: the head's product counts on the last stage, the embedding
    look-up is free. Weights count the embedding on the first stage and the head (or the tied copy) on the
    last.

    Args:
        config: the model.
        count: number of stages, at most one a layer.
        cuts: first layer of each stage but the first, as "layers.4"; empty for the balanced cut. The recipe
            has been checked by `hlat.mesh.check_layout`.
    """
    named = [0, *(int(cut.removeprefix("layers.")) for cut in cuts)]
    starts = named if cuts else _balanced_starts(config, count)
    stops = [*starts[1:], config.layers]
    return [[str(i) for i in range(a, b)] for a, b in zip(starts, stops, strict=True)]


def stage_work(config: ModelConfig, first: int, stop: int) -> int:
    """Weights that a token is multiplied with in the stage of layers [first, stop)."""
    head = config.hidden * config.vocab
    layer = (matmul_parameters(config) - head) // config.layers
    return (stop - first) * layer + (head if stop == config.layers else 0)


def stage_weights(config: ModelConfig, first: int, stop: int) -> int:
    """Weights of matrices that the stage of layers [first, stop) keeps."""
    embed = config.hidden * config.vocab if first == 0 else 0
    return stage_work(config, first, stop) + embed


def _balanced_starts(config: ModelConfig, count: int) -> list[int]:
    """Three passes, each keeping only stages that the optimum of the pass before allows: a single pass with
    tuples as costs would drop prefixes that only look worse.
    """
    layers = config.layers
    spans = {(a, b) for a in range(layers) for b in range(a + 1, layers + 1)}
    work = {(a, b): stage_work(config, a, b) for a, b in spans}
    weights = {(a, b): stage_weights(config, a, b) for a, b in spans}
    for cost in (work, weights):
        most, _ = _best_cut(layers, count, {span: cost[span] for span in spans}, max)
        spans = {span for span in spans if cost[span] <= most}
    return _best_cut(layers, count, {span: work[span] ** 2 for span in spans}, operator.add)[1]


def _best_cut(
    layers: int, count: int, cost: dict[tuple[int, int], int], combine: Callable[[int, int], int]
) -> tuple[int, list[int]]:
    """The cheapest cut of `layers` into `count` stages: its cost and where its stages start.

    cost: of the stage of layers [a, b), by (a, b); a stage that is missing is not allowed.
    combine: how the costs of stages add up; must not decrease when one of them grows.
    """
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}  # layers already cut -> cost, starts
    for _ in range(count):
        longer: dict[int, tuple[int, list[int]]] = {}
        for a, (so_far, starts) in best.items():
            for b in range(a + 1, layers + 1):
                if (a, b) in cost:
                    option = (combine(so_far, cost[a, b]), [*starts, a])
                    if b not in longer or option < longer[b]:
                        longer[b] = option
        best = longer
    return best[layers]


def stages_of_rank(layout: Layout, place: Place) -> range:
    """Indices of the stages that the rank at `place` holds, in the order a micro-batch meets them."""
    return range(place.pp, layout.pp * layout.stages, layout.pp)


def rank_parts(
    config: ModelConfig, layout: Layout, place: Place, cuts: Sequence[str] = ()
) -> list[StagePart]:
    """The stages that the rank at `place` holds, in the order a micro-batch meets them."""
    count = layout.pp * layout.stages
    layers = cut_stages(config, count, cuts)
    return [StagePart(index, count, layers[index]) for index in stages_of_rank(layout, place)]


def prune(model: Decoder, parts: Sequence[StagePart]) -> None:
    """Take out of a rank's model what none of its stages holds; names of what stays do not change.

    With tied embeddings the last stage's head keeps a weight of its own, "head.weight".
    """
    kept = {name for part in parts for name in part.layers}
    for name in [name for name in model.layers if name not in kept]:
        del model.layers[name]
    if not any(part.first for part in parts):
        model.embed = None
    if not any(part.last for part in parts):
        model.norm = model.head = model.classifier = None


def stage_view(model: Decoder, part: StagePart) -> Decoder:
    """One stage of a rank's model as a Decoder of its own, made of the same modules and parameters.

    Changes of a module (its weights, its training flag, its compiled form) show in both. Take views after
    anything that replaces whole modules of `model`.
    """
    view = copy.copy(model)
    view._modules = dict(model._modules)
    view.layers = nn.ModuleDict({name: model.layers[name] for name in part.layers})
    view.embed = model.embed if part.first else None
    view.norm, view.head, view.classifier = (
        (model.norm, model.head, model.classifier) if part.last else (None, None, None)
    )
    return view
