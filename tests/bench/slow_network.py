"""Dense and compressed reduction over a network that really is slow: two data-parallel ranks in network
namespaces of their own, joined by a veth link whose rate `tc` limits.

    sudo python tests/bench/slow_network.py                     # 0.1, 1 and 10 Gbit/s
    sudo python tests/bench/slow_network.py --rates 0.1 --reduce '{name: powersgd, start_step: 0}'

The benchmark model of this folder, one sequence of 512 tokens a rank, reduction in fp32, each bucket's
reduction started during backward as in training. Prints seconds a step, bytes on the link, how much faster
compressed is, and from a fit of seconds = a + b / rate the rate above which it stops paying.

Needs root, `ip` and `tc` (iproute2); says so and ends with 0 where they are missing. Namespaces are called
hlat-slow-PID-N; what a killed run left of its own is removed by the next.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PREFIX, DEVICE, PORT = "hlat-slow", "slow", 29541
ADDRESSES = ("10.213.77.1", "10.213.77.2")
WARM_UP = 3


def missing() -> str:
    """What this machine lacks; empty when nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    gone = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"{' and '.join(gone)} not found: install iproute2" if gone else ""


def call(*words: str) -> str:
    """Run a command; its output. Raises with what it said."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def name(rank: int) -> str:
    """This process's namespace for a rank."""
    return f"{PREFIX}-{os.getpid()}-{rank}"


def remove(namespace: str) -> None:
    """Delete a namespace and end what runs in it."""
    for pid in call("ip", "netns", "pids", namespace).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    call("ip", "netns", "delete", namespace)  # its end of the link goes with it, and so the other end


def remove_stale() -> None:
    """Remove namespaces of runs of this script that no longer exist."""
    for line in call("ip", "netns", "list").splitlines():
        found = re.match(rf"({PREFIX}-(\d+)-\d)\b", line)
        if found and not Path(f"/proc/{found[2]}").exists():
            remove(found[1])


@contextlib.contextmanager
def network(gigabits: float) -> Iterator[None]:
    """Two namespaces and a link between them, limited in both directions; 0: not limited."""

    def stop(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    former = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    made: list[str] = []
    try:
        for rank in (0, 1):
            call("ip", "netns", "add", name(rank))
            made.append(name(rank))
        one, other = made
        call("ip", "link", "add", DEVICE, "netns", one, "type", "veth", "peer", DEVICE, "netns", other)
        for namespace, address in zip(made, ADDRESSES, strict=True):
            call("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                call("ip", "-n", namespace, "link", "set", device, "up")
            if gigabits:
                burst = max(64_000, int(gigabits * 1e9 / 8 / 250))  # what the rate lets through in 4 ms
                limit = ("rate", f"{gigabits * 1000:g}mbit", "burst", str(burst), "latency", "100ms")
                call("tc", "-n", namespace, "qdisc", "add", "dev", DEVICE, "root", "tbf", *limit)
        yield
    finally:
        for namespace in made:
            remove(namespace)
        for number, handler in former.items():
            signal.signal(number, handler)


def measure(reduce: str, gigabits: float, steps: int, compiled: bool) -> dict[str, float]:
    """Train in a network of that rate; median seconds a step and bytes a step on the link."""
    with tempfile.TemporaryDirectory() as folder, network(gigabits):
        out = Path(folder) / "result.json"
        ranks = []
        try:
            for rank in (0, 1):
                command = ["ip", "netns", "exec", name(rank), sys.executable, __file__, "--rank", str(rank)]
                command += ["--reduce", reduce, "--steps", str(steps), "--out", str(out)]
                command += ["--compile"] if compiled else []
                environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": DEVICE}
                environment |= {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(PORT)}
                environment |= {"RANK": str(rank), "WORLD_SIZE": "2"}
                ranks.append(subprocess.Popen(command, env=environment))
            codes = [rank.wait(timeout=1200) for rank in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if any(codes):
            raise RuntimeError(f"a rank failed: {codes}")
        result: dict[str, float] = json.loads(out.read_text())
        return result


def rank_main(rank: int, reduce: str, steps: int, compiled: bool, out: Path) -> None:
    """One rank: train, and write what rank 0 saw."""
    import torch
    import torch.distributed as dist
    from model import build

    from hlat.train.step import train_step

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    batch = ("parallel.dp=2", "data.micro_batch=1", "data.global_batch=2", "precision.reduce=fp32")
    run = build(*batch, f"reduce={reduce}", compiled=compiled)
    counter = Path(f"/sys/class/net/{DEVICE}/statistics/tx_bytes")
    times, sent, values = [], 0, {}
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            sent = int(counter.read_text())
        start = time.perf_counter()
        values = train_step(run)
        float(values["loss"])
        times.append(time.perf_counter() - start)
    dist.barrier()
    link = (int(counter.read_text()) - sent) / steps
    wire = float(values.get("reduce/wire_bytes", 4 * sum(b.length for b in run.buckets)))
    if rank == 0:
        seconds = statistics.median(times[WARM_UP:])
        out.write_text(json.dumps({"seconds": seconds, "link_bytes": link, "wire_bytes": wire}))
    dist.destroy_process_group()


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least squares of seconds = a + b / rate over (rate, seconds), weighted by 1 / seconds squared."""
    import numpy as np

    rates, seconds = np.array(points).T
    table = np.stack([np.ones_like(rates), 1 / rates], 1) / seconds[:, None]
    a, b = np.linalg.lstsq(table, np.ones_like(rates), rcond=None)[0]
    return float(a), float(b)


def main() -> None:
    """Measure in turns and print medians, ratios, the crossover."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 1, 10], help="Gbit/s; 0: no limit")
    parser.add_argument("--reduce", default="{name: conef, ratio: 0.1, size: 0.2, start_step: 0}")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="torch.compile, as long CPU runs do")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        rank_main(args.rank, args.reduce, args.steps, args.compile, args.out)
        return
    if lack := missing():
        print(f"skipped: {lack}")
        return
    remove_stale()
    kinds = {"dense": "{name: dense}", "compressed": args.reduce}
    found: dict[tuple[str, float], list[float]] = {}
    for _ in range(args.rounds):
        for rate in args.rates:
            for kind, reduce in kinds.items():
                result = measure(reduce, rate, args.steps, args.compile)
                found.setdefault((kind, rate), []).append(result["seconds"])
                print(f"{rate:g} Gbit/s {kind:10} {result}", flush=True)
    medians = {key: statistics.median(values) for key, values in found.items()}
    for rate in args.rates:
        dense, compressed = medians["dense", rate], medians["compressed", rate]
        times = f"{dense / compressed:.2f} times as fast"
        print(f"{rate:g} Gbit/s: {dense:.3f} s dense, {compressed:.3f} s compressed: {times}")
    limited = [rate for rate in args.rates if rate]
    if len(limited) > 1:
        (a, b), (c, d) = (fit([(r, medians[kind, r]) for r in limited]) for kind in kinds)
        rate = f"{(b - d) / (c - a):.1f} Gbit/s" if c > a else "none up to the highest rate measured"
        print(f"dense {a:.3f} + {b:.3f} / rate, compressed {c:.3f} + {d:.3f} / rate; stops paying at: {rate}")


if __name__ == "__main__":
    main()
