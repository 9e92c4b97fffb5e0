"""Real jobs of two and four processes: they train, they stop together, and when one rank fails the job ends
soon with a message that names it, and the same command continues.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import hlat
from hlat.checkpoint.reader import open_checkpoint

PROGRAM = Path(__file__).with_name("failing_rank.py")
RECIPE = """
run: {name: small, steps: 6, seed: 3}
model: {layers: 2, hidden: 32, heads: 4, kv_heads: 2, ffn: 64, vocab: 320, max_seq_len: 32}
data: {sources: [{path: text}], tokenizer: bytes, micro_batch: 2, global_batch: 8, holdout: 0.2}
precision: {compute: fp32}
optim: {name: adamw, lr: 3e-3}
schedule: {name: constant}
checkpoint: {every: 2, keep: 5}
eval: {every: 3, rows: 4}
log: {every: 2}
compile: false
"""
SECONDS = 60  # in which a job with a failed rank must have ended
NEVER = ("raise", 0, 10_000)


@dataclass
class Ended:
    """A finished job: what each process (or the launcher) printed, exit statuses, seconds it took."""

    texts: list[str]
    codes: list[int | None]
    seconds: float = 0.0
    lines: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.lines = [line for text in self.texts for line in text.splitlines() if line.startswith("hlat: ")]


class Place:
    """A working directory with a recipe and text, in which jobs are started."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "small.yaml").write_text(RECIPE)
        (path / "text").mkdir()
        words = np.random.default_rng(0).choice(["alpha", "beta", "gamma", "delta"], size=(40, 60))
        for number, row in enumerate(words):
            (path / "text" / f"{number:02}.txt").write_text(" ".join(row) + f" {number}\n")

    def environment(self) -> dict[str, str]:
        cleaned = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        own = {"XDG_CACHE_HOME": str(self.path / "cache"), "OMP_NUM_THREADS": "1"}
        return cleaned | own | {"TORCH_CPP_LOG_LEVEL": "ERROR", "CUDA_VISIBLE_DEVICES": ""}

    def torchrun(self, world: int, mishap: Sequence[object], *overrides: str, resume: bool = False) -> Ended:
        """Start a job as a user does, with a mishap (kind, rank, step)."""
        if not resume:
            shutil.rmtree(self.path / "runs", ignore_errors=True)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        program = [f"--nproc-per-node={world}", str(PROGRAM), *map(str, mishap)]
        command = [*launcher, *program, "train", "small.yaml", *overrides]
        return self._wait([(command, self.environment())], 60 + SECONDS)

    def by_hand(
        self, world: int, mishap: Sequence[object], *overrides: str, special: dict[int, dict[str, str]] | None
    ) -> Ended:
        """Start the ranks without a launcher, some with more environment variables."""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        jobs = []
        for rank in range(world):
            place = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
            environment = self.environment() | place | {"MASTER_PORT": str(port)}
            command = [sys.executable, str(PROGRAM), *map(str, mishap), "train", "small.yaml", *overrides]
            jobs.append((command, environment | (special or {}).get(rank, {})))
        return self._wait(jobs, 60 + SECONDS, straggle=20)

    def _wait(
        self, jobs: list[tuple[list[str], dict[str, str]]], limit: float, straggle: float = 600
    ) -> Ended:
        """Wait at most `limit` seconds, and `straggle` from when the first process has ended."""
        files = [self.path / f"output-{number}" for number in range(len(jobs))]
        processes, started = [], time.monotonic()
        for file, (command, environment) in zip(files, jobs, strict=True):
            with open(file, "w") as out:
                processes.append(
                    subprocess.Popen(
                        command,
                        cwd=self.path,
                        env=environment,
                        stdout=out,
                        stderr=out,
                        start_new_session=True,
                    )
                )
        try:
            while any(p.poll() is None for p in processes):
                seconds = time.monotonic() - started
                if any(p.poll() is not None for p in processes):
                    limit = min(limit, seconds + straggle)
                    straggle = 600
                if seconds > limit:
                    break
                time.sleep(0.05)
            seconds = time.monotonic() - started
            codes = [process.poll() for process in processes]
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return Ended([file.read_text() for file in files], codes, seconds)

    def rows(self, kind: str = "train") -> list[dict]:
        lines = (self.path / "runs" / "small" / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["kind"] == kind]

    @property
    def newest(self) -> int:
        return open_checkpoint(self.path / "runs" / "small").step


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("jobs"))


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


def root_cause(text: str) -> str:
    """Torchrun's own summary of who failed first."""
    return text.rpartition("Root Cause")[2]


def test_two_ranks_train_with_one_console_and_resume(place: Place) -> None:
    first = place.torchrun(2, NEVER, "run.stop_at_step=3", "parallel.verify_every=2")
    assert first.codes == [0] and first.lines == [], first.texts[0]
    assert first.texts[0].count("run folder") == 2 and first.texts[0].count("hlat train · small") == 1
    assert "dp 2 x pp 1 x tp 1" in first.texts[0] and place.newest == 3
    second = place.torchrun(2, NEVER, "parallel.zero1=true", resume=True)
    assert second.codes == [0], second.texts[0]
    assert [row["step"] for row in place.rows()] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in place.rows("eval")] == [3, 6]
    assert place.rows()[-1]["loss"] < place.rows()[0]["loss"]
    assert not (place.path / "runs" / "small" / ".lock").exists()


def test_a_signal_to_one_rank_stops_all_after_the_same_step(place: Place) -> None:
    ended = place.torchrun(2, ("term", 1, 2), "checkpoint.every=100")
    assert ended.codes == [1] and ended.lines == [], ended.texts[0]
    assert ended.texts[0].count("stopped by signal 15 after step 4") == 1, ended.texts[0]
    assert place.newest == 4 and len(place.rows()) == 4
    assert ended.texts[0].count("exitcode  : 143") == 2, ended.texts[0]


@pytest.mark.parametrize(
    "options", [("checkpoint.async=true",), ("checkpoint.async=false", "parallel.zero1=true")]
)
def test_a_disk_that_is_full_on_one_rank_for_a_while(place: Place, options: tuple[str, ...]) -> None:
    """Steps 7 to 18 have no room on rank 1: the saves of 8 to 16 fail on both, training goes on."""
    ended = place.torchrun(2, ("full", 1, 6), "run.steps=22", "checkpoint.every=4", *options)
    assert ended.codes == [0] and ended.lines == [], ended.texts[0]
    assert ended.texts[0].count("was not saved (the disk is full") == 1, ended.texts[0]
    assert "the one of step 4 is untouched" in ended.texts[0] and "the trouble is over" in ended.texts[0]
    saved = sorted(path.name for path in (place.path / "runs" / "small" / "checkpoints").iterdir())
    assert saved == ["step-00000004", "step-00000020", "step-00000022"]
    failed = [(row["what"], row["step"]) for row in place.rows("storage")]
    assert failed == [("save", step) for step in (8, 12, 16)]
    assert [row["step"] for row in place.rows()] == list(range(1, 23))


def test_a_disk_that_is_full_on_one_rank_for_good(place: Place) -> None:
    ended = place.torchrun(2, ("full-for-good", 1, 3), "checkpoint.patience=2")
    assert ended.codes == [1] and len(ended.lines) == 1 and ended.seconds < SECONDS, ended.texts[0]
    line = r"hlat: error: .*/checkpoints: after \d s of trying: checkpoint of step 6 was not saved .the disk"
    assert re.match(line, ended.lines[0]) and "the one of step 2 is untouched" in ended.lines[0], ended.lines
    assert ended.texts[0].count("exitcode  : 74") == 2, ended.texts[0]
    assert place.newest == 2


@pytest.mark.slow
def test_two_ranks_lose_their_disk_and_continue_from_the_store(place: Path) -> None:
    shutil.rmtree(place.path / "store", ignore_errors=True)
    remote = f"checkpoint.remote=file://{place.path}/store"
    assert place.torchrun(2, NEVER, remote).codes == [0]
    end = place.rows()
    shutil.rmtree(place.path / "store")
    first = place.torchrun(2, NEVER, remote, "run.stop_at_step=3")
    assert first.codes == [0], first.texts[0]
    second = place.torchrun(2, NEVER, remote)  # which removes the run folder first
    assert second.codes == [0] and second.texts[0].count("checkpoint of step 3 fetched") == 1, second.texts[0]
    assert [(row["step"], row["loss"]) for row in place.rows()] == [(row["step"], row["loss"]) for row in end]
    assert place.newest == 6


def test_two_ranks_without_one_good_checkpoint_do_not_start_over(place: Path) -> None:
    assert place.torchrun(2, NEVER, "run.stop_at_step=4").codes == [0]
    checkpoints = place.path / "runs" / "small" / "checkpoints"
    for name in ("step-00000002", "step-00000004"):
        file = checkpoints / name / "data-00001.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    before = {path: path.read_bytes() for path in checkpoints.parent.rglob("*") if path.is_file()}
    ended = place.torchrun(2, NEVER, resume=True)
    assert ended.codes == [1] and len(ended.lines) == 1 and ended.seconds < SECONDS, ended.texts[0]
    assert "none can be used (step 2: data-00001.safetensors is damaged" in ended.lines[0]
    assert ended.texts[0].count("exitcode  : 2") == 2, ended.texts[0]
    assert {path: path.read_bytes() for path in checkpoints.parent.rglob("*") if path.is_file()} == before


def test_a_store_that_cannot_be_made_is_refused_at_once(place: Path) -> None:
    ended = place.torchrun(2, NEVER, "checkpoint.remote=file:///proc/no/store", "checkpoint.patience=600")
    assert ended.codes == [1] and len(ended.lines) == 1 and ended.seconds < SECONDS, ended.texts[0]
    assert "checkpoint.remote: " in ended.lines[0] and "No such file" in ended.lines[0]
    assert ended.texts[0].count("exitcode  : 2") == 2, ended.texts[0]
    assert not (place.path / "runs").exists()


@pytest.mark.slow
def test_another_process_takes_the_run_folder(place: Place) -> None:
    """The first rank finds out before a save that the others have begun: none of them waits for another."""
    ended = place.torchrun(2, ("lose", 0, 5), "run.steps=20", "log.every=100")
    assert ended.codes == [1] and len(ended.lines) == 1 and ended.seconds < SECONDS, ended.texts[0]
    assert "on node-b has taken the run folder over" in ended.lines[0]
    assert ended.texts[0].count("exitcode  : 77") == 2, ended.texts[0]
    assert place.newest in (2, 4) and len(place.rows()) == 4


def test_an_exception_on_one_rank(place: Place) -> None:
    ended = place.torchrun(2, ("raise", 1, 2))
    text = ended.texts[0]
    assert ended.codes == [1] and ended.seconds < SECONDS
    assert len(ended.lines) == 2, text
    assert re.fullmatch(r"hlat: rank 1 \(.*\) failed:", ended.lines[0])
    assert re.fullmatch(
        r"hlat: rank 0 stopped because rank 1 \(.*\) failed first: ValueError: a planted failure",
        ended.lines[1],
    )
    assert text.index("a planted failure") < text.index("rank 0 stopped because")
    assert "rank      : 1" in root_cause(text) and "a planted failure" in root_cause(text)
    assert "gloo" not in text.split("ChildFailedError")[0]


def test_a_killed_rank_and_an_immediate_restart(place: Place) -> None:
    ended = place.torchrun(2, ("kill", 1, 3), "checkpoint.async=false")
    assert ended.codes == [1] and ended.seconds < SECONDS
    assert len(ended.lines) == 1, ended.texts[0]
    line = r"hlat: rank 0 stopped because rank 1 \(.*, pid \d+\) is gone: last sign .* s ago in step \d \(\w+"
    assert re.match(line, ended.lines[0]), ended.lines
    assert place.newest == 2
    again = place.torchrun(2, NEVER, resume=True)
    assert again.codes == [0] and [row["step"] for row in place.rows()] == [1, 2, 3, 4, 5, 6]


def test_a_rank_with_other_code(place: Place) -> None:
    tree = place.path / "other"
    shutil.copytree(Path(hlat.__file__).parent, tree / "hlat", ignore=shutil.ignore_patterns("__pycache__"))
    with open(tree / "hlat" / "model" / "norm.py", "a") as file:
        file.write("# another comment\n")
    shutil.rmtree(place.path / "runs", ignore_errors=True)
    ended = place.by_hand(2, NEVER, special={1: {"PYTHONPATH": str(tree)}})
    assert ended.codes == [2, 2] and ended.seconds < SECONDS
    assert len(ended.lines) == 1, ended.texts
    assert re.search(r"rank 1 \(.*\) runs other HLAT code than rank 0: sha256 \w+… inst", ended.lines[0])
    assert not (place.path / "runs").exists()


@pytest.mark.parametrize(
    ("mishap", "override", "line"),
    [
        (("mistake", 1, -1), "log.every=1", r"hlat: error: rank 1 \(.*\): data: this machine has no text"),
        (NEVER, "parallel.dp=4", r"hlat: error: parallel: tp 1 x pp 1 x dp 4 does not fit 2 processes"),
        slow(
            ("mistake", 0, -1), "log.every=1", r"hlat: error: data: this machine has no text; copy it there"
        ),
        slow(NEVER, "optim.learning=1", r"hlat: error: command line: optim.learning: unknown key"),
        slow(NEVER, "run.dir=/proc/hlat", r"hlat: error: /proc/hlat"),
    ],
)
def test_a_mistake_is_one_line(place: Place, mishap: tuple, override: str, line: str) -> None:
    ended = place.torchrun(2, mishap, override)
    assert ended.codes == [1] and ended.seconds < SECONDS
    assert len(ended.lines) == 1 and re.match(line, ended.lines[0]), ended.texts[0]
    assert ended.texts[0].count("exitcode  : 2") == 2, ended.texts[0]
    assert not (place.path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flip", "flip-master"])
def test_a_flipped_bit_is_named_by_majority(place: Place, kind: str) -> None:
    ended = place.torchrun(4, (kind, 2, 1), "parallel.verify_every=2")
    assert ended.codes == [1] and ended.seconds < SECONDS
    found = re.search(
        r"after step 2 rank 2 \(.*\) holds other weights than ranks 0, 1, 3 in (.*);", ended.lines[0]
    )
    assert len(ended.lines) == 1 and found and "embed.weight[0:320, 0:32]" in found[1], ended.texts[0]
    assert not any((place.path / "runs" / "small" / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_a_flipped_bit_of_two_replicas_names_both(place: Place) -> None:
    ended = place.torchrun(2, ("flip", 1, 1), "parallel.verify_every=2")
    assert len(ended.lines) == 1, ended.texts[0]
    assert re.search(r"rank 0 \(.*\) and rank 1 \(.*\) hold different weights", ended.lines[0])


@pytest.mark.slow
def test_the_guard_stops_all_ranks(place: Place) -> None:
    ended = place.torchrun(2, ("nan", 1, 1), "guard.patience=1", "log.every=1")
    assert ended.codes == [1] and len(ended.lines) == 1, ended.texts[0]
    assert "a step was skipped" in ended.lines[0]
    assert ended.texts[0].count("exitcode  : 3") == 2, ended.texts[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "why"), [("freeze", "no sign of life, last sign"), ("sleep", "in step 3 .*the others wait")]
)
def test_a_hung_rank(place: Place, kind: str, why: str) -> None:
    ended = place.torchrun(4, (kind, 2, 2), "parallel.timeout=8", "data.micro_batch=1")
    assert ended.codes == [1], ended.texts[0]
    # torchrun itself waits 30 s for a process that is stopped before it kills it.
    report = [line for line in ended.lines if re.search(rf"rank 2 \(.*\) is late: {why}", line)]
    assert len(report) >= 3 and len(report) == len(ended.lines), ended.texts[0]
    assert ended.seconds < SECONDS + 15
    logs = place.path / "runs" / "small" / "logs"
    stacks = {file.name: file.read_text() for file in logs.glob("stacks-rank-*.txt")}
    hung = set() if kind == "freeze" else {2}
    assert set(stacks) == {f"stacks-rank-{rank:05}.txt" for rank in {0, 1, 3} | hung}
    assert all("train_step" in text for text in stacks.values())
    again = place.torchrun(2, NEVER, resume=True)
    assert again.codes == [0], again.texts[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["raise", "kill", "freeze"])
def test_the_rank_that_holds_the_store_fails(place: Place, kind: str) -> None:
    shutil.rmtree(place.path / "runs", ignore_errors=True)
    ended = place.by_hand(2, (kind, 0, 2), "parallel.timeout=8", special=None)
    assert ended.codes[1] == 1, ended.texts
    wanted = {
        "raise": r"rank 1 stopped because rank 0 \(.*\) failed first: ValueError: a planted failure",
        "kill": r"rank 1 stopped because rank 0 \(.*\)",
        "freeze": r"rank 1 stopped because rank 0 \(.*\), which held the job's store, does not answer",
    }
    assert len([line for line in ended.lines if re.search(wanted[kind], line)]) == 1, ended.texts
    # Nobody ends a stopped process that was started by hand.
    assert kind == "freeze" or ended.seconds < SECONDS
