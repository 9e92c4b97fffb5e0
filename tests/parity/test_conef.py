"""Compressed reductions over real groups: two and four gloo ranks, against one process that computes the same
from definitions. `conef_ranks.py` says what each case is, `conef_simulation.py` computes them again.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RANKS, SIMULATION = (Path(__file__).with_name(f"conef_{name}.py") for name in ("ranks", "simulation"))
Result = Callable[..., dict[str, Any]]


def run(commands: list[tuple[list[str], dict[str, str]]], seconds: float, logs: Path) -> None:
    """Run programs at the same time; fail with what they said when one fails or time is up."""
    processes = []
    for i, (arguments, extra) in enumerate(commands):
        with open(logs / f"log-{len(commands)}-{i}", "w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | extra
            command = [sys.executable, *arguments]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    deadline = time.monotonic() + seconds
    try:
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            if any(p.poll() for p in processes):
                deadline = min(deadline, time.monotonic() + 10)
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    texts = [f.read_text() for f in [*logs.glob("*.error"), *logs.glob(f"log-{len(commands)}-*")]]
    assert all(p.returncode == 0 for p in processes), "\n\n".join(text[-2000:] for text in texts)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A function (case, rank or "sim") -> what it left. All cases are run once."""
    folder = tmp_path_factory.mktemp("conef")
    for world in (2, 4):
        ranks = [
            ([str(RANKS), str(folder)], {"RANK": str(rank), "WORLD_SIZE": str(world)})
            for rank in range(world)
        ]
        run(ranks, 300, folder)
    run([([str(SIMULATION), str(folder)], {})], 200, folder)

    def read(name: str, rank: int | str = 0) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((folder / f"{name}.{rank}.json").read_text())
        return values

    return read


def gap(a: dict[str, Any], b: dict[str, Any], key: str = "losses") -> float:
    return max(abs(x - y) for x, y in zip(a[key], b[key], strict=False))


@pytest.mark.parametrize("name", ["dp2", "dp2-exact", "dp2-adamw", "dp4", "dp2-tp2", "dp2-pp2"])
def test_ranks_compute_what_one_process_does(result: Result, name: str) -> None:
    assert gap(result(name), result(name, "sim")) < 1e-6
    found, wanted = result(name)["norms"], result(name, "sim")["norms"]
    assert found == pytest.approx(wanted, rel=2e-5)
    assert len(set(result(name)["losses"])) == len(result(name)["losses"])


def test_parameters_stay_bitwise_equal_while_errors_differ(result: Result) -> None:
    one, other = result("dp2", 0), result("dp2", 1)
    assert len(one["weights"]) == 50 and one["weights"] == other["weights"]
    assert len(set(one["weights"])) == 50
    assert all(a != b for a, b in zip(one["errors"][3:], other["errors"][3:], strict=True))
    four = [result("dp4", rank) for rank in range(4)]
    assert all(rank["weights"] == four[0]["weights"] for rank in four)
    assert len({rank["errors"][-1] for rank in four}) == 4


@pytest.mark.parametrize("kind", ["", "-topk", "-sign", "-int8", "-powersgd", "-rounded", "-exact"])
def test_zero1_changes_nothing(result: Result, kind: str) -> None:
    plain, sharded = result(f"dp2{kind}"), result(f"dp2-zero1{kind}")
    assert gap(plain, sharded) < 1e-6
    assert sharded["weights"] == result(f"dp2-zero1{kind}", 1)["weights"]
    steps = min(len(plain["wire"]), len(sharded["wire"]))
    assert plain["losses"][:1] == pytest.approx(sharded["losses"][:1], abs=1e-6) and steps >= 8


def test_zero1_changes_nothing_with_tensor_parallelism_and_four_replicas(result: Result) -> None:
    assert gap(result("dp2-tp2"), result("dp2-tp2-zero1")) < 1e-6
    assert gap(result("dp4"), result("dp4-zero1")) < 1e-6


def test_accumulation_changes_nothing(result: Result) -> None:
    assert gap(result("dp2"), result("dp2-accumulate2")) < 1e-6


@pytest.mark.parametrize("name", ["dp2-tp2", "dp2-pp2"])
def test_other_buckets_learn_as_well(result: Result, name: str) -> None:
    """Loss after 40 steps on the same rows, and the mean of the last 10 of them."""
    assert result(name)["held_out"] == pytest.approx(result("dp2")["held_out"], abs=0.02)
    loss = statistics.mean(result(name)["losses"][30:40])
    assert loss == pytest.approx(statistics.mean(result("dp2")["losses"][30:40]), abs=0.02)
    assert loss < result(name)["losses"][0] - 0.6


def test_the_identity_store_is_error_feedback_bitwise(result: Result) -> None:
    one, other = result("dp2-exact"), result("dp2-identity")
    for key in ("losses", "weights", "errors"):
        assert one[key] == other[key]


def test_ratio_one_equals_dense(result: Result) -> None:
    assert gap(result("dp2-ratio1"), result("dp2-dense")) < 1e-6


def test_compression_is_not_dense(result: Result) -> None:
    """The comparisons above can fail: after the dense steps each kind goes its own way."""
    kinds = ["dp2", "dp2-exact", "dp2-topk", "dp2-sign", "dp2-int8", "dp2-powersgd", "dp2-rounded"]
    losses = {kind: result(kind)["losses"] for kind in [*kinds, "dp2-dense"]}
    assert losses["dp2"][:4] == pytest.approx(losses["dp2-dense"][:4], abs=1e-6)
    assert len({round(values[7], 5) for values in losses.values()}) == len(losses)


def test_wire_bytes_are_the_closed_form(result: Result) -> None:
    matrices, vectors, shards = 44_032, 1_024, 2
    shard = -(-matrices // (1024 * shards)) * 1024
    units = 1408  # of 16 elements
    for name in ("dp2", "dp2-exact"):
        wire, metrics = result(name)["wire"], result(name)["metrics"]
        assert metrics["reduce/dense_bytes"] == 4 * (matrices + vectors)
        assert wire[0] == metrics["reduce/dense_bytes"]
        assert wire[-1] == 4 * (shards * round(0.1 * units) * shard // units + vectors)
        assert wire[-1] == pytest.approx(4 * (0.1 * shards * shard + vectors), rel=0.01)
    assert result("dp2")["metrics"]["reduce/error_bytes"] <= 0.2 * 4 * shards * shard
    assert result("dp2-exact")["metrics"]["reduce/error_bytes"] == 4 * shards * shard
    assert result("dp2")["metrics"]["reduce/error_norm"] > 0


def test_resume_is_bitwise_and_another_layout_starts_with_no_error(result: Result) -> None:
    for rank in (0, 1):
        found = result("resume", rank)
        assert all(found["same"].values()), found["same"]
        assert found["kept"], "ZeRO-1 switched on"
        assert found["empty"] and found["loss"][0] == pytest.approx(found["loss"][1], abs=2e-6)
        said = [line for line in found["said"] if "starts at zero" in line]
        assert said == ["the error starts at zero: saved as dp 2 x pp 1 x tp 1, this is dp 1 x pp 1 x tp 2"]


def test_a_bad_value_that_is_not_sent_skips_the_step_on_all_ranks(result: Result) -> None:
    for rank in (0, 1):
        assert result("skip", rank) == {"skipped": True, "same": True, "more": [False, False]}


def test_the_ddp_hook_is_the_reducer(result: Result) -> None:
    for rank in (0, 1):
        found = result("hook", rank)
        assert len(found["gaps"]) == 14 and max(found["gaps"]) < 1e-6
        assert found["its"]["error_bytes"] == found["own"]["error_bytes"] > 0
        assert found["its"]["error_norm"] == pytest.approx(found["own"]["error_norm"], rel=1e-5)
        # HLAT's bucket of vectors is padded, the hook's message is not
        assert 0 <= found["own"]["wire_bytes"] - found["its"]["wire_bytes"] < 4096
    assert result("hook", 0)["weights"] == result("hook", 1)["weights"]
