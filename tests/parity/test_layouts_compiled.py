"""Compiled layouts: the numbers of one process that is not compiled, and no recompilation after a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

LAYOUTS = ["dp2-zero1", "tp2", "tp2-sequence", "pp2"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(run_ranks) -> Callable[[], dict[str, Any]]:
    """The compiled layouts by name, and "one", a process that is not compiled."""
    one = run_ranks(1, [{"name": "one", "layout": "accumulate1"}])
    cases = [{"name": layout, "layout": layout, "compiled": True} for layout in LAYOUTS]
    return {**one, **run_ranks(2, cases)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_layouts_change_nothing_and_compile_once(outcomes, layout: str) -> None:
    ours, theirs = outcomes[layout].check(), outcomes["one"].check()
    found, trouble = ours.assemble("gradient")
    wanted, _ = theirs.assemble("gradient")
    assert trouble == [] and set(found) == set(wanted)
    for name, want in wanted.items():
        assert float((found[name] - want).abs().max()) <= 1e-5 * float(want.abs().max()), name
    for result in ours.ranks:
        graphs = result["graphs"]
        assert graphs[0] > 0 and len(set(graphs)) == 1, graphs
        assert result["losses"] == pytest.approx(theirs.ranks[0]["losses"], abs=1e-5)
    assert torch.isfinite(torch.tensor(ours.ranks[0]["norms"])).all()
