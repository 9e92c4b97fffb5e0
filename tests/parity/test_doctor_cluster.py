"""Real jobs of three ranks, each a machine of its own: the bad ones are named, everybody ends alike."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("doctor_ranks.py")
RECIPE = """
run: {name: small, steps: 2, seed: 3}
model: {layers: 1, hidden: 16, heads: 2, kv_heads: 2, ffn: 32, vocab: 320, max_seq_len: 16}
data: {sources: [{path: text}], tokenizer: bytes, micro_batch: 2, global_batch: 12}
"""
CALM = ["--slow=20", "--min-bandwidth=0.1"]  # ranks share cores here, and those are busy


def examine(
    folder: Path, mishaps: dict[int, list[str]], *arguments: str, world: int = 3
) -> tuple[list[int], list[str], list[str]]:
    """Start a rank for each machine. Returns statuses, stdout and stderr by rank."""
    (folder / "small.yaml").write_text(RECIPE)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environ = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    environ |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environ |= {"MISHAPS": json.dumps(mishaps), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(PROGRAM), "doctor", "--cluster", "small.yaml", *CALM, *arguments]
    ranks = [
        subprocess.Popen(
            command,
            cwd=folder,
            env=environ | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [process.communicate(timeout=100) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [process.returncode for process in ranks], [out for out, _ in said], [err for _, err in said]


def test_bad_nodes_are_named_and_written(tmp_path: Path) -> None:
    mishaps = {1: ["torch", "memory"], 2: ["slow", "clock", "recipe"]}
    codes, out, _ = examine(tmp_path, mishaps, "--bad-nodes=logs/bad-nodes.txt")
    assert codes == [1, 1, 1], out
    assert (tmp_path / "logs/bad-nodes.txt").read_text() == "node-1\nnode-2\n"
    assert out[1] == out[2] == "" and "2 of 3 nodes are not fit: node-1, node-2; written to logs" in out[0]
    parts = re.split(r"^(node-\d) ", out[0], flags=re.MULTILINE)
    text = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert "checks ok" in text["node-0"] and "fail" not in text["node-0"]
    assert re.search(r"fail software\.torch: 2\.9\.0 instead of 2\.\S+ on node-0 and most", text["node-1"])
    assert "devices.memory: uncorrected memory errors" in text["node-1"] and "speed" not in text["node-1"]
    assert re.search(r"software\.recipe: optim\.lr is 0\.0009 instead of 0?\.", text["node-2"])
    assert re.search(r"clock\.skew: its clock is (?:99|100)\.\d s ahead", text["node-2"])
    assert re.search(r"speed: rank 2: [\d.,]+ ms for a matrix product, the median is", text["node-2"])
    assert "all-reduce over gloo: " in out[0]


@pytest.mark.slow
def test_fit_machines(tmp_path: Path) -> None:
    codes, out, _ = examine(tmp_path, {}, "--json", "--bad-nodes=bad.txt")
    assert codes == [0, 0, 0], out[0]
    result = json.loads(out[0])
    assert result["healthy"] and result["bad_nodes"] == []
    assert result["world"] == 3 and result["group"] == "gloo" and result["bandwidth"] > result["floor"]
    assert (tmp_path / "bad.txt").read_text() == ""


@pytest.mark.slow
def test_a_slow_network_and_its_slow_link(tmp_path: Path) -> None:
    codes, out, _ = examine(tmp_path, {2: ["link"]}, "--min-bandwidth=1e6", world=4)
    assert codes == [1, 1, 1, 1]
    assert re.search(r"allreduce: all-reduce over all ranks: \d+ MB/s, at least 1,000,000", out[0])
    assert "1 of 4 nodes is not fit: node-2" in out[0] and "network.link" in out[0]


@pytest.mark.slow
@pytest.mark.parametrize(("mishap", "words"), [("wrong", "node-1: rank 1: a wrong sum"), ("code", "node-1")])
def test_a_wrong_sum_and_other_code(tmp_path: Path, mishap: str, words: str) -> None:
    codes, out, _ = examine(tmp_path, {1: [mishap]})
    assert codes == [1, 1, 1] and words in out[0]


@pytest.mark.slow
def test_a_rank_that_dies_on_the_way(tmp_path: Path) -> None:
    codes, out, _ = examine(tmp_path, {1: ["killed"]}, "--bad-nodes=bad.txt")
    assert codes == [1, 9, 1]
    assert (
        "devices.answer: rank 1 gave no answer for 30 s" in out[0]
        and "1 of 3 nodes is not fit: node-1" in out[0]
    )
    assert (tmp_path / "bad.txt").read_text() == "node-1\n"


@pytest.mark.slow
def test_a_recipe_nobody_can_read(tmp_path: Path) -> None:
    codes, out, errors = examine(tmp_path, {rank: ["unreadable"] for rank in range(3)})
    assert codes == [2, 2, 2] and "".join(out) == ""
    assert "optim.lr_rate" in errors[0] and errors[1] == errors[2] == ""
    codes, out, _ = examine(tmp_path, {1: ["unreadable"]})
    assert codes == [1, 1, 1] and "recipe.file" in out[0] and "no node is to blame" in out[0]
