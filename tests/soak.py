"""Runs longer than a window of anything: the core of the soak test and of its bench. As a program: `hlat`
that notes memory and open files of its process on the way.

A decoder of 6,500 parameters reads two epochs of made-up text with the default guard, evaluations and
checkpoints. `Soak.train` runs it, `Soak.train_killed` with SIGKILL at random moments; `faults` and
`differences` say what is not right with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hlat.checkpoint.reader import open_checkpoint
from hlat.observe.jsonl import read_rows

RECIPE = """
run: {{name: soak, steps: {steps}, seed: 1}}
model: {{layers: 1, hidden: 16, heads: 2, kv_heads: 1, ffn: 32, vocab: 257, max_seq_len: 16,
    tie_embeddings: true}}
data: {{sources: [{{path: {text}}}], tokenizer: bytes, micro_batch: 8, global_batch: 16, holdout: 0.05}}
precision: {{compute: fp32}}
optim: {{name: adamw, lr: 1.0e-3}}
schedule: {{name: cosine, warmup_steps: 50}}
eval: {{every: {eval_every}, rows: 16}}
checkpoint: {{every: {save_every}, keep: 3}}
compile: false
"""
SEED, SEQ, BATCH, DOCUMENT = 1, 16, 16, 60
SAMPLES = 200  # of memory and open files in a run
WARM = 0.1  # of a run: what is made once is made by then
GROWTH = 8 << 20  # bytes by which memory may grow after that
FILES = 3  # by which the number of open files may
MEASURED = {"tokens_per_second", "mfu", "step_seconds", "memory/peak_bytes", "by"}  # may differ
WINDOW, SIGMA, NEAR = 128, 6.0, 1e-3  # of the default guard; of a threshold
SAMPLES_TO, SAMPLES_EVERY = "HLAT_SOAK_SAMPLES", "HLAT_SOAK_EVERY"


@dataclass(frozen=True)
class Sample:
    """What a process held after a step."""

    step: int
    memory: int  # bytes resident
    files: int  # open, but for those of the token folder: each is mapped when it is first read, and stays


class Soak:
    """A working directory with text and a recipe.

    Args:
        folder: is made.
        steps: of a run. Its text is two epochs of them.
        overrides: of the recipe, for all runs.
        ranks: processes that train together over gloo.
    """

    def __init__(self, folder: Path, steps: int, overrides: Sequence[str] = (), ranks: int = 1) -> None:
        self.folder, self.steps, self.overrides, self.ranks = folder, steps, list(overrides), ranks
        self.save_every, self.eval_every = max(1, steps // 16), max(1, steps // 8)
        write_text(folder / "text.jsonl", steps * SEQ * BATCH // 2)
        self.recipe = folder / "soak.yaml"
        text = json.dumps(str(folder / "text.jsonl"))
        self.recipe.write_text(
            RECIPE.format(steps=steps, text=text, save_every=self.save_every, eval_every=self.eval_every)
        )

    def arguments(self, name: str, *overrides: str) -> list[str]:
        """Of `hlat`, for a run of that name."""
        micro_batch = f"data.micro_batch={BATCH // self.ranks}"
        folder = f"run.dir={self.folder / name}"
        return ["train", str(self.recipe), micro_batch, folder, *self.overrides, *overrides]

    def train(self, name: str, *overrides: str) -> Path:
        """Train to the end; returns the run folder. Raises RuntimeError with what it said when it fails."""
        return self._end(name, self._start(name, *overrides))

    def train_killed(self, name: str, *overrides: str, kills: int = 5, seed: int = 0) -> Path:
        """The same, killed by SIGKILL at random moments and started again. Raises RuntimeError when it ended
        before it had been killed so often.
        """
        make, run = random.Random(seed), self.folder / name
        moments = sorted(make.sample(range(1, self.steps - self.steps // 20), kills))
        for moment in moments:
            ranks = self._start(name, *overrides)
            while last_step(run) < moment and all(rank.poll() is None for rank in ranks):
                time.sleep(0.01)
            time.sleep(make.uniform(0, 0.05))
            for rank in ranks:
                rank.send_signal(signal.SIGKILL)
            if any(rank.wait() != -signal.SIGKILL for rank in ranks):
                raise RuntimeError(f"it was not there to be killed at step {moment}: {self._said(name)}")
        return self._end(name, self._start(name, *overrides))

    def samples(self, name: str) -> list[Sample]:
        """Of a run's first rank."""
        return [Sample(**json.loads(line)) for line in self._samples(name).read_text().splitlines()]

    def _samples(self, name: str) -> Path:
        return self.folder / f"{name}.samples"

    def _said(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text()[-2000:]

    def _start(self, name: str, *overrides: str) -> list[subprocess.Popen[bytes]]:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        job = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        shared = {key: value for key, value in os.environ.items() if key not in job}
        shared |= {"XDG_CACHE_HOME": str(self.folder / "cache"), "OMP_NUM_THREADS": "1"}
        shared |= {"CUDA_VISIBLE_DEVICES": "", SAMPLES_EVERY: str(max(1, self.steps // SAMPLES))}
        ranks = []
        with (self.folder / f"{name}.out").open("wb") as out:
            for rank in range(self.ranks):
                own = dict(shared)
                if self.ranks > 1:
                    own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.ranks)}
                    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                if rank == 0:
                    own[SAMPLES_TO] = str(self._samples(name))
                command = [sys.executable, __file__, *self.arguments(name, *overrides)]
                ranks.append(subprocess.Popen(command, env=own, stdout=out, stderr=out))
        return ranks

    def _end(self, name: str, ranks: list[subprocess.Popen[bytes]]) -> Path:
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            raise RuntimeError(f"it ended with {codes}: {self._said(name)}")
        return self.folder / name


def write_text(file: Path, tokens: int) -> None:
    """About so many tokens (bytes) for training and what is held out on top: short documents of letters, each
    independent of the one before. There is nothing to find out suddenly, so no step is an outlier.
    """
    make = np.random.default_rng(SEED)
    odds = np.arange(1, 13) / 78
    file.parent.mkdir(parents=True)
    with file.open("w") as lines:
        for _ in range(max(20, int(tokens / 0.95 / DOCUMENT))):
            text = "".join(make.choice(list("abcdefghijkl"), size=DOCUMENT - 1, p=odds))
            lines.write(json.dumps({"text": text}) + "\n")


def last_step(run: Path) -> int:
    """The last step in a run's metrics; 0 without one. Looks at the end of the file only."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().split(b"\n")
    except OSError:
        return 0
    whole = [line for line in lines[:-1] if line.startswith(b"{") and line.endswith(b"}")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def rows_of(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The rows of a kind, in the order of the file."""
    return [row for row in read_rows(run / "metrics.jsonl") if row["kind"] == kind]


def faults(soak: Soak, run: Path, samples: Sequence[Sample]) -> list[str]:
    """What is not right with an undisturbed run; empty when nothing. No verdict is about time."""
    rows, held_out = rows_of(run), rows_of(run, "eval")
    found = []
    if [row["step"] for row in rows] != list(range(1, soak.steps + 1)):
        found.append(f"{len(rows)} rows for {soak.steps} steps")
    due = list(range(soak.eval_every, soak.steps + 1, soak.eval_every))
    if [row["step"] for row in held_out] != sorted({*due, soak.steps}):
        found.append(f"evaluations at {[row['step'] for row in held_out]}")
    losses = [row["loss"] for row in rows]
    if None in losses or None in [row["grad_norm"] for row in rows]:
        found.append("a loss or a norm is not finite")
    else:
        found += wrong_decisions(rows)
        first, last = statistics.fmean(losses[:10]), statistics.fmean(losses[-soak.steps // 20 :])
        if last > 0.7 * first or held_out[-1]["loss"] > 0.7 * first:
            found.append(f"the loss went from {first:.3f} to {last:.3f}, held out {held_out[-1]['loss']:.3f}")
    if open_checkpoint(run).step != soak.steps:
        found.append(f"the newest checkpoint is of step {open_checkpoint(run).step}")
    if len(list((run / "checkpoints").glob("step-*"))) > 3:
        found.append("more than three checkpoints are kept")
    return found + grown(samples, soak.steps)


def wrong_decisions(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Steps whose update was skipped or not against what mean and deviation of the last window say."""
    values = np.array([[row["loss"], row["grad_norm"]] for row in rows])
    wrong = []
    for number in range(WINDOW // 2, len(rows)):
        recent, now = values[max(0, number - WINDOW) : number], values[number]
        limits = recent.mean(0) + SIGMA * np.maximum(recent.std(0), 1e-6 * np.maximum(1, recent.mean(0)))
        unsure = (np.abs(now - limits) < NEAR * limits).any()
        if not unsure and rows[number]["skipped"] != bool((now > limits).any()):
            wrong.append(rows[number]["step"])
    return [f"{len(wrong)} decisions of the guard are wrong, the first at step {wrong[0]}"] if wrong else []


def grown(samples: Sequence[Sample], steps: int) -> list[str]:
    """What a process has more of at the end than when it was warm: medians of a tenth of the run each."""
    early = [sample for sample in samples if WARM * steps <= sample.step <= 2 * WARM * steps]
    late = [sample for sample in samples if sample.step >= (1 - WARM) * steps]
    if not early or not late:
        return [f"{len(samples)} samples of memory and open files"]
    found = []
    measures: list[tuple[str, float, Callable[[Sample], float]]] = [
        ("memory", GROWTH, lambda sample: sample.memory),
        ("open files", FILES, lambda sample: sample.files),
    ]
    for what, most, measure in measures:
        before, after = (statistics.median(map(measure, some)) for some in (early, late))
        if after > before + most:
            found.append(f"{what} grew from {before:,.0f} to {after:,.0f}")
    return found


def differences(a: Path, b: Path) -> list[str]:
    """In what two runs differ beside times: rows, and every tensor of the last checkpoint, bitwise."""
    found = []
    for kind in ("train", "eval", "anomaly"):
        one, two = (
            [{k: v for k, v in r.items() if k not in MEASURED} for r in rows_of(run, kind)] for run in (a, b)
        )
        if one != two:
            number = next((i for i, (x, y) in enumerate(zip(one, two, strict=False)) if x != y), "the end")
            found.append(f"rows of kind {kind} differ from number {number} on: {len(one)} and {len(two)}")
    one, two = open_checkpoint(a), open_checkpoint(b)
    if one.step != two.step or one.names() != two.names():
        return [*found, f"checkpoints of step {one.step} and {two.step}, or of other tensors"]
    unequal = [name for name in one.names() if not torch.equal(one.read(name), two.read(name))]
    return [*found, *([f"{', '.join(unequal[:3])} differ"] if unequal else [])]


def open_files() -> int:
    """Files that this process has open, but for those of token folders."""
    count = 0
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            count += "/tokens/" not in os.readlink(f"/proc/self/fd/{number}")
    return count


def main() -> int:
    """`hlat` with a plug-in for bad rows, and with samples where the environment asks for them."""
    import poisoned  # noqa: F401 (registers the objective)

    from hlat.cli import main as hlat
    from hlat.train import loop

    target, train_step = os.environ.get(SAMPLES_TO), loop.train_step
    every = int(os.environ.get(SAMPLES_EVERY, "1"))

    def sampled(run: Any) -> Any:
        values = train_step(run)
        if run.step % every == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            memory, files = pages * os.sysconf("SC_PAGE_SIZE"), open_files()
            with open(str(target), "a") as file:
                file.write(json.dumps({"step": run.step, "memory": memory, "files": files}) + "\n")
        return values

    if target:
        loop.train_step = sampled
    return hlat()


if __name__ == "__main__":
    sys.exit(main())
