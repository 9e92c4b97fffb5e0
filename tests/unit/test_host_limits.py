"""Cores and memory by affinity and control groups, in trees laid out as the kernel shows them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hlat.host import limits
from hlat.host.limits import Memory, cores, cpu_quota, memory
from hlat.supervise.attempt import Attempt, Place

GIB = 1 << 30
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:27 {top} /sys/fs/cgroup/memory rw shared:5 - cgroup cgroup rw,memory\n"
    "32 23 0:28 {top} /sys/fs/cgroup/cpu,cpuacct rw shared:6 - cgroup cgroup rw,cpu,cpuacct\n"
)
HYBRID = V2.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified ")
NO_LIMIT_V1 = "9223372036854771712"


class Tree:
    """Files below a root, as of a machine of 64 GiB with 48 available."""

    def __init__(self, root: Path, group: str, mounts: str) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: {64 << 20} kB\nMemFree: 7 kB\nMemAvailable: {48 << 20} kB\n")
        self.write("proc/self/cgroup", group)
        self.write("proc/self/mountinfo", f"22 1 8:1 / / rw - ext4 /dev/root rw\n{mounts}")

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def v2(self, group: str, **files: str) -> None:
        for name, text in files.items():
            self.write(f"sys/fs/cgroup/{group}/{name.replace('_', '.', 1)}", f"{text}\n")


@pytest.fixture
def affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))


def test_version_2_the_least_along_the_path(tmp_path: Path, affinity: None) -> None:
    tree = Tree(tmp_path, "0::/slurm/job_7/step_0\n", V2)
    assert cores(tmp_path) == 16 and memory(tmp_path) == Memory(64 * GIB, 48 * GIB)  # no file at all
    tree.v2("slurm/job_7/step_0", cpu_max="max 100000", memory_max="max")
    assert cores(tmp_path) == 16 and memory(tmp_path) == Memory(64 * GIB, 48 * GIB)
    tree.v2("slurm/job_7", cpu_max="450000 100000", memory_max=f"{8 * GIB}", memory_current=f"{6 * GIB}")
    tree.v2("slurm/job_7", memory_stat=f"anon {GIB}\nfile {4 * GIB}\ninactive_file {3 * GIB}\nslab 1")
    tree.v2("slurm", cpu_max="1000000 100000", memory_max=f"{16 * GIB}", memory_current=f"{12 * GIB}")
    assert cpu_quota(tmp_path) == 4.5 and cores(tmp_path) == 4
    # The job may have 8 GiB and holds 3 that are not cached files; around it 4 GiB are free.
    assert memory(tmp_path) == Memory(8 * GIB, 4 * GIB, limited=True)
    tree.v2("slurm/job_7/step_0", cpu_max="50000 100000", memory_max=f"{128 * GIB}")
    assert cores(tmp_path) == 1, "half a core is one thread"
    assert memory(tmp_path) == Memory(8 * GIB, 4 * GIB, limited=True)


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("top", ["/", "/docker/abc", "/docker/abc/../elsewhere"])
def test_version_1_of_a_host_and_of_a_container(
    tmp_path: Path, affinity: None, top: str, hybrid: bool
) -> None:
    """The last one is mounted from where its own path does not lead: what is at the top counts."""
    group = "7:memory:/docker/abc/in\n4:cpu,cpuacct:/docker/abc/in\n1:name=systemd:/x\n0::/docker/abc/in\n"
    tree = Tree(tmp_path, group, V1.format(top=top) + HYBRID * hybrid)
    inside = {"/": "docker/abc/in", "/docker/abc": "in"}.get(top, ".")
    tree.write(f"sys/fs/cgroup/memory/{inside}/memory.limit_in_bytes", f"{2 * GIB}\n")
    tree.write(f"sys/fs/cgroup/memory/{inside}/memory.usage_in_bytes", f"{GIB}\n")
    tree.write(f"sys/fs/cgroup/memory/{inside}/memory.stat", f"total_inactive_file {GIB // 2}\n")
    tree.write("sys/fs/cgroup/memory/../memory/x/memory.limit_in_bytes", "1\n")  # another's
    tree.write(f"sys/fs/cgroup/cpu,cpuacct/{inside}/cpu.cfs_quota_us", "300000\n")
    tree.write(f"sys/fs/cgroup/cpu,cpuacct/{inside}/cpu.cfs_period_us", "100000\n")
    assert cores(tmp_path) == 3
    assert memory(tmp_path) == Memory(2 * GIB, 3 * GIB // 2, limited=True)
    tree.write(f"sys/fs/cgroup/memory/{inside}/memory.limit_in_bytes", f"{NO_LIMIT_V1}\n")
    tree.write(f"sys/fs/cgroup/cpu,cpuacct/{inside}/cpu.cfs_quota_us", "-1\n")
    assert cores(tmp_path) == 16 and memory(tmp_path) == Memory(64 * GIB, 48 * GIB)


def test_a_space_in_a_mount_point_and_nonsense(tmp_path: Path, affinity: None) -> None:
    tree = Tree(tmp_path, "0::/\nnonsense\n::\n", "short\n" + V2.replace("fs/cgroup ", "fs/c\\040group "))
    for text in ("", "0 0", "5", "-1 100000", "a b", "\0"):
        tree.write("sys/fs/c group/cpu.max", text)
        tree.write("sys/fs/c group/memory.max", text)
        assert cores(tmp_path) == 16
    tree.write("sys/fs/c group/cpu.max", "200000 100000")
    assert cores(tmp_path) == 2
    (tmp_path / "proc/self/cgroup").unlink()
    assert (
        cores(tmp_path) == 16 and cores(tmp_path / "nowhere") == 16 and memory(tmp_path / "nowhere") is None
    )


def test_affinity_is_tighter_than_a_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Tree(tmp_path, "0::/a\n", V2).v2("a", cpu_max="800000 100000")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert cores(tmp_path) == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores(tmp_path) == 1


@settings(max_examples=25, deadline=None)
@given(st.lists(st.none() | st.tuples(st.integers(1, 10**7), st.integers(1000, 10**6)), max_size=5))
def test_the_quota_is_the_least_of_any_depth(tmp_path_factory: pytest.TempPathFactory, quotas: list) -> None:
    root = tmp_path_factory.mktemp("tree")
    path = "/".join("abcde"[: len(quotas)])
    tree = Tree(root, f"0::/{path}\n", V2)
    for depth, quota in enumerate(quotas, 1):
        tree.v2("/".join("abcde"[:depth]), cpu_max="max 100000" if quota is None else "{} {}".format(*quota))
    found = [quota / period for quota, period in filter(None, quotas)]
    assert cpu_quota(root) == (min(found) if found else None)


def test_ranks_share_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Tree(tmp_path, "0::/a\n", V2).v2("a", cpu_max="700000 100000")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr("hlat.supervise.attempt.cores", lambda: limits.cores(tmp_path))
    attempt = Attempt.__new__(Attempt)
    attempt.scratch = tmp_path
    for ranks, threads in ((1, "7"), (2, "3"), (32, "1")):
        attempt.place = Place(nproc=ranks)
        assert attempt._environment({})["OMP_NUM_THREADS"] == threads
    assert attempt._environment({"OMP_NUM_THREADS": "5"})["OMP_NUM_THREADS"] == "5"
