"""Two writers that each believe to be the only one: in two containers of one host name, stopped for longer
than the lock's time limit, requeued. Never two of them write, and no row and no checkpoint is lost.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hlat.checkpoint.reader import open_checkpoint
from hlat.observe.jsonl import read_rows

WRITER = Path(__file__).with_name("lock_writer.py")
LIMIT = 2  # seconds, in place of the five minutes
RECIPE = """
run: {name: r, steps: 150, dir: run, seed: 1}
model: {layers: 1, hidden: 16, heads: 1, ffn: 32, vocab: 260, max_seq_len: 32}
data: {sources: [{path: text.txt}], tokenizer: bytes, seq_len: 16, micro_batch: 2, global_batch: 2,
  holdout: 0}
schedule: {name: constant}
eval: {every: 0}
checkpoint: {every: 10, keep: 2}
log: {every: 1}
compile: false
"""


@pytest.fixture(scope="module")
def container() -> list[str]:
    """Words that start a command in a PID namespace of its own, under this host's name."""
    words = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0:
        return words
    assert os.geteuid() != 0, "root can make PID namespaces: install util-linux, or allow it"
    words[1:1] = ["--user", "--map-root-user"]
    if subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no right to make PID namespaces")
    return words


class Writer:
    """A process, in a container of its own if there are words for that, with its output."""

    def __init__(self, place: Path, words: list[str], command: list[str], **environment: str) -> None:
        Writer.count += 1
        self.output = place / f"output-{Writer.count}"
        cleaned = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        cleaned |= {"HLAT_TEST_LOCK_SECONDS": str(LIMIT), "OMP_NUM_THREADS": "1", **environment}
        cleaned["XDG_CACHE_HOME"] = str(place / "cache")
        with self.output.open("w") as out:
            self.outer = subprocess.Popen([*words, *command], cwd=place, env=cleaned, stdout=out, stderr=out)
        self.inside = bool(words)

    count = 0

    def send(self, number: int) -> None:
        """To the process itself, not to who made its container."""
        children = Path(f"/proc/{self.outer.pid}/task/{self.outer.pid}/children").read_text().split()
        os.kill(int(children[0]) if self.inside else self.outer.pid, number)

    def end(self) -> int:
        return self.outer.wait(60)

    @property
    def text(self) -> str:
        return self.output.read_text()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Writer]]:
    writers: list[Writer] = []

    def begin(words: list[str], *command: str, **environment: str) -> Writer:
        writers.append(Writer(tmp_path, words, [sys.executable, *command], **environment))
        return writers[-1]

    yield begin
    for writer in writers:
        if writer.outer.poll() is None:
            writer.send(signal.SIGKILL)
            writer.outer.kill()
        writer.outer.wait()


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def rows(file: Path) -> list[dict]:
    return [row for row in read_rows(file) if row["kind"] == "train"] if file.exists() else []


def holder(folder: Path) -> str:
    try:
        return str(json.loads((folder / ".lock").read_text())["token"])
    except FileNotFoundError:
        return ""


def check_rows(file: Path, last: int) -> None:
    assert [row["step"] for row in rows(file)] == list(range(1, last + 1)), "each step once, in order"
    raw = [json.loads(line) for line in file.read_bytes().splitlines()]
    late = len([row for row in raw if row["kind"] == "train"]) - last
    assert late <= 1, "at most the operation under way"


def test_a_requeued_job_takes_the_folder_at_once(tmp_path: Path, start: Callable[..., Writer]) -> None:
    """The job it was requeued from still runs: its node was cut off from slurmctld."""
    file = tmp_path / "run/metrics.jsonl"
    first = start([], str(WRITER), "run", "100000", SLURM_JOB_ID="7", SLURM_RESTART_COUNT="0")
    wait_for(lambda: len(rows(file)) > 25)
    other = start([], str(WRITER), "run", "10", SLURM_JOB_ID="8", SLURM_RESTART_COUNT="5")
    assert other.end() == 2 and "trains in this folder since" in other.text
    second = start([], str(WRITER), "run", "90", SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    assert first.end() == 77 and second.end() == 0, (first.text, second.text)
    assert len(first.text.splitlines()) == 1 and "has taken the run folder over" in first.text
    check_rows(file, 90)


@pytest.mark.slow
def test_two_containers_and_a_holder_that_was_stopped(
    tmp_path: Path, container: list[str], start: Callable[..., Writer]
) -> None:
    file, saved = tmp_path / "run/metrics.jsonl", tmp_path / "run/checkpoints/saved"
    first = start(container, str(WRITER), "run", "100000")
    wait_for(lambda: len(rows(file)) > 25)
    second = start(container, str(WRITER), "run", "10")
    assert second.end() == 2 and "trains in this folder since" in second.text, second.text
    assert "waiting up to" in second.text, "process numbers of two containers mean different things"
    before = holder(file.parent)
    for turn in range(2):  # whoever was stopped may come back amid the successor's work, or after it
        first.send(signal.SIGSTOP)
        steps = int(saved.read_text())
        second = start(container, str(WRITER), "run", "100000" if turn == 0 else str(steps + 40))
        wait_for(lambda before=before: holder(file.parent) not in ("", before))
        if turn == 0:
            wait_for(lambda steps=steps: int(saved.read_text()) >= steps + 20)
        else:
            assert second.end() == 0, second.text
        assert int(saved.read_text()) >= steps
        first.send(signal.SIGCONT)
        assert first.end() == 77, first.text
        assert "has taken the run folder over" in first.text.splitlines()[-1]
        if turn == 0:
            first, before = second, holder(file.parent)
    last = int(saved.read_text())
    assert last == steps + 40
    check_rows(file, last)
    assert len({row["by"] for row in rows(file)}) == 3
    assert not (file.parent / ".lock").exists()


@pytest.mark.slow
def test_a_run_that_was_stopped_beside_its_successor(
    tmp_path: Path, container: list[str], start: Callable[..., Writer]
) -> None:
    (tmp_path / "text.txt").write_text("red green blue white black amber olive coral\n" * 300)
    (tmp_path / "r.yaml").write_text(RECIPE)
    run = tmp_path / "run"
    command = ("-m", "hlat", "train", "r.yaml")
    first = start(container, *command)
    wait_for(lambda: (run / "checkpoints/step-00000020").exists() or first.outer.poll() is not None)
    first.send(signal.SIGSTOP)
    before = holder(run)
    second = start(container, *command)
    wait_for(lambda: holder(run) not in ("", before) or second.outer.poll() is not None)
    wait_for(lambda: len({row["by"] for row in rows(run / "metrics.jsonl")}) == 2)
    first.send(signal.SIGCONT)
    assert first.end() == 77, first.text
    assert re.search(r"hlat: error: .* has taken the run folder over", first.text.splitlines()[-1])
    assert second.end() == 0, second.text
    check_rows(run / "metrics.jsonl", 150)
    newest = open_checkpoint(run)
    newest.verify()
    assert newest.step == 150
    names = sorted(os.listdir(run / "checkpoints"))
    assert names == ["step-00000140", "step-00000150"], "no other's, nothing half-written"
