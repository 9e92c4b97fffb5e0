"""Starting ranks that run the real NxD without Trainium, and what came of each case.

PYTHONPATH names NxD's source and the stand-ins that let it run on a CPU (`nxd_host`, which has two modes).
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("nxd_ranks.py")
NEEDED = ("torch_xla", "neuronx_distributed", "nxd_host")
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def missing() -> str:
    """Why NxD does not import here; empty when it does."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"no module {', '.join(absent)}: see PYTHONPATH" if absent else ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    for item in items:
        if reason and item.get_closest_marker("nxd"):
            item.add_marker(pytest.mark.skip(reason=f"neuronx_distributed does not import: {reason}"))


def run_group(
    mode: str, world: int, cases: Sequence[dict[str, Any]], folder: Path, seconds: float
) -> dict[str, Any]:
    """Result of each case by name: what its job returned on rank 0, or {"error": its traceback}."""
    folder.mkdir(parents=True)
    (folder / "cases.json").write_text(json.dumps(list(cases)))
    start_ranks(mode, world, [str(PROGRAM), str(folder)], folder, seconds)
    return {case["name"]: _result(case["name"], world, folder) for case in cases}


def start_ranks(mode: str, world: int, program: Sequence[str], folder: Path, seconds: float) -> list[int]:
    """Run a Python program on every rank, with its output in rank-<n>.log; the exit statuses."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {
        "OMP_NUM_THREADS": "1",
        "PJRT_DEVICE": "CPU",
        "NXD_CPU_MODE": "1" if mode == "cpu-mode" else "0",
        "NXD_LOG_LEVEL": "error",
        "NEURON_PLATFORM_TARGET_OVERRIDE": "trn1",
        "XLA_FLAGS": XLA_FLAGS,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    ranks = []
    for rank in range(world):
        env = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(folder / f"rank-{rank}.log", "w") as log:
            command = [sys.executable, "-W", "ignore", *program]
            ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    deadline = time.monotonic() + seconds
    try:
        while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
            if any(process.poll() for process in ranks):  # one died: the others would wait for it
                deadline = min(deadline, time.monotonic() + 10)
            time.sleep(0.1)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return [process.returncode for process in ranks]


def _result(name: str, world: int, folder: Path) -> Any:
    errors = sorted(folder.glob(f"{name}.*.error"))
    if errors:
        return {"error": "\n".join(file.read_text() for file in errors)}
    file = folder / f"{name}.json"
    if file.exists():
        return json.loads(file.read_text())
    logs = [(folder / f"rank-{rank}.log").read_text()[-3000:] for rank in range(world)]
    return {"error": f"{name} did not finish; end of the ranks' output:\n" + "\n----\n".join(logs)}


@pytest.fixture(scope="session")
def nxd_results(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A function (mode, world, cases) -> results by name. The same cases run once a session."""
    known: dict[str, dict[str, Any]] = {}

    def run(mode: str, world: int, cases: Sequence[dict[str, Any]], seconds: float = 540) -> dict[str, Any]:
        key = json.dumps([mode, world, list(cases)])
        if key not in known:
            folder = tmp_path_factory.mktemp(f"{mode}-{world}") / "ranks"
            known[key] = run_group(mode, world, cases, folder, seconds)
        return known[key]

    return run


RECIPE = """
run: {{name: trn, dir: {dir}, steps: 8, seed: 3}}
model: {{layers: 2, hidden: 32, heads: 4, kv_heads: 2, ffn: 64, vocab: 320, max_seq_len: 64}}
data: {{sources: [{{path: {text}}}], micro_batch: 4, global_batch: 8, holdout: 0.2}}
parallel: {{dp: 2, zero1: true}}
optim: {{lr: 1e-3}}
schedule: {{name: cosine, warmup_steps: 2}}
checkpoint: {{every: 4}}
eval: {{every: 4, rows: 8}}
log: {{every: 2}}
backend: nxd
"""


@pytest.fixture
def trn_recipe(tmp_path: Path) -> Path:
    """A recipe of two ranks with text to train on; its run folder is `run` beside it."""
    text = tmp_path / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i}.txt").write_text(" ".join(f"word{(i * 7 + j) % 50}" for j in range(60)))
    path = tmp_path / "trn.yaml"
    path.write_text(RECIPE.format(dir=tmp_path / "run", text=text))
    return path


@pytest.fixture
def nxd_start() -> Callable[..., list[int]]:
    """`start_ranks`."""
    return start_ranks


@pytest.fixture
def nxd_result(nxd_results: Callable[..., Any]) -> Callable[..., Any]:
    """A function (mode, world, cases, name) -> that case's result; fails the test with its traceback."""

    def get(mode: str, world: int, cases: Sequence[dict[str, Any]], name: str) -> Any:
        result = nxd_results(mode, world, cases)[name]
        if isinstance(result, dict) and "error" in result:
            pytest.fail(result["error"], pytrace=False)
        return result

    return get
