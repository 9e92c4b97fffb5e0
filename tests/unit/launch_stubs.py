"""Stand-ins for a cluster's commands: they write down how they were called, and `srun` runs what it is given.

`Cluster(folder)` makes them; `run(script)` runs a batch script as SLURM would.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hlat.launch.plan import Plan
from hlat.recipe import load

RECIPE = """
run: {steps: 3}
model: {layers: 1, hidden: 16, heads: 2, kv_heads: 2, ffn: 32, vocab: 257, max_seq_len: 16}
data: {sources: [{path: text}], tokenizer: bytes, micro_batch: 1, global_batch: 64}
compile: false
"""
SRUN = """
while [[ $1 == --* ]]; do shift; done
for ((i = 0; i < SLURM_NNODES; i++)); do
    SLURM_NODEID=$i SLURMD_NODENAME=node$((i + 1)) "$@" &
    started+=($!)
done
for pid in "${started[@]}"; do
    code=0
    wait "$pid" || code=$?
    highest=$((code > ${highest:-0} ? code : ${highest:-0}))
done
exit "$highest"
"""
SCONTROL = """
echo "scontrol $*" >>"$RECORD/calls"
case "$1 $2" in
"show hostnames") printf 'node1\\nnode2\\n' ;;
"show job") echo "JobId=7 JobState=COMPLETING Reason=${REASON:-None} ExcNodeList=${EXCLUDED:-(null)} A=0" ;;
"show nodes") echo "NodeName=q-7 Arch=x86_64 NodeAddr=q-7 NodeHostName=ip-10-0-0-7 Version=22" ;;
"show node") [[ $3 == node2 ]] ;;
esac
"""
SCANCEL = """
echo "scancel $*" >>"$RECORD/calls"
cat "$RECORD/${SIGNALLED:-pid}"-* | xargs kill -TERM
"""
# In place of Python. CODES: how each node ends; `wait` ends with 75 on SIGTERM.
PYTHON = """
printf '%s\\0' "$@" >"$RECORD/argv-${SLURM_NODEID:-none}"
env -0 >"$RECORD/environ-${SLURM_NODEID:-none}"
codes=($CODES)
code=${codes[${SLURM_NODEID:-0}]:-0}
[[ $code == wait ]] || exit "$code"
trap 'exit 75' TERM
echo $PPID >"$RECORD/task-$SLURM_NODEID"
echo $$ >"$RECORD/pid-$SLURM_NODEID"
while :; do sleep 0.05; done
"""
SBATCH = """
printf '%s\\0' "$@" >>"$RECORD/sbatch"
printf '\\n' >>"$RECORD/sbatch"
echo "$((40 + $(wc -l <"$RECORD/sbatch")));cluster"
"""
SHOW = 'printf "%s\\0" "$@" >"$RECORD/NAME"\n'


@dataclass
class Cluster:
    """A folder of commands that comes first on the PATH. `environ`: for what runs there."""

    folder: Path
    environ: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.record = self.folder / "record"
        self.commands = self.folder / "bin"
        self.record.mkdir(parents=True)
        self.commands.mkdir()
        for name, text in {
            "srun": SRUN,
            "scontrol": SCONTROL,
            "scancel": SCANCEL,
            "sbatch": SBATCH,
            "kubectl": SHOW.replace("NAME", "kubectl"),
            "python-stub": PYTHON,
        }.items():
            self.write(name, text)
        path = f"{self.commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environ = {**os.environ, "PATH": path, "RECORD": str(self.record)}
        job = {"JOB_ID": "7", "NNODES": "2", "JOB_NODELIST": "node[1-2]"}
        self.environ |= {f"SLURM_{name}": value for name, value in job.items()}

    @property
    def python(self) -> str:
        """What stands in for Python on the nodes."""
        return str(self.commands / "python-stub")

    def write(self, name: str, text: str) -> None:
        """A command."""
        (self.commands / name).write_text(f"#!/bin/bash\n{text}")
        (self.commands / name).chmod(0o755)

    def run(self, script: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a script from a file, as SLURM does."""
        return subprocess.run(
            ["bash", str(self.file(script)), *arguments],
            env=self.environ | environ,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def start(self, script: str, **environ: str) -> subprocess.Popen[bytes]:
        """Start a script and come back."""
        return subprocess.Popen(["bash", str(self.file(script))], env=self.environ | environ, cwd=self.folder)

    def plan(self, recipe: str, *overrides: str, **more: Any) -> Plan:
        """Of a run on this cluster, without what `hlat launch` checks."""
        given = {"nodes": 2, "processes": 2, "python": self.python, "job_name": "j", "work_dir": self.folder}
        return Plan(load(recipe), recipe, overrides, **given | more)

    def file(self, script: str) -> Path:
        """A script as a file."""
        path = self.folder / "script"
        path.write_bytes(script.encode())
        return path

    def words(self, name: str) -> list[str]:
        """The words that a command was given."""
        return (self.record / name).read_bytes().decode().split("\0")[:-1]

    def calls(self, name: str) -> list[str]:
        """The calls of scontrol and scancel that begin like this."""
        file = self.record / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        return [line for line in lines if line.startswith(name)]
