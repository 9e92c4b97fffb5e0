"""The NxD backend trains as the native one does in one process: loss and gradient norm of four steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.nxd

ACCUMULATE = "data.micro_batch=2"
CASES = {
    2: {
        "tp2": ["parallel.tp=2"],
        "tp2-sequence": ["parallel.tp=2", "parallel.sequence=true"],
        "pp2": ["parallel.pp=2", ACCUMULATE],
        "pp2-tied-masked": [
            "parallel.pp=2",
            ACCUMULATE,
            "model.tie_embeddings=true",
            "data.document_mask=true",
        ],
        "dp2": ["parallel.dp=2", "data.micro_batch=4"],
        "dp2-zero1": ["parallel.dp=2", "parallel.zero1=true", "data.micro_batch=4"],
        "dp2-zero1-accumulate": ["parallel.dp=2", "parallel.zero1=true", ACCUMULATE],
        "tp2-accumulate-masked": ["parallel.tp=2", ACCUMULATE, "data.document_mask=true"],
        "tp2-sequence-selective": ["parallel.tp=2", "parallel.sequence=true", "parallel.recompute=selective"],
        "tp2-full": ["parallel.tp=2", "parallel.recompute=full"],
        "tp2-kv1": ["parallel.tp=2", "model.kv_heads=1"],
        "tp2-kv1-sequence": ["parallel.tp=2", "model.kv_heads=1", "parallel.sequence=true"],
        "tp2-tied": ["parallel.tp=2", "model.tie_embeddings=true", "parallel.sequence=true"],
        "tp2-part-trained": ["parallel.tp=2", 'train_only=["layers.1.*", "norm.weight"]'],
    },
    4: {
        "tp2-dp2-zero1": ["parallel.tp=2", "parallel.zero1=true", ACCUMULATE],
        "tp2-dp2-zero1-sequence": [
            "parallel.tp=2",
            "parallel.zero1=true",
            "parallel.sequence=true",
            ACCUMULATE,
        ],
        "tp2-pp2": ["parallel.tp=2", "parallel.pp=2", ACCUMULATE],
        "tp2-pp2-sequence-full": [
            "parallel.tp=2",
            "parallel.pp=2",
            "parallel.sequence=true",
            "parallel.recompute=full",
            ACCUMULATE,
        ],
        "dp2-pp2-zero1": ["parallel.pp=2", "parallel.zero1=true", "data.micro_batch=1"],
        "tp4-kv2": ["parallel.tp=4"],
    },
}
# The XLA mode compiles every case: those that are another path through NxD.
XLA = {
    2: (
        "tp2",
        "tp2-sequence-selective",
        "tp2-full",
        "pp2",
        "dp2-zero1-accumulate",
        "tp2-kv1",
        "tp2-sequence",
    ),
    4: ("tp2-dp2-zero1", "tp2-pp2"),
}
BF16 = "precision.compute=bf16"
LOW = {
    "tp2-bf16": ["parallel.tp=2", BF16],
    "tp2-sequence-bf16": ["parallel.tp=2", "parallel.sequence=true", BF16],
    "pp2-bf16": ["parallel.pp=2", ACCUMULATE, BF16],
    "dp2-zero1-bf16": ["parallel.dp=2", "parallel.zero1=true", "data.micro_batch=4", BF16],
    "dp2-stochastic": [
        "parallel.dp=2",
        "data.micro_batch=4",
        "precision={compute: bf16, master: none, states: bf16, accumulate: bf16, reduce: bf16}",
        "precision.rounding=stochastic",
    ],
}
IDS = [(mode, world, name) for world, group in CASES.items() for name in group for mode in ("cpu-mode",)]
IDS += [("xla-mode", world, name) for world, names in XLA.items() for name in names]
LOW_IDS = [("cpu-mode", name) for name in LOW] + [
    ("xla-mode", name) for name in ("tp2-bf16", "dp2-zero1-bf16", "dp2-stochastic")
]


def jobs(mode: str, world: int) -> list[dict[str, object]]:
    names = CASES[world] if mode == "cpu-mode" else XLA[world]
    cases = {name: CASES[world][name] for name in names}
    if world == 2:
        cases |= {name: LOW[name] for m, name in LOW_IDS if m == mode}
    return [{"name": name, "job": "train", "overrides": words} for name, words in cases.items()]


@pytest.fixture
def native(tiny_run: Callable[..., object], train_steps: Callable[..., list[tuple[float, float]]]) -> object:
    def run(words: list[str]) -> list[tuple[float, float]]:
        alone = [w for w in words if not w.startswith(("parallel", "data.micro_batch"))]
        return train_steps(tiny_run("model.vocab=96", *alone), 4)

    return run


def worst(ours: list[list[float]], theirs: list[tuple[float, float]]) -> float:
    pairs = [(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    return max(abs(a - b) / abs(b) for a, b in pairs)


@pytest.mark.parametrize(("mode", "world", "name"), IDS, ids=[f"{m}-{n}" for m, _, n in IDS])
def test_fp32(mode: str, world: int, name: str, nxd_result: Callable, native: Callable) -> None:
    ours = nxd_result(mode, world, jobs(mode, world), name)
    assert worst(ours, native(CASES[world][name])) < 1e-5


@pytest.mark.parametrize(("mode", "name"), LOW_IDS, ids=[f"{m}-{n}" for m, n in LOW_IDS])
def test_bf16(mode: str, name: str, nxd_result: Callable, native: Callable) -> None:
    ours = nxd_result(mode, 2, jobs(mode, 2), name)
    assert worst(ours, native(LOW[name])) < 3e-3
