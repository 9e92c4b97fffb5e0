"""What a run ran on: versions, machine, threads, environment variables that matter (never secrets)."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import hlat
from hlat.host.git import head
from hlat.host.limits import cores, memory
from hlat.observe.redact import names_secret, redact, redact_all

_PREFIXES = ("NEURON_", "XLA_", "OMP_", "NCCL_", "SLURM_", "FI_", "MALLOC_")
_PACKAGES = (
    "torch",
    "numpy",
    "pydantic",
    "safetensors",
    "tokenizers",
    "sentencepiece",
    "transformers",
    "datasets",
    "triton",
    "torch-xla",
    "torch-neuronx",
    "neuronx-distributed",
    "neuronx-cc",
    "libneuronxla",
    "nki",
)


def describe(neuron_profile: Iterable[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The environment of this process as JSON-ready data; a fact that cannot be found is None or left out.

    neuron_profile: what was set for Neuron and why (`hlat.backend.neuron.profile.Applied.to_dict`).
    """
    profile = [dict(item) for item in neuron_profile]
    facts = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "hlat": hlat.__version__,
        "python": platform.python_version(),
        "versions": versions(),
        "git": git_state(Path.cwd()),
        "host": socket.gethostname(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": {
            "name": cpu_name(),
            "count": os.cpu_count(),
            "usable": cores(),
            "memory_gib": _memory_gib(),
        },
        **_torch_facts(),
        "variables": variables(os.environ),
        **({"neuron_profile": profile} if profile else {}),
    }
    return redact_all(facts)


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables with a prefix that matters (NEURON_, XLA_, FI_, MALLOC_, OMP_, NCCL_, SLURM_), sorted.

    A name that smells of a secret is dropped, and secrets in the value of another are replaced.
    """
    return {
        name: redact(environ[name], environ)
        for name in sorted(environ)
        if name.startswith(_PREFIXES) and not names_secret(name)
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that can change a result; absent ones are left out."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """`{commit, dirty}` of the repository around `folder`; None when there is none, or no git. `dirty` is
    None where it cannot be known without the repository's own programs, which are never run.
    """
    found = head(folder)
    return None if found is None else {"commit": found[0], "dirty": found[1]}


def cpu_name() -> str:
    """The processor's marketing name where the system tells it, else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    found = memory()
    return None if found is None else round(found.total / 2**30, 1)


def _torch_facts() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
        "threads": {"torch": torch.get_num_threads(), "interop": torch.get_num_interop_threads()},
    }
