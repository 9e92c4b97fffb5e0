"""All ranks of a job must run the same thing: code, versions, recipe, data. Compared before work begins."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import hlat
from hlat.errors import UserError
from hlat.observe.environment import versions
from hlat.observe.lock import LOCK_FILE
from hlat.recipe import Recipe, diff

if TYPE_CHECKING:
    from hlat.backend.cluster import Cluster

_NEURON = ("torch-xla", "torch-neuronx", "neuronx-distributed", "neuronx-cc", "libneuronxla", "nki")
_HASHES = {
    "code": ("runs other HLAT code than", "install the same HLAT on every machine"),
    "recipe": ("has another recipe than", "give every rank the same recipe and overrides"),
    "data": ("reads other data than", "give every machine the same text and tokenizer"),
}
_VALUES = {
    "hlat": "runs HLAT",
    "torch": "runs torch",
    "python": "runs Python",
    "neuron": "has of Neuron",
    "device": "computes on",
}

SHARED_SECONDS = 60.0  # for which a network file system may not show what another machine has just made


def code_hash(folder: Path | None = None) -> str:
    """SHA-256 (hex) over the names and bytes of HLAT's own Python files."""
    folder = folder or Path(hlat.__file__).parent
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        total.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
        total.update(file.read_bytes())
    return total.hexdigest()


def software() -> dict[str, str]:
    """What must be the same on every machine: HLAT's code, and the versions of what can change a result."""
    return {
        "code": code_hash(),
        "hlat": hlat.__version__,
        "torch": torch.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "neuron": neuron_software(),
    }


def neuron_software(root: Path = Path("/")) -> str:
    """Neuron packages and driver with their versions, in a line; "nothing" without any."""
    found = {name: version for name, version in versions().items() if name in _NEURON}
    with contextlib.suppress(OSError):
        found["driver"] = (
            (root / "sys/module/neuron/version").read_text(encoding="utf-8", errors="replace").strip()
        )
    return ", ".join(f"{name} {version}" for name, version in found.items()) or "nothing"


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 (hex) of a recipe with its bases, overrides and defaults resolved."""
    return hashlib.sha256(recipe.to_yaml().encode()).hexdigest()


def majority(values: Sequence[Any]) -> int:
    """Where the value stands that most have; 0 where no value has a majority."""
    common, count = Counter(values).most_common(1)[0]
    return values.index(common) if count > len(values) / 2 else 0


def check_machines(cluster: Cluster, seconds: float) -> None:
    """Choose this rank's device and compare code, versions and kind of device; refuse a GPU that two ranks
    share.

    Raises UserError on every rank alike, naming the ranks that differ, for all but a rank without a GPU.
    """
    if cluster.world == 1:
        cluster.choose_device()
        return
    gpu = cluster.choose_device()
    facts = {**software(), "device": cluster.device.type, "gpu": gpu}
    gathered = cluster.gather("machine", facts, seconds)
    refuse_differences(gathered, [str(member) for member in cluster.members])
    owners: dict[tuple[str, str], int] = {}
    for rank, (member, found) in enumerate(zip(cluster.members, gathered, strict=True)):
        other = owners.setdefault((member.host, found["gpu"]), rank)
        if found["device"] == "cuda" and other != rank:
            fix = "start one process a GPU, or set CUDA_VISIBLE_DEVICES='' to train on CPUs"
            raise UserError(f"ranks {other} and {rank} share one GPU", where=member.host, fix=fix)


def check_recipe(cluster: Cluster, recipe: Recipe, seconds: float) -> None:
    """Compare the resolved recipes. Raises UserError on every rank alike."""
    if cluster.world == 1:
        return
    cluster.store.set(f"recipe-text/{cluster.rank}", json.dumps(recipe.to_dict()))
    facts = cluster.gather("recipe", {"recipe": recipe_hash(recipe)}, seconds)

    def detail(rank: int, other: int) -> str:
        texts = [json.loads(cluster.store.get(f"recipe-text/{r}")) for r in (rank, other)]
        key, mine, theirs = diff(*(Recipe.from_dict(text) for text in texts))[0]
        return f"{key} is {mine!r} instead of {theirs!r}"

    refuse_differences(facts, [str(member) for member in cluster.members], detail)


def check_data(cluster: Cluster, fingerprint: str, seconds: float) -> None:
    """Compare what the data holds. Raises UserError on every rank alike."""
    facts = cluster.gather("data", {"data": fingerprint}, seconds)
    refuse_differences(facts, [str(member) for member in cluster.members])


def check_shared(cluster: Cluster, folder: Path, seconds: float) -> None:
    """Every rank must see the run folder that rank 0 has begun: they write a checkpoint together.

    Raises UserError on every rank alike.
    """
    if cluster.world == 1:
        return
    lock = folder / LOCK_FILE
    expected = cluster.from_first("run-folder", _content(lock), seconds)
    end = time.monotonic() + SHARED_SECONDS
    while not (seen := _content(lock) == expected) and time.monotonic() < end:
        time.sleep(0.2)  # a network file system may remember for a while that there was no such folder
    blind = [rank for rank, sees in enumerate(cluster.gather("sees-folder", seen, seconds)) if not sees]
    if blind:
        first = cluster.members[blind[0]]
        what = f"{first} and {len(blind) - 1} more do not" if len(blind) > 1 else f"{first} does not"
        fix = "put run.dir on a file system that all nodes share; checkpoint.remote copies it from there"
        raise UserError(f"{what} see the run folder that rank 0 writes to", where=str(folder), fix=fix)


def _content(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def refuse_differences(facts: Sequence[Mapping[str, str]], names: Sequence[str], detail: Any = None) -> None:
    """Raise UserError for the first fact that is not the same on all ranks.

    What most ranks have counts as right, or what rank 0 has where there is no majority.

    Args:
        facts: by rank; the same keys everywhere.
        names: of the ranks.
        detail: (rank, right rank) -> what differs, in place of the hashes.
    """
    for key in (*_HASHES, *_VALUES):
        values = [fact.get(key) for fact in facts]
        if len(set(values)) == 1:
            continue
        right = majority(values)
        wrong = [rank for rank, value in enumerate(values) if value != values[right]]
        first = wrong[0]
        alike = [names[rank] for rank in wrong if values[rank] == values[first]]
        who = ", ".join(alike[:8]) + (f" and {len(alike) - 8} more" if len(alike) > 8 else "")
        if key in _VALUES:
            what = f"{who}: {_VALUES[key]} {values[first]}, but rank {right} {values[right]}"
            raise UserError(what, fix="use the same on every machine")
        says, fix = _HASHES[key]
        if detail is not None:
            how = detail(first, right)
        else:
            how = f"sha256 {_short(values[first])} instead of {_short(values[right])}"
        raise UserError(f"{who} {says} rank {right}: {how}", fix=fix)


def _short(digest: str | None) -> str:
    return f"{digest or '?'}"[:12] + "…"
