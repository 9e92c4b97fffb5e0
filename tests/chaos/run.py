"""Faults at random moments of supervised runs: does every run end where an undisturbed one ends?

    python tests/chaos/run.py [--faults 50] [--per-run 6] [--seed 1] [--kinds kill,stop,...] [--ranks 2]
                              [--json FILE]

A run of a small decoder over gloo ranks is trained once without a fault, then again and again under
`hlat supervise` while faults hit it; each run must end with bitwise the same parameters and optimizer state,
leave no process behind, and lose no complete checkpoint but those a fault destroyed. Prints a table of
faults, of how they were seen, and of the seconds until training went on. Linux; mounts a small tmpfs to fill
(as root, or in a namespace of its own).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import mischief  # noqa: E402
from faults import FAULTS, RESTARTS, Target, wait_for  # noqa: E402

from hlat.checkpoint.folder import entries, step_folder  # noqa: E402
from hlat.checkpoint.reader import open_checkpoint  # noqa: E402
from hlat.observe.jsonl import read_rows  # noqa: E402
from hlat.supervise.processes import descendants  # noqa: E402

STEPS, EVERY = 600, 25
RECIPE = f"""
run: {{name: chaos, steps: {STEPS}, seed: 3}}
model: {{layers: 4, hidden: 128, heads: 4, kv_heads: 2, ffn: 256, vocab: 320, max_seq_len: 128}}
data: {{sources: [{{path: text}}], tokenizer: bytes, micro_batch: 4, global_batch: 8, holdout: 0.2}}
schedule: {{name: constant}}
parallel: {{zero1: true}}
objective: {{name: mischief, file: mischief.txt}}
guard: {{name: rewind, rewinds: 1000}}
checkpoint: {{every: {EVERY}, keep: 3}}
log: {{every: 5}}
compile: false
"""
DISK_MB = 96
GOODPUT = ("goodput", "goodput_by_metrics")
# Of the two, over several runs; one run of a few attempts has the half second before each of their ends,
# which no heartbeat tells of, in a short time.
LARGEST_GAP, LARGEST_GAP_OF_ONE = 0.01, 0.02
SEEN = {  # those that end no attempt
    "full_disk": "delays saving only",
    "store_errors": "delays saving only",
    "nan_batch": "rewound",
}


@dataclass
class Hit:
    """One fault: when it struck, what the supervisor said of the attempt it ended, when training went on."""

    kind: str
    at: float
    seen: str = ""
    detected: float | None = None
    recovered: float | None = None


class Chaos:
    """All runs of one invocation, in a folder of their own."""

    def __init__(self, folder: Path, ranks: int, seed: int, hang_seconds: float) -> None:
        self.folder, self.ranks, self.hang_seconds = folder, ranks, hang_seconds
        self.dice = random.Random(seed)
        self._expected: dict[str, dict[str, Any]] = {}
        self.disk, self.store = folder / "disk", folder / "store"
        self.environ = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache"),
                        "PYTHONPATH": os.pathsep.join([str(folder / "site"), str(ROOT)])}  # fmt: skip
        mischief.install(folder / "site")
        text = folder / "text"
        text.mkdir()
        for number in range(60):
            words = (self.dice.choice(("ab", "cd", "ef", "gh")) for _ in range(300))
            (text / f"{number:02}.txt").write_text(" ".join(words))
        (folder / "chaos.yaml").write_text(RECIPE)
        self.disk.mkdir()
        self.store.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "hlat-chaos", self.disk], check=True
        )

    def close(self) -> None:
        """Give the disk back."""
        subprocess.run(["umount", "--lazy", self.disk], check=True)

    def command(self, run: Path, *overrides: str) -> list[str]:
        """Of a supervised run."""
        words = [sys.executable, "-m", "hlat", "supervise", "chaos.yaml", f"run.dir={run}", *overrides]
        return [*words, f"--nproc-per-node={self.ranks}", f"--hang-seconds={self.hang_seconds}",
                "--max-fruitless=6"]  # fmt: skip

    def undisturbed(self, skipped: list[list[int]]) -> dict[str, Any]:
        """The tensors of a run that nothing happened to, and that left out the data of these steps."""
        key = json.dumps(skipped)
        if key not in self._expected:
            run = self.folder / f"undisturbed-{len(self._expected)}"
            process = self._start(run, run.with_suffix(".log"), *([f"data.skip={key}"] if skipped else []))
            assert process.wait(600) == 0, run.with_suffix(".log").read_text()[-4000:]
            self._expected[key] = tensors(run)
        return self._expected[key]

    def _start(self, run: Path, log: Path, *overrides: str) -> subprocess.Popen[bytes]:
        with log.open("ab") as out:
            return subprocess.Popen(
                self.command(run, *overrides), cwd=self.folder, env=self.environ, stdout=out, stderr=out
            )

    def disturbed(self, name: str, kinds: list[str]) -> tuple[list[Hit], Path]:
        """One run under these faults, one after the other. Raises AssertionError, TimeoutError."""
        run = self.disk / name
        log = self.folder / f"{name}.log"
        stored = [f"checkpoint.remote={self.store.as_uri()}"] if "store_errors" in kinds else []
        process = self._start(run, log, *stored)
        target = Target(process.pid, run, self.disk, self.store, self.folder / "mischief.txt", self.dice)
        hits = []
        try:
            for kind in kinds:
                if not self._until_it_trains(run, process):
                    break
                time.sleep(self.dice.uniform(0.2, 3.0))
                if process.poll() is not None or len(target.ranks()) < self.ranks:
                    break
                hits.append(self._strike(kind, target, run))
            code = process.wait(600)
        except BaseException:
            print(log.read_text()[-4000:], file=sys.stderr)
            raise
        finally:
            end_of(process)
        assert code == 0, f"{name} ended with {code}\n{log.read_text()[-4000:]}"
        return hits, run

    def _until_it_trains(self, run: Path, process: subprocess.Popen[bytes]) -> bool:
        wait_for(lambda: trains(run) or process.poll() is not None, "training", 180)
        return process.poll() is None

    def _strike(self, kind: str, target: Target, run: Path) -> Hit:
        attempt = attempts(run)
        before = [e for e in events(run) if e["event"] == "end"]
        at = time.time()
        FAULTS[kind](target)
        hit = Hit(
            kind, time.time() if kind == "corrupt" else at
        )  # corrupt waits for a fresh checkpoint first
        complete = [e.step for e in entries(run / "checkpoints") if e.step not in target.lost]
        if kind not in RESTARTS:
            hit.recovered = time.time()
            return hit
        wait_for(lambda: attempts(run) > attempt and trains(run), f"new attempt after {kind}", 240)
        end = [e for e in events(run) if e["event"] == "end"][len(before)]
        hit.detected, hit.seen = end["time"], end["rule"]
        last = next(e for e in reversed(events(run)) if e["event"] == "stepping")
        hit.recovered = last["time"]
        assert last["step"] > max(complete, default=0), f"a checkpoint was lost: {complete}, but {last}"
        return hit


def events(run: Path) -> list[dict[str, Any]]:
    """The supervisor's log so far."""
    file = run / "logs" / "supervisor" / "events.jsonl"
    return list(read_rows(file)) if file.exists() else []


def attempts(run: Path) -> int:
    """Begun so far."""
    return sum(event["event"] == "start" for event in events(run))


def trains(run: Path) -> bool:
    """Whether the newest attempt makes steps."""
    names = [e["event"] for e in events(run) if e["event"] in ("start", "stepping", "end")]
    return bool(names) and names[-1] == "stepping"


def tensors(run: Path) -> dict[str, Any]:
    """Of the last step's checkpoint: parameters, optimizer state, everything."""
    found = {}
    for file in sorted(step_folder(run / "checkpoints", STEPS).glob("data-*.safetensors")):
        found.update({f"{file.name}/{name}": tensor for name, tensor in load_file(file).items()})
    assert found, f"no checkpoint of step {STEPS} in {run}"
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all((a[n].view(-1).numpy() == b[n].view(-1).numpy()).all() for n in a)


def end_of(process: subprocess.Popen[bytes]) -> None:
    """Nothing of a run outlives it."""
    left = [p.pid for p in descendants(process.pid)]
    if process.poll() is None:
        process.kill()
        process.wait()
    for pid in left:
        subprocess.run(["kill", "-9", str(pid)], check=False, stderr=subprocess.DEVNULL)


def orphans(folder: Path) -> list[str]:
    """Command lines of processes that still work in the chaos folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if path.resolve() == folder and int(path.parent.name) != os.getpid():
                found.append((path.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def summary(hits: list[Hit]) -> str:
    """The table of docs/operations.md."""
    lines = ["| fault | times | seen as | seconds to its detection | seconds until training went on |",
             "|---|---|---|---|---|"]  # fmt: skip
    for kind in dict.fromkeys(hit.kind for hit in hits):
        these = [hit for hit in hits if hit.kind == kind]
        seen = ", ".join(sorted({hit.seen for hit in these if hit.seen})) or SEEN[kind]
        ends = [spread([h.detected - h.at for h in these if h.detected])]
        ends.append(spread([h.recovered - h.at for h in these if h.recovered]))
        lines.append(f"| {kind} | {len(these)} | {seen} | {ends[0]} | {ends[1]} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Median and extremes."""
    if not values:
        return "-"
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def campaign(chaos: Chaos, kinds: list[str], faults: int, per_run: int) -> tuple[list[Hit], list[dict]]:
    """Runs until there were so many faults. Raises AssertionError where one does not end as it should."""
    chaos.undisturbed([])
    hits: list[Hit] = []
    runs: list[dict[str, Any]] = []
    planned: list[str] = []
    while len(hits) < faults:
        wanted = min(per_run, faults - len(hits))
        while len(planned) < wanted:  # every kind as often as the others, in any order
            planned += chaos.dice.sample(kinds, len(kinds))
        number = len(runs) + 1
        new, run = chaos.disturbed(f"run-{number}", planned[:wanted])
        planned = planned[len(new) :]
        hits += new
        expected = chaos.undisturbed(open_checkpoint(run).meta["skipped_data"])
        assert same(expected, tensors(run)), f"{run} does not end as the undisturbed run does"
        assert not (left := orphans(chaos.folder)), f"{run} leaves processes: {left}"
        finish = events(run)[-1]
        agree = goodput_by_metrics(run)
        runs.append({"faults": len(new), "wall": finish["wall"], "goodput": finish["goodput"],
                     "goodput_by_metrics": agree, "seconds": finish["seconds"]})  # fmt: skip
        share = f"goodput {finish['goodput']:.3f}, by its metrics {agree:.3f}"
        what = f"{len(new)} faults, {finish['attempts']} attempts, {finish['wall']:.0f} s"
        print(f"run {number}: {what}, {share}; ends as undisturbed", flush=True)
        subprocess.run(["rm", "-rf", str(run)], check=True)
        for path in chaos.store.iterdir():
            subprocess.run(["rm", "-rf", str(path)], check=True)
    return hits, runs


def goodput_by_metrics(run: Path) -> float:
    """From the rows of metrics.jsonl, each step's own time, and the first steps of all attempts."""
    firsts = [event["step"] for event in events(run) if event["event"] == "stepping"]
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "train"]
    seconds = 0.0
    for row in rows:
        made_by = next((first for first in reversed(firsts) if first <= row["step"]), None)
        if made_by is not None and made_by != row["step"]:
            seconds += row["step_seconds"]
    return seconds / events(run)[-1]["wall"]


def main() -> int:
    """See the module text."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--per-run", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hang-seconds", type=float, default=30.0)
    parser.add_argument("--kinds", default=",".join(FAULTS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if os.geteuid() != 0:
        words = ["unshare", "--map-root-user", "--mount", sys.executable, *sys.argv]
        return subprocess.run(words, check=False).returncode
    with tempfile.TemporaryDirectory(prefix="hlat-chaos-") as folder:
        chaos = Chaos(Path(folder), args.ranks, args.seed, args.hang_seconds)
        try:
            hits, runs = campaign(chaos, args.kinds.split(","), args.faults, args.per_run)
        finally:
            chaos.close()
    print(f"\n{len(hits)} faults in {len(runs)} runs\n\n{summary(hits)}\n")
    wall = sum(run["wall"] for run in runs)
    books, rows = (sum(run[name] * run["wall"] for run in runs) / wall for name in GOODPUT)
    apart = abs(books / rows - 1)
    print(f"goodput of all: {books:.2%} by the books, {rows:.2%} by the metrics, {apart:.1%} apart")
    if args.json:
        args.json.write_text(json.dumps({"hits": [vars(hit) for hit in hits], "runs": runs}, indent=1))
    return 0 if apart < (LARGEST_GAP if len(runs) > 1 else LARGEST_GAP_OF_ONE) else 1


if __name__ == "__main__":
    sys.exit(main())
