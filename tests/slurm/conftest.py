"""One cluster for all tests of this folder."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("slurm_cluster", Path(__file__).with_name("cluster.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def slurm() -> Iterator[Any]:
    """A running cluster; tests are skipped where there can be none."""
    module = _load()
    if reason := module.missing():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="hlat-slurm-", dir="/tmp"))  # short: sockets have long names
    try:
        with module.Cluster(folder) as cluster:
            cluster.until = module.until
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)
