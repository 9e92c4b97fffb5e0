"""Compressed reducers in a recipe: refusals, metrics, static graphs, a reducer of another package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hlat.errors import UserError
from hlat.observe.console import wire_text
from hlat.train.step import train_step

CONEF = "reduce={name: conef, start_step: 2}"
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("section", "part"),
    [
        ("{name: conef, compressor: unbiased_block}", "feeding it back diverges; take compressor block"),
        ("{name: conef, beta: 0.5}", "beta 0.5 feeds back 0.5 of a sketch of size 0.2: more than 0.2 of it"),
        ("{name: conef, error: exact, beta: 0.9}", "beta damps the noise of a sketch"),
        ("{name: conef, size: 0.7}", "reduce.size: must be at most 0.5, got 0.7"),
        ("{name: conef, ratio: 0}", "reduce.ratio: must be greater than 0, got 0"),
        ("{name: ef, compressor: unbiased_block}", "reduce.compressor"),
        ("{name: powersgd, ratio: 0.1}", "unknown key 'ratio' for 'powersgd'"),
        ("{name: conef, compressor: tpok}", "reduce.compressor"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(tiny_run, section: str, part: str) -> None:
    with pytest.raises(UserError) as error:
        tiny_run(f"reduce={section}")
    assert part in str(error.value)


@pytest.mark.parametrize("compressor", ["sign", "int8"])
def test_too_many_replicas_for_an_int8_sum_are_refused(compressor: str) -> None:
    from hlat.reduce.choice import Choice

    Choice(compressor, error="exact").check(127)
    with pytest.raises(UserError, match="codes of 128 replicas do not fit in an int8 sum"):
        Choice(compressor, error="exact").check(128)


@pytest.mark.parametrize("optim", ["sgd", "adamw", "mada"])
def test_any_optimizer_takes_what_arrives(tiny_run, train_steps, optim: str) -> None:
    run = tiny_run("reduce={name: conef, start_step: 1}", f"optim={{name: {optim}, lr: 1.0e-3}}")
    losses = [loss for loss, _ in train_steps(run, 5)]
    assert len(set(losses)) == 5 and all(0 < loss < 6 for loss in losses)


def test_unbiased_without_feedback_is_allowed(tiny_run, train_steps) -> None:
    train_steps(tiny_run("reduce={name: conef, compressor: unbiased_block, error: none, start_step: 0}"), 2)


def test_metrics_of_each_step_and_their_line(tiny_run) -> None:
    run = tiny_run(CONEF)
    rows = [{k: float(v) for k, v in train_step(run).items() if "/" in k} for _ in range(4)]
    assert [sorted(row) for row in rows] == [
        ["reduce/dense_bytes", "reduce/error_bytes", "reduce/error_norm", "reduce/wire_bytes"]
    ] * 4
    dense = rows[0]["reduce/dense_bytes"]
    assert [row["reduce/wire_bytes"] for row in rows[:2]] == [dense, dense]
    assert all(row["reduce/wire_bytes"] < 0.2 * dense for row in rows[2:])
    assert [row["reduce/error_norm"] > 0 for row in rows] == [False, False, True, True]
    assert "wire 0.018 of 0.102 MB, error" in wire_text(rows[-1]) or "wire" in wire_text(rows[-1])
    assert wire_text({"loss": 1.0}) == ""


@pytest.mark.parametrize(("below", "kept"), [(0.0, True), (0.5, False), (0.1, True)])
def test_the_error_is_forgotten_when_the_rate_falls_that_far(tiny_run, below: float, kept: bool) -> None:
    run = tiny_run(f"reduce={{name: conef, start_step: 0, reset_below: {below}}}")
    for _ in range(3):
        train_step(run)
    run.schedule = lambda step: 1.0 if step < 3 else 0.25
    run.set_learning_rate()
    cells = [tensor for name, tensor in run.reducer.state().items() if "sketch" in name]
    assert cells and all(bool(tensor.any()) == kept for tensor in cells)


class Operations(TorchDispatchMode):
    """Names and shapes of what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        shapes = [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]
        self.seen.append(f"{func} {shapes}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("error", ["sketch", "exact", "int8", "fp16"])
@pytest.mark.parametrize("compressor", ["block", "topk", "sign", "int8", "lowrank"])
def test_every_step_is_the_same_static_graph(tiny_run, compressor: str, error: str) -> None:
    """No scatter, no atomics, nothing read on the host, the same operations on the same shapes each step."""
    run = tiny_run(f"reduce={{name: conef, start_step: 0, compressor: {compressor}, error: {error}}}")
    traces = []
    for step in range(3):
        for bucket in run.buckets:
            bucket.grad.normal_()
        with Operations() as operations, torch.no_grad():
            run.reducer.begin(step, 1.0)
            run.reducer.reduce(run.buckets)
            run.reducer.health()
            run.reducer.commit(torch.tensor(True))
            run.reducer.metrics()
        traces.append(operations.seen)
    assert traces[0][:0] == [] and traces[1] == traces[2] and len(traces[1]) > 20
    bad = ("scatter", "index_put", "index_add", "index_copy", "_local_scalar", "nonzero", "masked_select")
    assert not [line for line in traces[1] if any(word in line for word in bad)]


PACKAGE = """
import torch
from hlat.reduce.dense import Dense
from hlat.registry import register


@register("reduce", "fp16_sum")
class HalfSum(Dense):
    '''Sum in fp16, scaled.'''

    def __init__(self, dtype, group, *, scale: float = 1024.0):
        super().__init__(torch.float16, group)
        self.scale, self.steps = scale, torch.zeros(())

    def start(self, bucket):
        bucket.grad.mul_(self.scale)
        super().start(bucket)

    def reduce(self, buckets):
        self.steps += 1
        return [shard.float() / self.scale for shard in super().reduce(buckets)]

    def state(self):
        return {"steps": self.steps}

    def metrics(self):
        return {"reduce/half_steps": self.steps}
"""


@pytest.mark.slow
def test_a_reducer_of_another_package(tmp_path: Path) -> None:
    """Found by its entry point, configured by the recipe, in metrics and checkpoint. docs/methods/conef.md
    shows this class.
    """
    site = tmp_path / "site"
    (site / "half_sum-0.1.dist-info").mkdir(parents=True)
    (site / "half_sum.py").write_text(PACKAGE)
    (site / "half_sum-0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: half-sum\nVersion: 0.1\n"
    )
    (site / "half_sum-0.1.dist-info" / "entry_points.txt").write_text("[hlat.plugins]\nhalf = half_sum\n")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{i} times {i} is {i * i}." for i in range(3000)))
    overrides = [
        "reduce={name: fp16_sum, scale: 512.0}",
        f"run.dir={tmp_path / 'run'}",
        "run.steps=3",
        "schedule.warmup_steps=1",
    ]
    overrides += [f"data.sources=[{{path: {text}}}]", "data.tokenizer=bytes", "compile=false", "log.every=1"]
    overrides += [
        "model={layers: 1, hidden: 32, heads: 2, kv_heads: 2, ffn: 64, vocab: 260, max_seq_len: 32}"
    ]
    overrides += ["data.seq_len=32", "data.micro_batch=2", "data.global_batch=4", "data.holdout=0"]
    path = os.pathsep.join([str(site), str(ROOT)])
    command = [sys.executable, "-m", "hlat", "train", "tiny", *overrides]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr + done.stdout
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [r["reduce/half_steps"] for r in rows if r["kind"] == "train"] == [1, 2, 3]
    refused = subprocess.run(
        [*command, "reduce.scal=1"], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert refused.returncode == 2 and "unknown key 'scal' for 'fp16_sum'" in refused.stderr


@pytest.mark.slow
def test_the_ddp_example_trains(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "methods" / "conef.md").read_text(encoding="utf-8")
    example = next(b for b in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S) if "conef_hook" in b)
    assert len(example.splitlines()) < 40
    (tmp_path / "example.py").write_text(example)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "example.py")], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("step")]
    losses = [float(row[3]) for row in rows]
    assert len(rows) == 4 and losses[-1] < 0.5 * losses[0]
    assert int(rows[-1][5]) < 0.2 * 4 * (32 * 256 + 256 + 256 * 8 + 8) and float(rows[-1][-1]) > 0


def test_the_documented_reducer_is_the_tested_one() -> None:
    page = (ROOT / "docs" / "methods" / "conef.md").read_text(encoding="utf-8")
    assert PACKAGE.strip().replace("'''", '"""') in page


def test_the_network_benchmark_says_why_it_is_skipped() -> None:
    command = [sys.executable, str(ROOT / "tests" / "bench" / "slow_network.py")]
    done = subprocess.run(command, env={"PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reasons = ("skipped: network namespaces need root", "skipped: ip and tc not found: install iproute2")
    assert done.stdout.strip() in reasons
