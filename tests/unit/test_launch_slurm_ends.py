"""How a SLURM job of `hlat launch` ends: exit codes, requeues, signals, bad nodes."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from hlat.launch import slurm
from hlat.supervise import exits


@pytest.mark.parametrize(
    ("codes", "exit_code", "requeued"),
    [
        ("0 0", 0, False),
        ("2 2", 2, False),
        ("3 1", 3, False),
        ("1 3", 3, False),
        ("75 2", 2, False),
        ("1 75", 1, False),
        ("1 143", 1, False),
        ("127 127", 127, False),
        ("130 130", 130, False),
        ("130 137", 130, False),
        ("127 75", 127, False),
        ("75 75", 75, True),
        ("75 0", 75, True),
        ("137 75", 75, True),
        ("137 0", 137, True),
        ("76 1", 76, True),
        ("77 77", 77, False),
        ("75 77", 77, False),
        ("76 77", 77, False),
    ],
)
def test_exit_codes(small_recipe, stub_cluster, codes: str, exit_code: int, requeued: bool) -> None:
    script = slurm.train_script(stub_cluster.plan(small_recipe), slurm.Options(), stub_cluster.folder)
    done = stub_cluster.run(script, CODES=codes)
    assert done.returncode == exit_code, done.stderr
    assert stub_cluster.calls("scontrol requeue") == ["scontrol requeue 7"] * requeued


CODES = (0, 1, 2, 3, 75, 76, 77, 126, 127, 129, 130, 134, 137, 143)


def test_the_script_and_the_supervisor_agree_which_code_decides(small_recipe, stub_cluster) -> None:
    """Over all pairs, and three of a kind: as the documentation orders them."""
    script = slurm.train_script(stub_cluster.plan(small_recipe), slurm.Options(), stub_cluster.folder)
    function = re.search(r"^decide\(\) \{.*?^\}$", script, re.MULTILINE | re.DOTALL)
    assert function is not None
    sets = [*itertools.product(CODES, CODES), *itertools.combinations((137, 75, 127, 76, 1, 130), 3)]
    calls = "\n".join(f"decide {' '.join(map(str, codes))}" for codes in sets)
    text = f"set -euo pipefail\n{function[0]}\n{calls}\n"
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=60, check=True)
    assert list(map(int, done.stdout.split())) == [exits.decisive(codes) for codes in sets]


def test_which_code_decides_is_what_the_page_says() -> None:
    """Each row of its table decides before all rows below it, and starts the job again or does not."""
    page = (Path(__file__).resolve().parents[2] / "docs/operations/launch.md").read_text()
    table = page.partition("### How a job ends")[2].partition("###")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in table.splitlines() if "|" in line][2:]
    known = {"other codes below 128": 127, "128 and more": 137}
    codes = {known[code] if code in known else int(code): what for code, _, what in rows if code != "none"}
    assert set(codes) == {0, 1, 2, 3, 75, 76, 77, 127, 130, 137}
    for first, second in itertools.combinations(codes, 2):
        assert exits.decisive([first, second]) == exits.decisive([second, first]) == first, (first, second)
    for code, what in codes.items():
        assert exits.starts_again(code) == what.startswith("requeues"), (code, what)


@pytest.mark.parametrize(
    ("srun", "codes", "exit_code", "requeued"),
    [("137", "75", 75, True), ("137", "0", 137, True), ("143", "1", 1, False), ("1", "0", 1, False),
     ("137", "garbage", 137, True)],
)  # fmt: skip
def test_a_node_that_says_nothing(
    small_recipe, stub_cluster, srun: str, codes: str, exit_code: int, requeued: bool
) -> None:
    """It was killed with its shell: srun alone tells of it."""
    stub_cluster.write(
        "srun", f'logs=$(ls -d runs/*/logs/slurm/*/*); echo {codes} >"$logs/exit-code-0"; exit {srun}'
    )
    plan = stub_cluster.plan(small_recipe)
    script = slurm.train_script(plan, slurm.Options(), stub_cluster.folder)
    done = stub_cluster.run(script)
    assert done.returncode == exit_code, done.stderr
    assert len(stub_cluster.calls("scontrol requeue")) == requeued


def test_a_step_that_does_not_start_is_tried_again(small_recipe, stub_cluster) -> None:
    stub_cluster.write("srun", "echo 'srun: error: Unable to create step' >&2; exit 1")
    done = stub_cluster.run(
        slurm.train_script(stub_cluster.plan(small_recipe), slurm.Options(), stub_cluster.folder)
    )
    assert done.returncode == 1 and stub_cluster.calls("scontrol requeue") == ["scontrol requeue 7"]
    assert "no node could start (exit code 1); requeue 1 of 50" in done.stderr


def test_the_restart_budget(small_recipe, stub_cluster) -> None:
    script = slurm.train_script(
        stub_cluster.plan(small_recipe, max_requeues=3), slurm.Options(), stub_cluster.folder
    )
    done = stub_cluster.run(script, CODES="75 75", SLURM_RESTART_COUNT="2")
    assert "requeue 3 of 3" in done.stderr and len(stub_cluster.calls("scontrol requeue")) == 1
    done = stub_cluster.run(script, CODES="75 75", SLURM_RESTART_COUNT="3")
    assert done.returncode == 75 and "all 3 requeues are used up" in done.stderr
    assert len(stub_cluster.calls("scontrol requeue")) == 1


def test_bad_nodes_are_excluded_besides_the_others(small_recipe, stub_cluster) -> None:
    plan = stub_cluster.plan(small_recipe)
    script = slurm.train_script(plan, slurm.Options(), stub_cluster.folder)
    bad = plan.run_dir / "logs/supervisor/bad-nodes.txt"
    bad.parent.mkdir(parents=True)
    bad.write_text("node2\n$(touch x)\n--help\nip-10-0-0-7.stub_cluster.internal\nnode8.x")
    assert stub_cluster.run(script, CODES="1 76", EXCLUDED="node[5-6]").returncode == 76
    assert stub_cluster.calls("scontrol update") == [
        "scontrol update JobId=7 ExcNodeList=node[5-6],node2,q-7,node8"
    ]
    order = [
        line.split()[1] for line in stub_cluster.calls("scontrol") if line.split()[1] in ("requeue", "update")
    ]
    assert order == ["requeue", "update"]  # SLURM refuses to exclude nodes from a job that runs


def wait_for_nodes(stub_cluster) -> None:
    end = time.monotonic() + 30
    while len(list(stub_cluster.record.glob("pid-*"))) < 2:
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("signalled", ["pid", "task"])  # every process, or a task's first as with cgroups
def test_before_the_time_limit_the_state_is_saved(small_recipe, stub_cluster, signalled: str) -> None:
    script = slurm.train_script(stub_cluster.plan(small_recipe), slurm.Options(), stub_cluster.folder)
    process = stub_cluster.start(script, CODES="wait wait", SIGNALLED=signalled)
    wait_for_nodes(stub_cluster)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 75
    assert stub_cluster.calls("scancel") == ["scancel --signal=TERM 7"]
    assert stub_cluster.calls("scontrol requeue") == ["scontrol requeue 7"]


@pytest.mark.parametrize(("reason", "requeued"), [("None", False), ("TimeLimit", True)])
def test_a_cancelled_job_is_not_requeued(small_recipe, stub_cluster, reason: str, requeued: bool) -> None:
    script = slurm.train_script(stub_cluster.plan(small_recipe), slurm.Options(), stub_cluster.folder)
    process = stub_cluster.start(script, CODES="wait wait", REASON=reason)
    wait_for_nodes(stub_cluster)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    for file in stub_cluster.record.glob("pid-*"):  # SLURM signals the step as well
        os.kill(int(file.read_text()), signal.SIGTERM)
    assert process.wait(30) == 75
    assert len(stub_cluster.calls("scontrol requeue")) == requeued
