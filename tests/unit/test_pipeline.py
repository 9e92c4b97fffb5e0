"""Pipeline stages and their engine: cuts, views of a model, schedules; and on two real processes, losses and
gradients equal to those of one.

Run as a script, this file is one process of the group that the tests start.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from hlat.backend.groups import make_groups
from hlat.data.batch import Batch
from hlat.mesh import Layout, Place
from hlat.model.config import ModelConfig
from hlat.model.decoder import Decoder
from hlat.objective.causal_lm import CausalLM
from hlat.parallel.pipeline import (
    StagePart,
    cut_stages,
    prune,
    rank_parts,
    stage_view,
    stage_weights,
    stage_work,
)
from hlat.train.engine import Engine
from hlat.train.pipeline_engine import PipelineEngine

ROWS, LENGTH, VOCAB = 2, 16, 61
CPU = torch.device("cpu")


def config(layers: int = 8, **kwargs: Any) -> ModelConfig:
    shape = {"hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "vocab": VOCAB, "max_seq_len": LENGTH}
    return ModelConfig(layers=layers, **{**shape, **kwargs})


def names(count: int) -> list[str]:
    return [str(i) for i in range(count)]


# Cuts


@given(
    layers=st.integers(1, 9),
    count=st.integers(1, 9),
    vocab=st.sampled_from([1, 50, 200, 1000, 4000]),
    tied=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_balanced_cuts_are_the_best_of_all_cuts(layers: int, count: int, vocab: int, tied: bool) -> None:
    count = min(count, layers)
    model = config(layers, vocab=vocab, tie_embeddings=tied)
    stages = cut_stages(model, count)
    assert sum(stages, []) == names(layers) and len(stages) == count and all(stages)

    def costs(starts: tuple[int, ...]) -> tuple[int, int, int]:
        spans = list(zip(starts, [*starts[1:], layers], strict=True))
        work = [stage_work(model, *span) for span in spans]
        return max(work), max(stage_weights(model, *span) for span in spans), sum(w * w for w in work)

    every = (costs((0, *cut)) for cut in itertools.combinations(range(1, layers), count - 1))
    assert costs(tuple(int(stage[0]) for stage in stages)) == min(every)


def test_a_heavy_head_takes_layers_from_the_last_stage() -> None:
    layer = stage_work(config(8), 0, 1)
    heavy = config(
        8, vocab=2 * layer // 32
    )  # the head weighs as much as two layers, and so does the embedding
    assert [len(stage) for stage in cut_stages(heavy, 2)] == [5, 3]
    assert stage_work(heavy, 5, 8) == 5 * layer and stage_weights(heavy, 0, 5) == 7 * layer


def test_named_cuts() -> None:
    assert cut_stages(config(5), 3, ["layers.1", "layers.4"]) == [["0"], ["1", "2", "3"], ["4"]]


def test_ranks_hold_every_stage_once_and_neighbours_hold_neighbours() -> None:
    layout = Layout(dp=2, pp=3, tp=2, stages=2)
    held: dict[int, int] = {}
    for rank in range(layout.world):
        place = layout.place(rank)
        parts = rank_parts(config(8), layout, place)
        assert [part.index for part in parts] == [place.pp, place.pp + 3]
        assert [part.first for part in parts] == [place.pp == 0, False]
        assert [part.last for part in parts] == [False, place.pp == 2]
        if place.dp == place.tp == 0:
            held |= {int(name): part.index for part in parts for name in part.layers}
    assert sorted(held) == list(range(8)) and [held[i] for i in range(8)] == sorted(held.values())


# What a rank holds


def test_pruned_models_hold_their_own_parameters_under_global_names() -> None:
    layout, whole = Layout(pp=2, stages=2), Decoder(config(4, tie_embeddings=True))
    held = []
    for pp in range(2):
        with torch.device("meta"):
            model = Decoder(config(4, tie_embeddings=True))
        prune(model, rank_parts(model.config, layout, Place(pp=pp)))
        held.append({name for name, _ in model.named_parameters()})
    assert "embed.weight" in held[0] and "embed.weight" not in held[1]
    assert "head.weight" in held[1] and {"head.weight", "norm.weight"}.isdisjoint(held[0])
    assert not held[0] & held[1]
    assert held[0] | held[1] == {name for name, _ in whole.named_parameters()} | {"head.weight"}


def test_views_share_modules_and_add_up_to_the_model() -> None:
    model = Decoder(config(4))
    model.init_weights(1)
    parts = [StagePart(i, 3, layers) for i, layers in enumerate((["0"], ["1", "2"], ["3"]))]
    views = [stage_view(model, part) for part in parts]
    shared = dict(model.named_parameters())
    for view in views:
        for name, parameter in view.named_parameters():
            assert parameter is shared.pop(name)
    assert not shared
    assert [view.embed is None for view in views] == [False, True, True]
    assert [view.head is None for view in views] == [True, True, False]
    assert len(model.layers) == 4 and model.embed is not None and model.norm is not None

    ids = torch.arange(LENGTH)[None] % VOCAB
    x = ids
    for view in views:
        x = view(x)
    assert torch.equal(x, model(ids))
    with torch.no_grad():
        model.layers["1"].mlp.down.weight.zero_()
    assert not views[1].layers["1"].mlp.down.weight.any()
    model.eval()
    assert not views[1].layers["1"].training


# Two processes

CASES: dict[str, dict[str, Any]] = {
    "1f1b": {"micro_batches": 4},
    "1f1b, fewest micro-batches": {"micro_batches": 0},
    "1f1b, tied": {"micro_batches": 4, "tied": True},
    "1f1b, no document mask": {"micro_batches": 5, "masked": False},
    "1f1b, named cuts": {"micro_batches": 4, "cuts": True},
    "1f1b, only the head trained": {"micro_batches": 4, "trained": "head"},
    "1f1b, only the embedding trained": {"micro_batches": 4, "trained": "embed"},
    "1f1b, bf16": {"micro_batches": 4, "dtype": torch.bfloat16},
    "gpipe": {"micro_batches": 4, "schedule": "gpipe"},
    "interleaved": {"micro_batches": 8, "schedule": "interleaved", "stages": 2},
    "interleaved, fewest micro-batches": {"micro_batches": 0, "schedule": "interleaved", "stages": 2},
    "interleaved, tied": {"micro_batches": 4, "schedule": "interleaved", "stages": 2, "tied": True},
}


class Collector:
    """Stands for a bucket: sums gradients as they come, counts them, notes when it is told of a step."""

    def __init__(self, model: Decoder) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        self.calls: list[Any] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p, name=name: self.add(name, p))

    def add(self, name: str, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self.sums[name] = self.sums.get(name, 0) + parameter.grad
        self.counts[name] = self.counts.get(name, 0) + 1
        parameter.grad = None

    def begin(self, micro_batches: int) -> None:
        self.sums, self.counts = {}, {}
        self.calls.append(micro_batches)

    def finish(self) -> None:
        self.calls.append("finish")


def ragged(seed: int, count: int, masked: bool) -> list[Batch]:
    """Micro-batches whose documents and ignored targets all differ."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for i in range(count):
        ids = torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=generator)
        targets = ids[:, 1:].clone()
        targets[torch.rand(ROWS, LENGTH, generator=generator) < 0.15 * (i % 6 + 1)] = -100
        starts = torch.rand(ROWS, LENGTH, generator=generator) < 0.2
        starts[:, 0] = True
        index = torch.arange(LENGTH).expand(ROWS, LENGTH)
        positions = index - torch.where(starts, index, 0).cummax(1).values
        masks = (positions, starts.cumsum(1).int()) if masked else (None, None)
        batches.append(Batch(ids[:, :-1].contiguous(), targets, *masks))
    return batches


def build(model: ModelConfig, case: dict[str, Any]) -> Decoder:
    """A whole decoder with the case's dtype and trained parameters."""
    decoder = Decoder(model)
    decoder.init_weights(3)
    decoder.to(case.get("dtype", torch.float32))
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(name.startswith(case.get("trained", "")))
    return decoder


def relative(difference: torch.Tensor, reference: torch.Tensor) -> float:
    return float(difference.abs().max() / reference.abs().max().clamp(min=1e-20))


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Two steps and an evaluation of a case on this rank, against the same in one process."""
    pp, stages, schedule = dist.get_world_size(), case.get("stages", 1), case.get("schedule", "1f1b")
    layout, rank = Layout(pp=pp, stages=stages), dist.get_rank()
    count = case["micro_batches"] or pp
    model = config(tie_embeddings=case.get("tied", False))
    whole, objective = build(model, case), CausalLM()
    expected = Collector(whole)
    reference = Engine(whole, objective, [expected])

    cuts = [f"layers.{i + 1}" for i in range(pp - 1)] if case.get("cuts") else []
    parts = rank_parts(model, layout, layout.place(rank), cuts)
    held = build(model, case)
    if held.head is not None and case.get("tied"):  # a weight of its own, as on the last stage of a pipeline
        held.head.weight = torch.nn.Parameter(held.head.weight.detach().clone())
    prune(held, parts)
    collector = Collector(held)
    forwards: dict[str, int] = dict.fromkeys(held.layers, 0)
    for name, block in held.layers.items():
        block.register_forward_pre_hook(lambda *_, name=name: forwards.update({name: forwards[name] + 1}))
    engine = PipelineEngine(
        held,
        parts,
        objective,
        [collector],
        schedule=schedule,
        micro_batches=count,
        group=make_groups(layout, rank).pp,
        layout=layout,
        rows=ROWS,
        seq_len=LENGTH,
        dtype=case.get("dtype", torch.float32),
        device=CPU,
    )
    out: dict[str, Any] = {"loss": [], "forward": [], "gradient": [], "counts": set()}
    for step in range(2):
        batches = ragged(step, count, case.get("masked", True))
        tokens = torch.stack([batch.targets_count() for batch in batches]).sum()
        want = reference.forward_backward(batches, tokens)
        got = engine.forward_backward(batches, tokens)
        assert got.shape == () and got.dtype == torch.float32 and not got.requires_grad
        out["loss"].append([float(got), float(want)])
        out["gradient"].append(compare(collector, expected, case))
        out["counts"] |= {*collector.counts.values()}
        held.eval()
        some = ragged(10 + step, 3, case.get("masked", True))  # not as many as in a step
        before = dict(collector.counts)
        out["forward"].append([float(engine.forward(some, tokens)), float(reference.forward(some, tokens))])
        held.train()
        assert collector.counts == before
    out["forwards"] = sorted(set(forwards.values()))
    out["calls"], out["expected_forwards"] = collector.calls, 2 * (count + 3)
    return {**out, "counts": sorted(out["counts"]), "micro_batches": count}


def compare(collector: Collector, expected: Collector, case: dict[str, Any]) -> dict[str, float]:
    """Largest difference of each gradient that this rank holds, relative to its largest element."""
    got = dict(collector.sums)
    if case.get("tied"):  # first and last rank each have a part of it
        tied = got.pop("embed.weight", torch.zeros_like(expected.sums["embed.weight"]))
        tied = tied + got.pop("head.weight", 0)
        dist.all_reduce(tied)
        got["embed.weight"] = tied
    return {name: relative(grad - expected.sums[name], expected.sums[name]) for name, grad in got.items()}


def worker(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    results = {name: run_case(case) for name, case in CASES.items()}
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank reports of each case."""
    folder, world = tmp_path_factory.mktemp("pipeline"), 2
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__)), str(world), str(folder)]
    ranks = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0] * world, "\n".join(errors)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize("name", CASES)
def test_losses_equal_one_process(results: list[dict[str, Any]], name: str) -> None:
    for step in range(2):
        for kind in ("loss", "forward"):
            pairs = [rank[name][kind][step] for rank in results]
            assert [got for got, _ in pairs[:-1]] == [0.0]  # only the rank with the last stage has the loss
            got, want = pairs[-1]
            assert want > 1
            assert abs(got - want) <= 1e-6 * max(1, want), (kind, got, want)


@pytest.mark.parametrize("name", CASES)
def test_every_gradient_equals_one_process(results: list[dict[str, Any]], name: str) -> None:
    for step in range(2):
        merged = {k: v for rank in results for k, v in rank[name]["gradient"][step].items()}
        whole = {n for n, _ in Decoder(config(tie_embeddings="tied" in name)).named_parameters()}
        trained = {n for n in whole if n.startswith(CASES[name].get("trained", ""))}
        assert set(merged) == trained
        assert {k: v for k, v in merged.items() if not v <= 1e-5} == {}


@pytest.mark.parametrize("name", CASES)
def test_the_model_runs_once_a_micro_batch_and_buckets_hear_of_steps(
    results: list[dict[str, Any]], name: str
) -> None:
    for rank in results:
        report = rank[name]
        assert report["forwards"] == [report["expected_forwards"]]  # no pass to find out shapes
        assert report["counts"] in ([report["micro_batches"]], [])
        assert report["calls"] == [report["micro_batches"], "finish"] * 2


if __name__ == "__main__":
    worker(int(sys.argv[3]), int(sys.argv[1]), Path(sys.argv[2]))
