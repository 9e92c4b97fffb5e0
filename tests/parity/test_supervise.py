"""`hlat supervise` with real ranks: defects, hangs, signals, other machines, its own death."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hlat.observe.jsonl import read_rows
from hlat.supervise.processes import descendants

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import mischief  # noqa: E402

STEPS = 60
RECIPE = f"""
run: {{name: watched, steps: {STEPS}, seed: 3}}
model: {{layers: 2, hidden: 64, heads: 4, kv_heads: 2, ffn: 128, vocab: 320, max_seq_len: 64}}
data: {{sources: [{{path: text}}], tokenizer: bytes, micro_batch: 8, global_batch: 32, holdout: 0.2}}
schedule: {{name: constant}}
objective: {{name: mischief, file: mischief.txt}}
checkpoint: {{every: 5, keep: 3}}
log: {{every: 1}}
compile: false
"""


class Job:
    """Supervised runs in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        (folder / "text").mkdir()
        for number in range(20):
            (folder / "text" / f"{number:02}.txt").write_text(f"{number} the quick brown fox. " * 60)
        (folder / "watched.yaml").write_text(RECIPE)
        (folder / "random.py").write_text("raise SystemExit(0)")  # nothing is imported from here
        mischief.install(folder / "site")
        path = os.pathsep.join([str(folder / "site"), str(ROOT)])
        self.environ = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1",
                        "XDG_CACHE_HOME": str(folder / "cache")}  # fmt: skip
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str, nproc: int = 2) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-m", "hlat", "supervise", "watched.yaml", f"run.dir={self.run}"]
        command += [f"--nproc-per-node={nproc}", "--hang-seconds=8", *arguments]
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environ,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=(self.folder / f"err-{len(self.processes)}.txt").open("w"),
        )
        self.processes.append(process)
        return process

    def errors(self, number: int = -1) -> str:
        number %= len(self.processes)
        return (self.folder / f"err-{number}.txt").read_text()

    def do(self, text: str) -> None:
        partial = self.folder / "mischief.new"
        partial.write_text(text)
        partial.rename(self.folder / "mischief.txt")

    def events(self, name: str = "") -> list[dict[str, Any]]:
        file = self.run / "logs" / "supervisor" / "events.jsonl"
        rows = list(read_rows(file)) if file.exists() else []
        return [row for row in rows if row["event"] == name] if name else rows

    def losses(self) -> list[float]:
        file = self.run / "metrics.jsonl"
        rows = list(read_rows(file)) if file.exists() else []
        return [row["loss"] for row in rows if row["kind"] == "train"]

    def wait_for(self, condition: Callable[[], Any], seconds: float = 90.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.errors()
            time.sleep(0.05)

    def steps(self, count: int) -> None:
        self.wait_for(lambda: len(self.losses()) >= count)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    made = Job(tmp_path)
    yield made
    for process in made.processes:
        for child in [*descendants(process.pid)]:
            os.kill(child.pid, signal.SIGKILL)
        if process.poll() is None:
            process.kill()
        process.wait()


def alive(pids: list[int]) -> list[int]:
    states = {pid: Path(f"/proc/{pid}/stat") for pid in pids}
    return [pid for pid, stat in states.items() if stat.exists() and ") Z" not in stat.read_text()]


def test_a_defect_stops_at_once_and_is_shown(job: Job) -> None:
    job.do("1 raise")
    assert job.start().wait(120) == 1
    (end,) = job.events("end")
    assert (end["kind"], end["rank"]) == ("software", 1) and "a mistake in somebody's code" in end["reason"]
    log = (job.run / "logs" / "supervisor" / "attempt-1" / "rank-00001-stderr.log").read_text()
    assert "Traceback" in log and "a mistake in somebody's code" in log
    assert "exit code 1" in job.errors()


def test_a_signal_saves_and_asks_to_be_queued_again(job: Job) -> None:
    process = job.start()
    job.steps(8)
    ranks = [child.pid for child in descendants(process.pid)]
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 75, job.errors()
    assert alive(ranks) == [] and "state saved" in job.errors()
    reached = len(job.losses())
    assert 8 <= reached < STEPS
    assert job.start().wait(120) == 0
    assert len(job.losses()) == STEPS
    logs = job.run / "logs" / "supervisor"
    first, second = ((logs / f"attempt-{n}" / "rank-00000-stdout.log").read_text() for n in (1, 2))
    assert f"step {reached}/{STEPS}" in first and f"step {STEPS}/{STEPS}" not in first
    assert f"step {STEPS}/{STEPS}" in second
    assert [(e["attempt"], e["kind"]) for e in job.events("end")] == [(1, "preempted"), (2, "done")]
    first = json.loads((job.run / "environment.json").read_text())["starts"]
    assert len(first) == 2


def test_ranks_die_with_their_supervisor(job: Job) -> None:
    process = job.start()
    job.steps(3)
    ranks = [child.pid for child in descendants(process.pid)]
    assert len(ranks) >= 3
    process.kill()
    process.wait()
    end = time.monotonic() + 45
    while alive(ranks) and time.monotonic() < end:
        time.sleep(0.2)
    assert alive(ranks) == []
    assert "Traceback" not in job.errors()


@pytest.mark.slow
def test_a_hang_is_found_named_and_survived_and_a_compiler_is_none(job: Job) -> None:
    expected = undisturbed(job)
    process = job.start("--hang-seconds=8")
    job.steps(10)
    job.do("0 compile 60")
    job.wait_for(lambda: not (job.folder / "mischief.txt").exists())
    began = len(job.losses())
    job.wait_for(lambda: len(job.losses()) > began + 3, 90)
    assert len(job.events("start")) == 1, "a compile of 60 s is not a hang"
    job.do("1 sleep 600")
    job.wait_for(lambda: not (job.folder / "mischief.txt").exists())
    hung = time.time()
    job.wait_for(lambda: job.events("end"), 60)
    (end,) = job.events("end")
    assert (end["kind"], end["rank"]) == ("hang", 1)
    assert end["time"] - hung < 8 + 10, "two steps take less than a second; what is left is a busy machine's"
    stacks = (job.run / "logs" / "supervisor" / "attempt-1" / "stacks-rank-00001.txt").read_text()
    assert "mischief.py" in stacks and "_do" in stacks
    assert process.wait(120) == 0
    assert job.losses() == expected


@pytest.mark.slow
def test_a_flood_of_output_is_bounded_and_delays_nothing(job: Job) -> None:
    process = job.start(nproc=1)
    job.steps(4)
    job.do("0 flood 800")
    job.wait_for(lambda: not (job.folder / "mischief.txt").exists())
    assert process.wait(120) == 0, job.errors()
    assert [row["kind"] for row in job.events("end")] == ["done"], "no hang, and no bad machine"
    log = job.run / "logs" / "supervisor" / "attempt-1" / "rank-00000-stdout.log"
    data = log.read_bytes()
    assert len(data) < 60 << 20 and b"bytes of output left out here]" in data
    assert b"step 1/60" in data.replace(b"  ", b" ") and f"step {STEPS}/{STEPS}".encode() in data


@pytest.mark.slow
def test_a_full_disk_of_the_machine_is_told_as_that_and_not_taken_for_a_hang(job: Job) -> None:
    small = job.folder / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "hlat-test", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        job.environ["TMPDIR"] = str(small)
        process = job.start(nproc=1)
        job.steps(4)
        with contextlib.suppress(OSError), (small / "others").open("wb", buffering=0) as file:
            while file.write(bytes(1 << 20)):
                pass
        job.wait_for(lambda: job.events("disk"))
        assert process.wait(120) == 0, job.errors()
        assert [row["kind"] for row in job.events("end")] == ["done"]
        (told, *_) = job.events("disk")
        assert "No space left on device" in told["trouble"] and "0 B of 25.2 MB free" in told["trouble"]
        assert "this machine's own disk takes nothing" in job.errors()
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)


@pytest.mark.slow
def test_two_machines_restart_together(job: Job) -> None:
    expected = undisturbed(job)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    place = ["--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    nodes = [job.start(*place, f"--node-rank={node}", nproc=1) for node in (0, 1)]
    job.steps(12)
    ranks = [c for c in descendants(nodes[1].pid) if is_rank(c.pid)]
    os.kill(ranks[0].pid, signal.SIGKILL)
    assert [node.wait(180) for node in nodes] == [0, 0], job.errors(0) + job.errors(1)
    assert job.losses() == expected
    assert len(job.events("start")) == 4  # two attempts of two machines
    ends = [e for e in job.events("end") if e["kind"] != "done"]
    assert [(e["kind"], e["rank"]) for e in ends] == [("peer", 1)]
    assert (job.run / "logs" / "supervisor" / "attempt-2" / "rank-00000-stdout.log").exists()


@pytest.mark.slow
def test_a_rank_that_leaves_with_status_0_is_not_done(job: Job) -> None:
    process = job.start(nproc=1)
    job.steps(12)
    job.do("0 leave")
    assert process.wait(120) == 0, job.errors()
    early, done = job.events("end")
    assert (early["rule"], early["attempt"], done["kind"], done["attempt"]) == ("clean", 1, "done", 2)
    assert re.search(r"the newest complete checkpoint is of step \d+ of 60", early["reason"]), early
    assert len(job.losses()) == STEPS


@pytest.mark.slow
def test_a_machine_that_does_not_come_ends_the_job(job: Job) -> None:
    place = ["--nnodes=2", "--master-addr=127.0.0.1", "--master-port=45213", "--meet-seconds=5"]
    assert job.start(*place, "--node-rank=0", nproc=1).wait(60) == 1
    assert "not all machines came" in job.errors()


def is_rank(pid: int) -> bool:
    return b"\0RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()


def undisturbed(job: Job) -> list[float]:
    run, job.run = job.run, job.folder / "undisturbed"
    assert job.start().wait(120) == 0, job.errors()
    losses, job.run = job.losses(), run
    assert len(losses) == STEPS
    return losses
