"""`hlat doctor [RECIPE]`: is this machine ready, and if not, which lines repair it?"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlat.errors import REQUIRED, UserError
from hlat.observe.redact import redact, redact_all
from hlat.paths import expand

if TYPE_CHECKING:
    from hlat.doctor import Case
    from hlat.doctor.finding import Finding
    from hlat.recipe import Recipe

_COLOURS = {"ok": "32", "warn": "33", "fail": "31"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hlat doctor`."""
    parser.add_argument("recipe", nargs="?", help="check for this run: its backend, layout and run folder")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="changes, as for hlat train"
    )
    parser.add_argument(
        "--for",
        dest="platform",
        choices=("native", "trn1", "trn2"),
        help="what to be fit for (default: the recipe's backend, else what the machine looks like)",
    )
    parser.add_argument(
        "--nodes", type=int, metavar="N", help="instances of the run (default: 1, or SLURM's)"
    )
    parser.add_argument(
        "--port", type=int, metavar="P", help="rendezvous port (default: MASTER_PORT, else 29500)"
    )
    parser.add_argument(
        "--cluster",
        action="store_true",
        help="examine all machines of a job together: start it under torchrun or srun, as the job itself",
    )
    parser.add_argument(
        "--bad-nodes",
        type=expand,
        metavar="FILE",
        help="with --cluster: write the machines that are not fit, one a line",
    )
    parser.add_argument(
        "--min-bandwidth",
        type=float,
        metavar="MB_PER_S",
        help="with --cluster: the least for an all-reduce (default: 20 over gloo, 1000 on accelerators)",
    )
    parser.add_argument(
        "--slow",
        type=float,
        metavar="FACTOR",
        help="with --cluster: a rank that needs so many times the median for a matrix product is not fit"
        " (default: 1.5)",
    )
    show = parser.add_mutually_exclusive_group()
    show.add_argument("--json", action="store_true", help="print the result as JSON")
    show.add_argument("--fix-plan", action="store_true", help="print only the commands that repair, in order")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="show the Neuron variables and compiler flags of the recipe instead of checking anything",
    )


def main(args: argparse.Namespace) -> int:
    """Check and report: 0 when nothing failed, 1 when something did. Raises UserError for a wrong recipe."""
    if args.cluster:
        from hlat.commands.doctor_cluster import examine_all

        return examine_all(args)
    for option in ("bad_nodes", "min_bandwidth", "slow"):
        if getattr(args, option) is not None:
            name = f"--{option.replace('_', '-')}"
            raise UserError("goes with --cluster alone", where=name, fix="add --cluster, or leave it out")
    recipe, unread = _read(args)
    nodes = args.nodes if args.nodes is not None else _nodes()
    if nodes < 1:
        raise UserError(f"{nodes} is out of range", where="--nodes", fix="write 1 or more")
    if args.profile:
        return _profile(args, recipe, nodes)
    from hlat.doctor import examine, make_case
    from hlat.doctor.finding import SCHEMA, healthy, plan
    from hlat.doctor.machine import Machine

    machine = Machine()
    platform = args.platform or ("trn1" if recipe is not None and recipe.backend == "nxd" else None)
    run_dir = expand(recipe.run.dir, "run.dir") if recipe is not None else Path("runs")
    case = make_case(machine, platform, nodes, run_dir, args.port)
    findings = [*examine(machine, case), *unread]
    if recipe is not None:
        findings = _must_compile(recipe, findings)
        findings += [*_paths(recipe), *_for_recipe(recipe, case, machine)]
    if args.json:
        result: dict[str, Any] = {"schema": SCHEMA, "platform": case.platform, "nodes": nodes}
        result["release"] = case.release.name if case.release else None
        result["healthy"] = healthy(findings)
        result["findings"] = [finding.to_dict() for finding in findings]
        print(json.dumps(redact_all(result), indent=2))
    elif args.fix_plan:
        print(redact("\n".join(plan(findings) or ["# no command to run"])))
    else:
        _print(findings, case)
    return 0 if healthy(findings) else 1


def _read(args: argparse.Namespace) -> tuple[Recipe | None, list[Finding]]:
    """The recipe, if there is one; a finding in its place where a package is missing that reading it needs:
    that is what the doctor is asked about.
    """
    from hlat.doctor.finding import Finding

    try:
        return _recipe(args), []
    except ModuleNotFoundError as error:
        if error.name not in REQUIRED or args.profile:
            raise
        return None, [Finding("recipe", "fail", f"{args.recipe} cannot be read without {error.name}")]


def _recipe(args: argparse.Namespace) -> Recipe | None:
    if args.recipe is None:
        if args.profile:
            raise UserError("--profile needs a recipe", fix="write: hlat doctor --profile hlat-7b")
        return None
    from hlat.commands.recipe_file import load

    return load(args.recipe, args.overrides)


def _nodes() -> int:
    text = os.environ.get("SLURM_NNODES", "1")
    return int(text) if text.isdigit() else 1


def _must_compile(recipe: Recipe, findings: list[Finding]) -> list[Finding]:
    """With `compile: true` a run ends where nothing can be compiled, which else is slower only."""
    if recipe.compile is not True or recipe.backend != "native":
        return findings
    return [
        replace(found, status="fail", fact=found.fact.partition(":")[0] + ", and compile is true")
        if found.check == "compiler" and found.status == "warn"
        else found
        for found in findings
    ]


def _paths(recipe: Recipe) -> list[Finding]:
    """What the recipe reads, as far as it lies in files and folders of this machine."""
    from hlat.data.presence import missing_paths
    from hlat.doctor.finding import Finding

    advice = "put it there, or correct the recipe"
    missing = [Finding("recipe.paths", "warn", line, advice=advice) for line in missing_paths(recipe)]
    return missing or [Finding("recipe.paths", "ok", "data, tokenizer and first weights are where it says")]


def _for_recipe(recipe: Recipe, case: Case, machine: Any) -> list[Finding]:
    """What only a recipe can tell: does it fit the nodes, do variables contradict it?"""
    from hlat.backend.neuron import profile
    from hlat.backend.neuron.machine import INSTANCES, instance_type

    found = [_found("recipe.backend", lambda: _supported(recipe))]
    if case.platform != "trn1" or case.release is None:
        return found
    devices, _ = INSTANCES.get(instance_type(machine.root), (profile.CORES // 2, 0))
    cores = 2 * devices
    settings = profile.profile(recipe, case.platform, case.nodes, cores=cores, sdk=case.release.name)
    environ = profile.preview(settings, machine.environ)
    here = f" on {case.nodes} nodes of {cores} cores"
    for check, question in (
        ("recipe.layout", lambda: _layout(recipe, case, cores) + here),
        ("recipe.batch", lambda: f"{recipe.accumulate(cores * case.nodes)} micro-batches a step{here}"),
        ("recipe.variables", lambda: _agree(recipe, environ, case, cores) + here),
    ):
        found.append(_found(check, question))
    return found


def _found(check: str, question: Callable[[], str]) -> Finding:
    """What a question finds: its answer, or what it refuses."""
    from hlat.doctor.finding import Finding

    try:
        return Finding(check, "ok", question())
    except UserError as error:
        where = f"{error.where}: " if error.where else ""
        return Finding(check, "fail", f"{where}{error.what}", advice=error.fix)


def _supported(recipe: Recipe) -> str:
    from hlat.train.run import refuse_unsupported

    refuse_unsupported(recipe, here=False)
    return f"backend {recipe.backend} does all that the recipe asks for"


def _layout(recipe: Recipe, case: Case, cores: int) -> str:
    from hlat.backend.neuron.limits import check_nodes

    layout = recipe.layout(cores * case.nodes)
    check_nodes(recipe, case.nodes, cores)
    return str(layout)


def _agree(recipe: Recipe, environ: dict[str, str], case: Case, cores: int) -> str:
    from hlat.backend.neuron.profile import conflicts

    conflicts(recipe, environ, case.platform, case.nodes, cores=cores)
    return "no variable contradicts the recipe"


def _profile(args: argparse.Namespace, recipe: Recipe | None, nodes: int) -> int:
    """Print every variable and flag of a recipe, whose value it is, and why."""
    from hlat.backend.neuron.profile import CORES, conflicts, merged, preview, profile
    from hlat.backend.neuron.release import BY_PLATFORM, installed
    from hlat.train.runnable import check_recipe

    assert recipe is not None
    platform = args.platform or "trn1"
    if platform not in BY_PLATFORM:
        raise UserError(
            "a native machine has no Neuron profile", where="--for", fix="write --for trn1 or trn2"
        )
    on_trn1 = recipe.backend == "nxd" and args.nodes is not None  # then a node has as many processes
    check_recipe(recipe, nodes * on_trn1, CORES * on_trn1)
    release = installed(platform)
    settings = profile(recipe, platform, nodes, sdk=release.name)
    applied = merged(settings, os.environ)
    if args.json:
        head = {"schema": 1, "platform": platform, "release": release.name, "nodes": nodes}
        profiles = redact_all([item.to_dict() for item in applied])
        print(json.dumps({**head, "neuron_profile": profiles}, indent=2))
    else:
        print(f"{recipe.run.name}: {platform}, Neuron {release.name}, {nodes} node{'s' * (nodes > 1)}")
        if not applied:
            print("\nnothing is set")
        for item in applied:
            note = f"  (yours; HLAT would take {item.hlat or 'no value'})" if item.origin == "user" else ""
            text = f"{item.name}={item.value}" if item.value or item.kind == "variable" else item.name
            print(redact(f"\n{text}{note}\n    {item.why}\n    source: {item.source}"))
        print()
    conflicts(recipe, preview(settings, os.environ), platform, nodes)
    return 0


def _print(findings: list[Finding], case: Case) -> None:
    from hlat.doctor.finding import healthy, plan

    release = f", Neuron {case.release.name}" if case.release else ""
    nodes = f", {case.nodes} nodes" if case.nodes > 1 else ""
    print(f"hlat doctor: {case.platform}{release}{nodes}\n")
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        print(f"{_status(finding.status)}  {finding.check:<{width}}  {redact(finding.fact)}")
        indent = " " * (width + 8)
        if finding.status != "ok":
            for line in finding.commands:
                print(f"{indent}$ {redact(line)}")
        if finding.advice:
            print(f"{indent}{redact(finding.advice)}")
    counts = [sum(finding.status == status for finding in findings) for status in _COLOURS]
    text = f"\n{counts[0]} ok, {counts[1]} to look at, {counts[2]} failed"
    if plan(findings):
        text += "; `hlat doctor --fix-plan` with the same arguments prints the commands in order"
    print(text if not healthy(findings) or counts[1] else f"\nall {counts[0]} checks ok")


def _status(status: str) -> str:
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return f"\033[{_COLOURS[status]}m{status:<4}\033[0m" if colour else f"{status:<4}"
