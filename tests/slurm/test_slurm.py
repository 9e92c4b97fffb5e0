"""`hlat launch slurm` on a real cluster of two nodes: restart, requeue, exit codes, job arrays.

Every disturbed run must end with the losses of the undisturbed one, to the last bit.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
RECIPE = f"""
run: {{steps: {STEPS}, seed: 3}}
model: {{layers: 2, hidden: 128, heads: 4, kv_heads: 4, ffn: 256, vocab: 257, max_seq_len: 128}}
data: {{sources: [{{path: text}}], tokenizer: bytes, micro_batch: 8, global_batch: 32, holdout: 0.2}}
precision: {{compute: fp32}}
optim: {{lr: 1e-3}}
schedule: {{warmup_steps: 5}}
checkpoint: {{every: 10, keep: 2}}
eval: {{every: 0}}
log: {{every: 1}}
compile: false
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A working directory with a recipe and text, seen by both nodes."""
    folder = tmp_path_factory.mktemp("it's $(touch x) 100%")
    (folder / "small.yaml").write_text(RECIPE)
    (folder / "text").mkdir()
    for i in range(40):
        (folder / f"text/{i}.txt").write_text(f"document {i}: " + f"the quick brown fox {i * i}. " * 40)
    return folder


def launch(slurm, place: Path, *words: str) -> str:
    """The id of the job that `hlat launch slurm` submits."""
    command = [sys.executable, "-m", "hlat", "launch", "slurm", "small.yaml", "--nproc-per-node", "1"]
    done = subprocess.run(
        [*command, "--interface", "lo", "--grace", "60", *words],
        env=slurm.environ,
        cwd=place,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    job, _, file = done.stdout.removeprefix("submitted job ").strip().partition(": ")
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", file], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout
    return job


def rows(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [row for row in map(json.loads, lines) if row["kind"] == "train"]


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(folder)]


def said(folder: Path) -> str:
    """What the job's script and its nodes wrote, for the message of a failed test."""
    files = [*folder.glob("launch/*.out"), *folder.glob("logs/slurm/**/*.txt")]
    return "\n".join(f"--- {file}\n{file.read_text()}" for file in sorted(files))


def wait_for_step(slurm, folder: Path, step: int) -> None:
    slurm.until(lambda: len(rows(folder)) >= step, 90, f"step {step} in {folder}\n{said(folder)}")


def ranks(job: str) -> dict[int, int]:
    """Process ids of a job's training processes, by rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            environ = dict(
                item.split(b"=", 1) for item in (entry / "environ").read_bytes().split(b"\0") if b"=" in item
            )
        except OSError:
            continue
        if b"train" in words and environ.get(b"SLURM_JOB_ID") == job.encode() and b"RANK" in environ:
            found[int(environ[b"RANK"])] = int(entry.name)
    return found


def starts(folder: Path) -> int:
    """How often training has begun in a run folder."""
    file = folder / "environment.json"
    return len(json.loads(file.read_text())["starts"]) if file.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(slurm, place: Path) -> list[tuple[int, float, float]]:
    """Losses of a run that nothing happens to."""
    job = launch(slurm, place, "--nodes", "2", "run.dir=undisturbed")
    fields = slurm.wait(job)
    folder = place / "undisturbed"
    assert (fields["JobState"], fields["ExitCode"]) == ("COMPLETED", "0:0"), said(folder)
    assert fields["NodeList"] == "node[1-2]"
    logs = sorted(path.name for path in (folder / f"logs/slurm/job-{job}/attempt-0").iterdir())
    assert logs == ["exit-code-0", "exit-code-1", "node-0-node1.txt", "node-1-node2.txt"]
    found = losses(folder)
    assert [step for step, *_ in found] == list(range(1, STEPS + 1))
    assert found[-1][1] < found[0][1] - 0.3
    assert not list(place.rglob("x"))
    return found


def test_a_killed_worker_and_the_time_limit(slurm, place: Path, undisturbed) -> None:
    """One run has both: the supervisors start again within the job, then SLURM starts the job again."""
    job = launch(slurm, place, "--nodes", "2", "run.dir=disturbed")
    folder = place / "disturbed"
    wait_for_step(slurm, folder, 15)
    os.kill(ranks(job)[1], signal.SIGKILL)
    slurm.until(lambda: starts(folder) == 2, 90, f"a second start\n{said(folder)}")
    wait_for_step(slurm, folder, 25)
    slurm.output("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@60 makes SLURM do
    fields = slurm.wait(job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("COMPLETED", "0:0", "1"), said(
        folder
    )
    assert starts(folder) == 3 and "stopped by a signal; requeue 1 of 50" in said(folder)
    codes = [(folder / f"logs/slurm/job-{job}/attempt-0/exit-code-{node}").read_text() for node in range(2)]
    assert codes == ["75\n", "75\n"] and losses(folder) == undisturbed


def test_a_cancelled_job_saves_and_stays_cancelled(slurm, place: Path) -> None:
    job = launch(slurm, place, "--nodes", "1", "run.dir=cancelled")
    folder = place / "cancelled"
    wait_for_step(slurm, folder, 5)
    slurm.output("scancel", job)
    fields = slurm.wait(job)
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0"), said(folder)
    last = rows(folder)[-1]["step"]
    assert (folder / f"checkpoints/step-{last:08d}").is_dir(), said(folder)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["optim.lr=1e30", "schedule.warmup_steps=0", "guard.patience=3"], 3),  # the guard gives up
        (["data.sources=[{path: nowhere}]"], 2),  # shows on the nodes only
    ],
)
def test_a_failing_run_is_a_failed_job(slurm, place: Path, words: list[str], code: int) -> None:
    job = launch(slurm, place, "--nodes", "1", f"run.dir=failed-{code}", *words)
    fields = slurm.wait(job)
    folder = place / f"failed-{code}"
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", f"{code}:0", "0"), said(
        folder
    )
    assert f"failed with exit code {code}" in said(folder)


def test_all_scripts_pass_shellcheck(slurm, place: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: make test-slurm installs it")
    neuron = ["backend=nxd", "data.global_batch=512", "--nodes", "2"]
    hlat = [sys.executable, "-m", "hlat", "launch"]
    scripts = []
    for words in (
        ["slurm", "small.yaml", *neuron],
        ["slurm", "small.yaml", "optim.lr=[1e-3, 2e-3]", "--seeds", "2", *neuron],
        ["torchrun", "small.yaml", *neuron],
    ):
        done = subprocess.run(
            [*hlat, *words, "--dry-run"], cwd=place, capture_output=True, text=True, env=slurm.environ
        )
        assert done.returncode == 0, done.stderr
        scripts += [f"#!/bin/bash\n{text}" for text in done.stdout.split("#!/bin/bash\n")[1:]]
    scripts.append("#!/bin/bash\n" + (ROOT / "launch/templates/exitcode.sh").read_text())
    assert len(scripts) == 6
    for text in scripts:
        checked = subprocess.run(["shellcheck", "-"], input=text, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


def test_a_bad_node_is_excluded(slurm, place: Path) -> None:
    """The supervisor is a stand-in here: no node of this machine is bad."""
    stand_in = place / "python"
    bad = place / "bad/logs/supervisor/bad-nodes.txt"
    stand_in.write_text(
        f'#!/bin/bash\n[[ $SLURMD_NODENAME == node1 ]] || exit 0\necho node1 >"{bad}"\nexit 76\n'.replace(
            "$(", "\\$("
        )
    )
    stand_in.chmod(0o755)
    bad.parent.mkdir(parents=True)
    job = launch(slurm, place, "--nodes", "1", "run.dir=bad", "--python", str(stand_in))
    fields = slurm.wait(job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("COMPLETED", "0:0", "1"), said(
        place / "bad"
    )
    assert (fields["ExcNodeList"], fields["NodeList"]) == ("node1", "node2")


def test_a_sweep_as_a_job_array(slurm, place: Path) -> None:
    words = [
        "optim.lr=[1e-3, 2e-3]",
        "run.steps=5",
        "--seeds",
        "1",
        "--out",
        "grid $(touch x)",
        "--nodes",
        "1",
    ]
    job = launch(slurm, place, *words)
    for task in range(2):
        fields = slurm.wait(f"{job}_{task}")
        assert (fields["JobState"], fields["ExitCode"]) == ("COMPLETED", "0:0"), said(
            place / "grid $(touch x)"
        )
    command = [sys.executable, "-m", "hlat", "sweep", "small.yaml", *words[:-2]]
    began = time.monotonic()
    done = subprocess.run(command, env=slurm.environ, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[1/2]" not in done.stdout and "[2/2]" not in done.stdout, "trained again"
    assert time.monotonic() - began < 60 and not list(place.rglob("x"))
