"""The shipped recipes on trn1 clusters: they fit the cores, and what one core holds fits its memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hlat.recipe import load

NODES = (16, 32, 64)
CASES = [{"name": f"70b-{nodes}", "job": "stage_of_70b", "nodes": nodes} for nodes in NODES]


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("name", ["hlat-7b", "hlat-70b"])
def test_recipes_validate(name: str, nodes: int) -> None:
    recipe = load(name)
    layout = recipe.layout(32 * nodes)
    assert recipe.backend == "nxd" and layout.world == 32 * nodes
    assert recipe.accumulate(32 * nodes) * recipe.data.micro_batch * layout.dp == recipe.data.global_batch


@pytest.mark.nxd
@pytest.mark.parametrize("nodes", NODES[:1], ids=lambda nodes: f"cpu-mode-{nodes}")
def test_a_stage_of_the_70b_fits_a_core(nodes: int, nxd_result: Callable) -> None:
    found = nxd_result("cpu-mode", 1, CASES[:1], f"70b-{nodes}")
    print("\n" + found["table"])
    assert found["stages"] == list(range(8)) and found["most"] < 16e9
    assert {"GQAQKVColumnParallelLinear", "RowParallelLinear", "ParallelEmbedding"} <= set(found["kinds"])
    # 8 key/value heads on 32 ranks: each head's weights lie on 4 of them.
    assert found["parameters"] * 32 > 68_976_648_192
