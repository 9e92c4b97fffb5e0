"""Each kind of fault at a random moment of supervised runs; `make chaos` strikes fifty times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"kill", "stop", "term", "corrupt", "full_disk", "store_errors", "nan_batch"}


def may_mount() -> bool:
    """As root, or in a user namespace."""
    probe = ["sh", "-c", "mount -t tmpfs none /mnt && umount /mnt"]
    wrapped = probe if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount", *probe]
    try:
        return subprocess.run(wrapped, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="needs the right to mount a small file system")
def test_every_fault_is_survived(tmp_path: Path) -> None:
    result = tmp_path / "chaos.json"
    command = [sys.executable, str(ROOT / "tests/chaos/run.py"), "--faults=7", "--per-run=7", "--seed=11"]
    command += ["--hang-seconds=10", f"--json={result}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found = json.loads(result.read_text())
    assert {hit["kind"] for hit in found["hits"]} == KINDS
    for run in found["runs"]:
        assert sum(run["seconds"].values()) == pytest.approx(run["wall"], rel=1e-3)
        assert run["goodput"] == pytest.approx(run["goodput_by_metrics"], rel=0.02)
