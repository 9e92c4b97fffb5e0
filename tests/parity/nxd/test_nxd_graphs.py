"""The number of compiled graphs does not grow, and the guard notices when it does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.nxd

ALONE = [
    {"name": "alone", "job": "graphs", "overrides": []},
    {"name": "shape", "job": "planted", "fault": "shape"},
    {"name": "item", "job": "planted", "fault": "item"},
]
LAYOUTS = {
    "tp2": ["parallel.tp=2"],
    "dp2-zero1": ["parallel.dp=2", "parallel.zero1=true", "data.micro_batch=4"],
    "pp2": ["parallel.pp=2", "data.micro_batch=4"],
    "dp2-zero1-mada": [
        "parallel.dp=2",
        "parallel.zero1=true",
        "data.micro_batch=4",
        "optim={name: mada, hyper_start: 4}",
    ],
    "dp2-mezo_svrg": [
        "parallel.dp=2",
        "data.micro_batch=4",
        "method={name: mezo_svrg, anchor_every: 4, anchor_examples: 16}",
    ],
    "dp2-conef": ["parallel.dp=2", "data.micro_batch=4", "reduce={name: conef, start_step: 5}"],
}
TWO = [{"name": name, "job": "graphs", "overrides": words} for name, words in LAYOUTS.items()]


@pytest.mark.parametrize("name", ["alone", *LAYOUTS], ids=lambda name: f"xla-mode-{name}")
def test_no_graph_after_the_second_step(name: str, nxd_result: Callable) -> None:
    found = (
        nxd_result("xla-mode", 1, ALONE, name) if name == "alone" else nxd_result("xla-mode", 2, TWO, name)
    )
    counts, lines = found["counts"], found["lines"]
    steady = {"dp2-conef": [counts[1:5], counts[6:]], "dp2-mezo_svrg": [counts[5:]]}.get(name, [counts[1:]])
    assert len(counts) == 20 and all(len(set(part)) == 1 for part in steady), counts
    assert found["unexpected"] == 0 and len(lines) >= 2, lines
    if name == "dp2-conef":
        assert counts[5] > counts[4] and lines[-1].endswith("expected: the reducer compresses from here on")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("shape", "a shape or a Python number"), ("item", "read on the host")],
    ids=["xla-mode-shape", "xla-mode-item"],
)
def test_guard_fires_on_a_planted_fault(fault: str, reason: str, nxd_result: Callable) -> None:
    found = nxd_result("xla-mode", 1, ALONE, fault)
    assert reason in found["stopped"]
    assert "compiled" in found["lines"][0] and " s at step 6" in found["lines"][0]
