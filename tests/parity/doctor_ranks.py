"""`hlat doctor --cluster` on machines that are not what they seem: each rank is a machine of its own, and has
the mishaps that the environment variable MISHAPS (JSON, by rank) gives it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from typing import Any

RANK = os.environ.get("RANK", "0")
MISHAPS: list[str] = json.loads(os.environ.get("MISHAPS", "{}")).get(RANK, [])


def main() -> None:
    socket.gethostname = lambda: f"node-{RANK}"  # type: ignore[assignment]
    from hlat.doctor.finding import Finding
    from hlat.supervise import cluster_check, measure

    arguments = sys.argv[1:]
    product, reduce, pair = measure.product_seconds, measure.reduce_seconds, measure.pair_seconds
    look, software = cluster_check.node_findings, cluster_check.software
    fake: dict[str, Any] = {
        "slow": lambda: setattr(measure, "product_seconds", lambda device: product(device) + 100),
        "memory": lambda: setattr(
            cluster_check,
            "node_findings",
            lambda *a, **k: [*look(*a, **k), Finding("devices.memory", "fail", "uncorrected memory errors")],
        ),
        "torch": lambda: setattr(cluster_check, "software", lambda: {**software(), "torch": "2.9.0"}),
        "code": lambda: setattr(cluster_check, "software", lambda: {**software(), "code": "f" * 64}),
        "recipe": lambda: arguments.insert(3, "optim.lr=9e-4"),
        "unreadable": lambda: arguments.insert(3, "optim.lr_rate=9e-4"),
        "clock": lambda: setattr(cluster_check.time, "time", lambda now=time.time: now() + 100),
        "wrong": lambda: setattr(measure, "reduce_seconds", lambda *a: (reduce(*a)[0], False)),
        "killed": lambda: setattr(measure, "reduce_seconds", lambda *a: os._exit(9)),
        "link": lambda: setattr(measure, "pair_seconds", lambda *a: (taken := pair(*a)) and taken + 5),
    }
    for mishap in MISHAPS:
        fake[mishap]()
    from hlat.cli import main as run

    sys.exit(run(arguments))


if __name__ == "__main__":
    main()
