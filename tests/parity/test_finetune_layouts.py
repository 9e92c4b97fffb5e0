"""Finetuning on every layout: weights read from a checkpoint, losses, updates and held-out accuracy are those
of one process.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from hlat.checkpoint.store import write_weights
from hlat.model.config import ModelConfig
from hlat.model.init import init_tensor, parameter_shapes

SHAPE = {"layers": 4, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 64, "vocab": 257, "max_seq_len": 32}
OBJECTIVES = {
    "pairs": ["objective.name=causal_lm"],
    "words": ["objective={name: classification, by: words}"],
    "letters": [
        "objective={name: classification, by: words}",
        "data.examples.labels={red: r, blue: b, green: g}",
    ],
    "tokens": ["objective={name: classification, by: tokens}"],
    "head": ["objective={name: classification, by: head}"],
    "head_tied": ["objective={name: classification, by: head}"],
    "partial": ["objective={name: classification}", "train_only=['layers.3.*', norm.weight]"],
}
LAYOUTS = {
    2: ("dp2-zero1", "tp2", "tp2-sequence", "pp2"),
    4: ("dp2-tp2-sequence", "tp2-pp2-sequence"),
}
CASES = [
    (world, layout, kind)
    for world, layouts in LAYOUTS.items()
    for layout in layouts
    for kind in OBJECTIVES
    if kind in ("words", "head_tied")
    or (world == 2 and (kind == "head" or layout in ("tp2-sequence", "pp2")))
]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """A function that makes a case: examples in a file, weights in two checkpoints, tied and not."""
    folder = tmp_path_factory.mktemp("finetune")
    colours = ("red", "blue", "green")
    rows = [
        {"text": f"{i * 7919 % 1009} is {colours[i % 3][::-1]}", "label": colours[i % 3]} for i in range(60)
    ]
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    for tied in (False, True):
        config = ModelConfig(**SHAPE, tie_embeddings=tied, init_std=0.2)
        tensors = [(f"model/{n}", init_tensor(config, n, s, 3)) for n, s in parameter_shapes(config).items()]
        write_weights(
            folder / f"weights-{tied}", iter(tensors), {"model": config.model_dump(), "step": 0}, []
        )
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"""
run: {{name: test, steps: 4, seed: 7}}
data:
  examples:
    path: {data}
    prompt: "{{text}}? "
    label_field: label
    labels: {{red: rot, blue: blau, green: gruen}}
  tokenizer: bytes
  seq_len: 32
  holdout: 0.4
precision: {{compute: fp32}}
optim: {{name: adamw, lr: 1e-3, eps: 1e-6, clip_norm: 0.5}}
schedule: {{name: constant}}
eval: {{rows: null}}
""")

    def make(layout: str, kind: str) -> dict[str, Any]:
        tied = kind == "head_tied"
        model = json.dumps({**SHAPE, "tie_embeddings": tied, "init_std": 0.2})
        start = [f"model={model}", f"init.from={folder / f'weights-{tied}'}"]
        extra = [*start, *OBJECTIVES[kind]]
        more = {"recipe": str(recipe), "extra": extra, "steps": 4, "evaluate": True}
        return {"name": f"{layout}-{kind}", "layout": layout, **more}

    return make


@pytest.fixture(scope="module")
def outcome(run_ranks, case) -> Callable[[int, str, str], Any]:
    """A function that gives an outcome; the first one asked of a world size runs all of that size."""

    @cache
    def group(world: int) -> dict[str, Any]:
        if world == 1:
            return run_ranks(1, [case("accumulate1", kind) for kind in OBJECTIVES])
        return run_ranks(world, [case(layout, kind) for size, layout, kind in CASES if size == world])

    return lambda world, layout, kind: group(world)[f"{layout}-{kind}"].check()


@pytest.mark.parametrize(("world", "layout", "kind"), CASES, ids=lambda part: str(part))
def test_as_in_one_process(outcome, world: int, layout: str, kind: str) -> None:
    """fp32: only the order of additions differs; the limits are those of pretraining's layouts."""
    ours, one = outcome(world, layout, kind), outcome(1, "accumulate1", kind)
    alone = one.ranks[0]
    for result in ours.ranks:
        assert result["losses"] == pytest.approx(alone["losses"], abs=2e-6, rel=1e-6)
        assert result["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        held_out = result["held_out"]
        assert held_out["loss"] == pytest.approx(alone["held_out"]["loss"], abs=5e-6)
        for name in held_out.keys() - {"loss", "bits_per_byte"}:
            assert held_out[name] == alone["held_out"][name], name
    for part in ("start", "gradient", "end"):
        (found, wrong), (wanted, _) = ours.assemble(part), one.assemble(part)
        assert not wrong
        assert set(found) == set(wanted)
        for name in wanted:
            # A gradient near zero may move its weight by a little of Adam's rate: eps is 1e-6.
            limit = {"start": 0.0, "gradient": 1e-5, "end": 2e-5}[part] * float(wanted[name].abs().max())
            assert torch.allclose(found[name], wanted[name], rtol=0, atol=limit), (part, name)


def test_start_is_the_checkpoint(outcome) -> None:
    config = ModelConfig(**SHAPE, init_std=0.2)
    for kind in ("words", "head"):
        one = outcome(1, "accumulate1", kind)
        start, _ = one.assemble("start")
        for name in ("embed.weight", "layers.2.mlp.up.weight"):
            assert torch.equal(start[name], init_tensor(config, name, parameter_shapes(config)[name], 3))
        assert ("head.weight" in start) == (kind == "words")
        assert ("classifier.weight" in start) == (kind == "head")


def test_partial_trains_what_it_names(outcome) -> None:
    start, _ = outcome(1, "accumulate1", "partial").assemble("start")
    assert all(name.startswith("layers.3.") or name == "norm.weight" for name in start)
    assert len(start) == 10
