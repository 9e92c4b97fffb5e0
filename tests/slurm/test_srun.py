"""`srun hlat train` on a real cluster: the tasks of a step are the ranks of one run.

Every run must end with the losses of the one that torchrun starts.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slurm

STEPS = 12
RECIPE = f"""
run: {{steps: {STEPS}, seed: 3}}
model: {{layers: 1, hidden: 64, heads: 2, kv_heads: 2, ffn: 128, vocab: 257, max_seq_len: 64}}
data: {{sources: [{{path: text}}], tokenizer: bytes, micro_batch: 2, global_batch: 8, holdout: 0}}
precision: {{compute: fp32}}
schedule: {{name: constant}}
checkpoint: {{every: 4, keep: 2}}
eval: {{every: 0}}
log: {{every: 1}}
compile: false
"""
TRAIN = f"{sys.executable} -m hlat train small.yaml"
COUNT = f"{sys.executable} -c 'from hlat.backend.cluster import join; print(join().world)'"
WHERE = (
    f"{sys.executable} -c 'import os; from hlat.backend.launcher import launcher_variables as of;"
    ' place = of(os.environ); print(place["RANK"], place["WORLD_SIZE"], place["LOCAL_WORLD_SIZE"],'
    ' place["MASTER_ADDR"], place["MASTER_PORT"])\''
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("srun")
    (folder / "small.yaml").write_text(RECIPE)
    (folder / "text").mkdir()
    for i in range(10):
        (folder / f"text/{i}.txt").write_text(f"document {i}: " + f"the quick brown fox {i * i}. " * 40)
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "train"]


@pytest.fixture(scope="module")
def reference(place: Path) -> list[dict[str, Any]]:
    """What torchrun's two ranks come to."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hlat", "train"]
    words = [sys.executable, *command, "small.yaml", "run.dir=torchrun"]
    done = subprocess.run(words, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return rows(place / "torchrun")


def same(folder: Path, reference: list[dict[str, Any]], said: str) -> None:
    assert (folder / "metrics.jsonl").exists(), said
    found = rows(folder)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1)), said
    for row, other in zip(found, reference, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    assert (folder / f"checkpoints/step-{STEPS:08d}").is_dir()


def submit(slurm, place: Path, name: str, script: str, *options: str) -> str:
    """The id of a job that runs a script in the place."""
    file = place / f"{name}.sh"
    file.write_text(f"#!/bin/bash\ncd {place}\nexport OMP_NUM_THREADS=1\n{script}\n")
    words = ["--parsable", "--open-mode=append", *options, str(file)]
    job = slurm.output("sbatch", f"--output={place}/{name}-%a.out", *words)
    assert job, "sbatch refused it"
    return str(job)


def said(place: Path, name: str) -> str:
    return "\n".join(file.read_text() for file in sorted(place.glob(f"{name}-*.out")))


def address() -> str:
    """The address by which another machine would reach this one; empty where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return ""
        found = str(probe.getsockname()[0])
    return "" if found.startswith("127.") else found


def test_two_steps_at_once(slurm, place: Path, reference) -> None:
    """Two tasks of one node, and one of each of two nodes, side by side by --overlap: two runs. The batch
    script itself, and a step of one task, are one process. Both nodes are this machine, so what their names
    would be good for is tested on MASTER_ADDR.
    """
    meet = address()
    steps = [f"srun --overlap --nodes=1 --ntasks=2 --overcommit {TRAIN} run.dir=one & first=$!"]
    if meet:
        steps += [f"MASTER_ADDR={meet} srun --overlap --nodes=2 --ntasks=2 {TRAIN} run.dir=two || exit 14"]
    lines = [f"{COUNT} >alone || exit 11", f"srun --nodes=1 --ntasks=1 {COUNT} >>alone || exit 12"]
    script = "\n".join([*lines, *steps, "wait $first || exit 13"])
    fields = slurm.wait(submit(slurm, place, "overlap", script, "--nodes=2", "--ntasks=2"))
    text = said(place, "overlap")
    assert (fields["JobState"], fields["ExitCode"]) == ("COMPLETED", "0:0"), text
    assert (place / "alone").read_text().split() == ["1", "1"]
    for name in ("one", "two") if meet else ("one",):
        same(place / name, reference, text)


def test_an_array_and_a_requeue(slurm, place: Path, reference) -> None:
    """Each task of an array has a run; one of them is stopped, and SLURM starts it again."""
    script = f"""
    stop=
    [[ $SLURM_ARRAY_TASK_ID == 1 && ${{SLURM_RESTART_COUNT:-0}} == 0 ]] && stop=run.stop_at_step=5
    srun --nodes=1 --ntasks=2 --overcommit {TRAIN} run.dir=array-$SLURM_ARRAY_TASK_ID $stop || exit 11
    [[ -z $stop ]] || {{ scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"; sleep 60; }}
    """
    job = submit(slurm, place, "array", script, "--array=0-1", "--nodes=1", "--requeue")
    for task, restarts in ((0, "0"), (1, "1")):
        fields = slurm.wait(f"{job}_{task}")
        text = said(place, "array")
        end = (fields["JobState"], fields["ExitCode"], fields["Restarts"])
        assert end == ("COMPLETED", "0:0", restarts), text
        same(place / f"array-{task}", reference, text)


def test_a_heterogeneous_job(slurm, place: Path) -> None:
    """The first component is on the second node: there is rank 0, and there all meet."""
    script = f"srun --het-group=0,1 {WHERE} >places || exit 11\nsrun --het-group=1 {WHERE} >>places"
    parts = [
        "--nodes=1",
        "--ntasks=1",
        "--nodelist=node2",
        ":",
        "--nodes=1",
        "--ntasks=2",
        "--nodelist=node1",
    ]
    fields = slurm.wait(submit(slurm, place, "het", script, *parts))
    text = said(place, "het")
    assert (fields["JobState"], fields["ExitCode"]) == ("COMPLETED", "0:0"), text
    lines = [line.split() for line in (place / "places").read_text().splitlines()]
    both, second = sorted(lines[:3]), sorted(lines[3:])
    assert [line[:4] for line in both] == [
        ["0", "3", "1", "node2"],
        ["1", "3", "2", "node2"],
        ["2", "3", "2", "node2"],
    ]
    assert [line[:4] for line in second] == [["0", "2", "2", "127.0.0.1"], ["1", "2", "2", "127.0.0.1"]]
    ports = [{line[4] for line in step} for step in (both, second)]
    assert len(ports[0]) == len(ports[1]) == 1 and ports[0] != ports[1]


def test_what_one_process_does_is_refused_in_every_task(slurm, place: Path) -> None:
    words = ["--nodes=1", "--ntasks=2", "--overcommit", sys.executable, "-m", "hlat", "generate", "runs/none"]
    done = subprocess.run(
        ["srun", *words, "--prompt", "a"], env=slurm.environ, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr.count("one process does this, and 2 were started") == 2
