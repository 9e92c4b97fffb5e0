"""One cluster for all tests of this folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def slurm(load_module) -> Iterator[Any]:
    """A running cluster; tests are skipped where there can be none."""
    module = load_module(Path(__file__).with_name("cluster.py"))
    if reason := module.missing():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="hlat-slurm-", dir="/tmp"))  # short: sockets have long names
    try:
        with module.Cluster(folder) as cluster:
            cluster.until = module.until
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)
