"""`hlat doctor --cluster`: every rank of a job looks at its machine, all of them are compared and measured
together, and each rank comes to the same judgement of every machine.

What is said goes through the job's store, so that a rank whose device or network fails can still say so.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from hlat.doctor.finding import Finding
from hlat.errors import UserError
from hlat.recipe import Recipe, diff
from hlat.supervise import measure
from hlat.supervise.node import is_bad, node_findings
from hlat.train.same import majority, recipe_hash, software

if TYPE_CHECKING:
    from hlat.backend.cluster import Cluster

SECONDS = 120.0  # for the ranks to come to the same point, and for a collective
FLOORS = {"cpu": 20e6, "cuda": 1e9, "xla": 1e9}  # bytes per second of an all-reduce; far below any cluster
WAIT = {"cpu": 30.0, "cuda": 60.0, "xla": 900.0}  # for the slowest rank's measurements; NeuronCores compile
_SKEW = 2.0  # seconds between clocks
_HASHES = {"code": "HLAT's code", "recipe": "the recipe"}


@dataclass
class Node:
    """One machine as all ranks judge it. ranks: on it. product: seconds its slowest rank takes for a matrix
    product.
    """

    host: str
    ranks: list[int]
    findings: list[Finding]
    product: float = 0.0

    @property
    def bad(self) -> list[Finding]:
        """What makes it unfit for this job."""
        return is_bad(self.findings)


@dataclass
class Result:
    """nodes: in order of their first rank. findings: about the job as a whole. bandwidth: bytes per second of
    an all-reduce, 0 when it was not measured. kind: of the process group. broken: a measurement failed.
    unreadable: no rank could read the recipe.
    """

    nodes: list[Node]
    world: int
    kind: str = ""
    bandwidth: float = 0.0
    floor: float = 0.0
    findings: list[Finding] = field(default_factory=list)
    broken: bool = False
    unreadable: bool = False

    @property
    def healthy(self) -> bool:
        """Whether nothing failed, on any machine or between them."""
        found = [*self.findings, *(finding for node in self.nodes for finding in node.findings)]
        return all(finding.status != "fail" for finding in found)


def examine(
    cluster: Cluster,
    recipe: Recipe | UserError,
    *,
    kind: str = "",
    device: Callable[[], torch.device] | None = None,
    floor: float | None = None,
    slow: float = 1.5,
) -> Result:
    """Examine all machines of a job; every rank must call it, and gets the same result.

    Args:
        cluster: the joined job. recipe: what this rank has read, or why it could not.
        kind: of the process group (as `Cluster.connect`). device: to measure on (default: the cluster's).
        floor: bytes per second an all-reduce must reach (default: by device).
        slow: a rank that takes so many times the median for a matrix product makes its machine bad.
    """
    mine, place = _look(cluster, recipe, device)
    told = cluster.gather("doctor", mine, SECONDS)
    nodes = _nodes(cluster, told)
    result = Result(nodes, cluster.world, kind or {"cuda": "nccl"}.get(place.type, "gloo"))
    result.unreadable = not any(facts["facts"]["recipe"] for facts in told)
    _compare(nodes, told)
    _compare_clocks(cluster, nodes)
    if any(facts["error"] for facts in told):
        result.findings.append(Finding("measurements", "warn", "not measured: see the machines that failed"))
        return result
    measured = _gather_answers(cluster, _measure(cluster, place, kind), WAIT[place.type])
    result.floor = FLOORS[place.type] if floor is None else floor
    _judge(result, measured, slow)
    if cluster.world > 1 and 0 < result.bandwidth < result.floor and place.type != "xla":
        _find_slow_link(cluster, place, result)
    return result


def _look(
    cluster: Cluster, recipe: Recipe | UserError, device: Callable[[], torch.device] | None
) -> tuple[dict[str, Any], torch.device]:
    """What this rank says of its machine; the first one on each also runs the node checks."""
    findings, error, place = [], "", torch.device("cpu")
    try:
        cluster.choose_device()
        place = device() if device is not None else cluster.device
    except Exception as trouble:
        error = trouble.line() if isinstance(trouble, UserError) else f"{type(trouble).__name__}: {trouble}"
        findings.append(Finding("devices", "fail", f"rank {cluster.rank}: {error}"))
    facts: dict[str, Any] = {**software(), "recipe": "", "values": None}
    if isinstance(recipe, UserError):
        error = error or recipe.line()
        findings.append(Finding("recipe.file", "fail", recipe.line()))
    else:
        facts["recipe"] = recipe_hash(recipe)
        if cluster.first_here:
            hosts = len({member.host for member in cluster.members})
            own = [member.pid for member in cluster.members if member.host == cluster.me.host]
            found = node_findings(recipe, nodes=hosts, ranks=cluster.local_world, own=own)
            findings += found
            facts["values"] = recipe.to_dict()
    told = {"facts": facts, "findings": [asdict(finding) for finding in findings], "error": error}
    return told, place


def _nodes(cluster: Cluster, told: Sequence[dict[str, Any]]) -> list[Node]:
    nodes: dict[str, Node] = {}
    for member, said in zip(cluster.members, told, strict=True):
        node = nodes.setdefault(member.host, Node(member.host, [], []))
        node.ranks.append(member.rank)
        node.findings += [Finding(**{**f, "fix": tuple(f["fix"])}) for f in said["findings"]]
    return list(nodes.values())


def _compare(nodes: Sequence[Node], told: Sequence[dict[str, Any]]) -> None:
    """Name the machines that differ from what most have, in software or in the recipe."""
    facts = [told[node.ranks[0]]["facts"] for node in nodes]
    for key in ("code", "hlat", "torch", "python", "neuron", "recipe"):
        values = [fact[key] for fact in facts]
        right = majority(values)
        for node, fact in zip(nodes, facts, strict=True):
            if fact[key] == values[right] or not fact[key]:
                continue
            how = f"{fact[key]} instead of {values[right]}"
            if key == "recipe" and facts[right]["values"]:
                pair = (Recipe.from_dict(f["values"]) for f in (fact, facts[right]))
                name, here, there = diff(*pair)[0]
                how = f"{name} is {here!r} instead of {there!r}"
            elif key in _HASHES:
                how = f"{_HASHES[key]} differs: sha256 {fact[key][:12]}… instead of {values[right][:12]}…"
            where = f"on {nodes[right].host}" + (" and most others" if len(nodes) > 2 else "")
            node.findings.append(
                Finding(f"software.{key}", "fail", f"{how} {where}", advice="use the same on every machine")
            )


def _compare_clocks(cluster: Cluster, nodes: Sequence[Node]) -> None:
    """All ranks read their clocks when the last has come: within the time an answer of the store takes."""
    cluster.gather("clock/ready", 0, SECONDS)
    clocks = cluster.gather("clock", time.time(), SECONDS)
    middle = statistics.median(clocks)
    for node in nodes:
        ahead = clocks[node.ranks[0]] - middle
        if abs(ahead) > _SKEW:
            fact = f"its clock is {abs(ahead):,.1f} s {'ahead of' if ahead > 0 else 'behind'} the others"
            advice = "start chrony or another time service"
            node.findings.append(Finding("clock.skew", "fail", fact, advice=advice))


def _measure(cluster: Cluster, place: torch.device, kind: str) -> dict[str, Any]:
    """This rank's figures, or what went wrong."""
    measured: dict[str, Any] = {"product": 0.0, "reduce": 0.0, "right": True, "error": ""}
    try:
        measured["product"] = measure.product_seconds(place)
        if cluster.world > 1:
            cluster.connect(SECONDS, kind)
            measured["reduce"], measured["right"] = measure.reduce_seconds(cluster, place)
    except Exception as trouble:
        text = " ".join(str(trouble).split())[:200]
        measured["error"] = f"{type(trouble).__name__}: {text}"
    return measured


def _gather_answers(cluster: Cluster, mine: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
    """Every rank's figures; a rank that gives none in time has died or hangs."""
    try:
        return cluster.gather("measured", mine, seconds)
    except UserError:
        silent = {"product": 0.0, "reduce": 0.0, "right": True, "error": "", "silent": seconds}
        found = []
        for rank in range(cluster.world):
            there = cluster.store.check([f"measured/{rank}"])
            found.append(json.loads(cluster.store.get(f"measured/{rank}")) if there else silent)
        return found


def _judge(result: Result, measured: Sequence[dict[str, Any]], slow: float) -> None:
    products = [found["product"] for found in measured if found["product"]]
    middle = statistics.median(products) if products else 0.0
    for node in result.nodes:
        node.product = max(measured[rank]["product"] for rank in node.ranks)
        late = [rank for rank in node.ranks if measured[rank]["product"] > slow * middle]
        if late and len(products) > 1:
            ranks = f"rank{'s' * (len(late) > 1)} {', '.join(map(str, late))}"
            fact = f"{ranks}: {_ms(node.product)} for a matrix product, the median is {_ms(middle)}"
            node.findings.append(
                Finding("speed", "fail", fact, advice="look for heat, power limits, other jobs")
            )
        for rank in node.ranks:
            if silent := measured[rank].get("silent"):
                fact = f"rank {rank} gave no answer for {silent:.0f} s: it died or hangs"
                node.findings.append(Finding("devices.answer", "fail", fact, advice="look at its machine"))
            elif measured[rank]["error"]:
                fact = f"rank {rank}: {measured[rank]['error']}"
                result.findings.append(Finding("allreduce", "fail", f"{node.host}: {fact}"))
            elif not measured[rank]["right"]:
                result.findings.append(Finding("allreduce", "fail", f"{node.host}: rank {rank}: a wrong sum"))
    times = [found["reduce"] for found in measured]
    result.broken = any(found["error"] or found.get("silent") for found in measured)
    if result.world == 1 or result.broken:
        return
    result.bandwidth = measure.bus_bandwidth(max(times), result.world)
    if result.bandwidth < result.floor:
        fact = f"{result.bandwidth / 1e6:,.0f} MB/s, at least {result.floor / 1e6:,.0f} are wanted"
        result.findings.append(Finding("allreduce", "fail", f"all-reduce over all ranks: {fact}"))


def _find_slow_link(cluster: Cluster, place: torch.device, result: Result) -> None:
    """Each machine with the next, around: one that is slow with both of its neighbours is bad."""
    firsts = [node.ranks[0] for node in result.nodes]
    if len(firsts) < 3:
        return  # between two machines nobody can tell whose link it is
    pairs = [(firsts[i], firsts[(i + 1) % len(firsts)]) for i in range(len(firsts))]
    times = []
    for number, pair in enumerate(pairs):
        seconds = measure.pair_seconds(cluster, place, *pair)
        times.append(max(cluster.gather(f"pair/{number}", seconds, SECONDS)))
    usual = min(times)
    for number, node in enumerate(result.nodes):
        both = times[number], times[number - 1]
        if min(both) > 4 * usual:
            fact = f"{_ms(min(both))} for 8 MiB to a neighbour and back, the best pair takes {_ms(usual)}"
            node.findings.append(
                Finding("network.link", "fail", fact, advice="look at its network card and switch")
            )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"
