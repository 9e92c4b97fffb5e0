"""Zeroth-order methods over NxD and torch-xla: the losses of a native run, and few graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.nxd

MEZO = "method={name: mezo, lr: 1e-4}"
SVRG = "method={name: mezo_svrg, lr_anchor: 1e-4, lr_inner: 1e-4, anchor_examples: 16}"
LAYOUTS = {
    "tp2": ["parallel.tp=2"],
    "pp2": ["parallel.pp=2", "data.micro_batch=2"],
    "dp2": ["parallel.dp=2", "data.micro_batch=4"],
}
METHODS = {"mezo": MEZO, "svrg": SVRG}
TWO = {f"{a}-{b}": [*words, text] for a, words in LAYOUTS.items() for b, text in METHODS.items()}
ALONE = [{"name": name, "job": "graphs", "overrides": [text]} for name, text in METHODS.items()]
ALONE += [{"name": "resume", "job": "resume", "overrides": [SVRG]}]


def jobs() -> list[dict[str, object]]:
    return [{"name": name, "job": "train", "overrides": words} for name, words in TWO.items()]


@pytest.mark.parametrize("mode", ["cpu-mode", "xla-mode"])
@pytest.mark.parametrize("name", TWO)
def test_losses_and_slopes(
    mode: str, name: str, nxd_result: Callable, tiny_run: Callable, train_steps: Callable
) -> None:
    """A slope is a difference of losses over 2 mu: fp32 rounding of a loss of 4.6 makes 2e-3 of it."""
    ours = nxd_result(mode, 2, jobs(), name)
    alone = [word for word in TWO[name] if not word.startswith(("parallel", "data"))]
    theirs = train_steps(tiny_run("model.vocab=96", *alone), 4)
    for (loss, slope), (native_loss, native_slope) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(native_loss, abs=1e-5)
        assert slope == pytest.approx(native_slope, abs=4e-3)


@pytest.mark.parametrize("name", METHODS, ids=lambda name: f"xla-mode-{name}")
def test_no_graph_after_anchor_and_inner_step(name: str, nxd_result: Callable) -> None:
    counts = nxd_result("xla-mode", 1, ALONE, name)["counts"]
    assert len(counts) == 20 and len(set(counts[2:])) == 1, counts


def test_resume_xla_mode(nxd_result: Callable) -> None:
    assert nxd_result("xla-mode", 1, ALONE, "resume") == {"losses": True, "tensors": True, "weights": True}
