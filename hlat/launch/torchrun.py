"""A script that is started by hand on every node."""

from __future__ import annotations

from hlat.launch.plan import Plan
from hlat.launch.template import fill, word, words

PORT = 29500  # torch's own default


def script(plan: Plan, port: int = PORT) -> str:
    """The script; its arguments are a node's number and where node 0 is."""
    return fill(
        "torchrun.sh",
        {
            "title": plan.title,
            "work_dir": word(plan.work_dir.absolute()),
            "node_count": word(plan.nodes),
            "interface": word(plan.interface),
            "command": "\n    ".join(words([item]) for item in plan.command("supervise")),
            "environment": plan.environment(),
            "options": words(["--nproc-per-node", plan.processes, "--grace", plan.grace]),
            "port": word(port),
        },
    )
