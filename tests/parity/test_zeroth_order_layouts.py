"""Zeroth-order methods on every layout: the parameters of one process, replicas bit for bit alike."""

from __future__ import annotations

import pytest
import torch

METHODS = {
    "mezo": "method={name: mezo, lr: 1e-5}",
    "svrg": "method={name: mezo_svrg, lr_anchor: 1e-5, lr_inner: 1e-5, anchor_examples: 16}",
    "log": "method={name: mezo_svrg, lr_anchor: 1e-5, lr_inner: 1e-5, anchor_examples: 16, "
    "snapshot: seed_log, anchor_every: 3, shared_z: false}",
    "full": "method={name: full_batch_zo, lr: 1e-5, anchor_examples: 16, noise: rademacher}",
}
FEW = [(layout, method) for layout in ("dp2", "tp2", "pp2", "dp2-tp2") for method in ("mezo", "svrg")]
MANY = [
    *((layout, method) for layout in ("dp2", "tp2", "pp2", "dp2-tp2") for method in ("log", "full")),
    *((layout, method) for layout in ("tp2-sequence", "pp2-tied", "dp2-pp2") for method in ("svrg", "log")),
    *((layout, "svrg") for layout in ("pp2-interleaved", "tp4-kv1")),
]
MODELS = ("tied", "kv1")  # words that change what is trained
STEPS = 10


def reference_of(layout: str) -> str:
    return "-".join(["accumulate1", *(word for word in layout.split("-") if word in MODELS)])


def world_of(layout: str) -> int:
    sizes = {word: int(word[2]) for word in layout.split("-") if word[:2] in ("dp", "tp", "pp")}
    return int(torch.tensor(list(sizes.values())).prod()) if sizes else 1


def run_all(run_ranks, wanted):
    """Outcome by layout and method, of the layouts and of their references."""
    pairs = dict.fromkeys([*wanted, *((reference_of(layout), method) for layout, method in wanted)])
    found = {}
    for world in sorted({world_of(layout) for layout, _ in pairs}):
        cases = [
            {"name": f"{layout}.{method}", "layout": layout, "extra": [METHODS[method]], "steps": STEPS}
            for layout, method in pairs
            if world_of(layout) == world
        ]
        found.update(run_ranks(world, cases))
    return found


@pytest.fixture(scope="module")
def few(run_ranks):
    return run_all(run_ranks, FEW)


@pytest.fixture(scope="module")
def many(run_ranks):
    return run_all(run_ranks, MANY)


def check(outcomes, layout: str, method: str) -> None:
    reference = outcomes[f"{reference_of(layout)}.{method}"].check()
    ours = outcomes[f"{layout}.{method}"].check()
    found, wrong = ours.assemble("end")
    wanted, _ = reference.assemble("end")
    start, _ = reference.assemble("start")
    assert wrong == []  # every element is held, copies are bitwise the same
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= 1e-6, name
    assert max(float((wanted[name] - start[name]).abs().max()) for name in wanted) > 1e-5
    for rank in ours.ranks:
        assert rank["losses"] == pytest.approx(reference.ranks[0]["losses"], abs=2e-6)
        assert rank["losses"] == ours.ranks[0]["losses"] and not any(rank["skipped"])


@pytest.mark.parametrize(("layout", "method"), FEW)
def test_the_same_parameters(few, layout: str, method: str) -> None:
    check(few, layout, method)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "method"), MANY)
def test_the_same_parameters_on_other_layouts(many, layout: str, method: str) -> None:
    check(many, layout, method)


def test_shards_do_not_move_alike(few) -> None:
    """Noise by the shape of a shard would repeat itself on the other one."""
    found, _ = few["tp2.mezo"].check().assemble("end")
    start, _ = few["tp2.mezo"].assemble("start")
    moved = found["layers.0.mlp.gate.weight"] - start["layers.0.mlp.gate.weight"]
    first, second = moved.chunk(2)
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.1
