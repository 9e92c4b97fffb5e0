"""NxD's known bugs: that the adapter does not have them, and that NxD still has. Where an assertion about NxD
itself fails, the bug is gone and so can be the work-around.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.nxd

ZERO1 = ["parallel.dp=2", "parallel.zero1=true", "data.micro_batch=4"]
CASES = [
    {"name": "input_gradient", "job": "input_gradient"},
    {"name": "dtypes", "job": "dtypes"},
    {"name": "ignored", "job": "ignored"},
    {"name": "clipping", "job": "clipping", "overrides": ZERO1},
]
CASES += [{"name": "flat_and_rows", "job": "flat_and_rows", "overrides": ZERO1}]
FLASH = [{"name": "flash", "job": "flash"}]
MODES = pytest.mark.parametrize("mode", ["cpu-mode", "xla-mode"])


@MODES
def test_input_gradients_are_summed_in_bf16(mode: str, nxd_result: Callable) -> None:
    errors = nxd_result(mode, 2, CASES, "input_gradient")
    assert errors["adapter"] < 0.02
    assert errors["default"] > 0.2, "NxD sums them now with any reduce_dtype"


@MODES
def test_every_layer_computes_in_its_dtype(mode: str, nxd_result: Callable) -> None:
    found = nxd_result(mode, 2, CASES, "dtypes")
    assert found["adapter"] == "torch.bfloat16" and found["parameters"] == ["torch.bfloat16"]
    assert found["cast"] == "torch.float32", "NxD's layers now follow a cast"


@MODES
def test_ignored_targets_count_nothing(mode: str, nxd_result: Callable) -> None:
    found = nxd_result(mode, 2, CASES, "ignored")
    assert found["loss"] == 0 and found["gradient"] == 0
    assert found["nxd"] > 0, "NxD's cross-entropy knows ignored targets now"


@MODES
def test_clipping_uses_the_recipe(mode: str, nxd_result: Callable) -> None:
    found = nxd_result(mode, 2, CASES, "clipping")
    assert found["length"] == pytest.approx(0.05, rel=1e-3)
    assert found["nxd"] == 1.0, "NxD's ZeRO-1 would clip to this"


@MODES
def test_flat_buckets_and_nxds_zero1_agree(mode: str, nxd_result: Callable) -> None:
    found = nxd_result(mode, 2, CASES, "flat_and_rows")
    assert found["kinds"]
    for a, b in zip(found["rows"], found["flat"], strict=True):
        assert a == pytest.approx(b, rel=1e-6)


@pytest.mark.parametrize("mode", ["cpu-mode"])
def test_flash_attention(mode: str, nxd_result: Callable) -> None:
    found = nxd_result(mode, 1, FLASH, "flash")
    assert "flash_fwd" in found["without"] and "flash_fwd" in found["refused"]
    assert found["with"] == "" and found["chosen"]
    assert max(found["errors"]) < 1e-5
