"""`hlat doctor --cluster RECIPE`, started on every machine of a job as the job itself is."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hlat.errors import UserError
from hlat.observe.jsonl import replace_file
from hlat.observe.redact import redact, redact_all

if TYPE_CHECKING:
    from hlat.doctor.finding import Finding
    from hlat.recipe import Recipe
    from hlat.supervise.cluster_check import Result

_LINGER_SECONDS = 5.0


def examine_all(args: argparse.Namespace) -> int:
    """Examine, and let rank 0 report: 0 when every machine is fit, 1 when one is not, on every rank alike.

    Raises UserError for options that make no sense, a recipe no rank can read, and ranks that do not come.
    """
    _check(args)
    from hlat.backend.cluster import join
    from hlat.backend.launcher import take_place
    from hlat.commands.recipe_file import load
    from hlat.supervise.cluster_check import examine

    take_place()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    recipe: Recipe | UserError
    try:
        recipe = load(args.recipe, args.overrides)
    except UserError as error:
        recipe = error
    cluster = join()
    kind, device = _backend(recipe)
    floor = None if args.min_bandwidth is None else args.min_bandwidth * 1e6
    result = examine(
        cluster, recipe, kind=kind, device=device, floor=floor, slow=1.5 if args.slow is None else args.slow
    )
    if result.unreadable and isinstance(recipe, UserError):
        cluster.leave(60.0)
        if cluster.rank == 0:
            raise recipe
        return recipe.exit_code
    if cluster.rank == 0:
        _report(result, args)
    status = 0 if result.healthy else 1
    if result.broken:  # a group that has lost a rank cannot be taken down
        from hlat.observe.failures import leave_at_once

        time.sleep(_LINGER_SECONDS if cluster.serves_store else 0.0)
        leave_at_once(status)
    cluster.leave(60.0)
    return status


def _check(args: argparse.Namespace) -> None:
    if args.recipe is None:
        raise UserError("--cluster needs a recipe", fix="write: hlat doctor --cluster hlat-7b")
    for option in ("profile", "fix_plan"):
        if getattr(args, option):
            name = f"--{option.replace('_', '-')}"
            raise UserError(
                "is about one machine", where=name, fix="leave it out, or run it without --cluster"
            )
    if args.slow is not None and not args.slow > 1:
        raise UserError(f"{args.slow:g} is too small", where="--slow", fix="write a factor above 1, as 1.5")
    if args.min_bandwidth is not None and not args.min_bandwidth >= 0:
        what = f"{args.min_bandwidth:g} is out of range"
        raise UserError(what, where="--min-bandwidth", fix="write MB per second, 0 or more")


def _backend(recipe: Recipe | UserError) -> tuple[str, Callable[[], Any] | None]:
    """The kind of process group the run has, and what it computes on, where that is not the cluster's."""
    if isinstance(recipe, UserError) or recipe.backend != "nxd":
        return "", None
    from hlat.backend.nxd.start import device, process_group

    return process_group(), device


def _report(result: Result, args: argparse.Namespace) -> None:
    bad = [node.host for node in result.nodes if node.bad]
    if args.bad_nodes is not None:
        path = args.bad_nodes
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, "".join(f"{host}\n" for host in bad).encode())
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}", where=str(args.bad_nodes)) from error
    if args.json:
        nodes = [{**asdict(node), "bad": bool(node.bad)} for node in result.nodes]
        head = {"schema": 1, "healthy": result.healthy, "world": result.world, "group": result.kind}
        facts = {"bandwidth": result.bandwidth, "floor": result.floor, "bad_nodes": bad}
        about = {"nodes": nodes, "findings": [asdict(finding) for finding in result.findings]}
        print(json.dumps(redact_all({**head, **facts, **about}), indent=2))
    else:
        print(redact("\n".join(table(result, bad, args.bad_nodes))))


def table(result: Result, bad: list[str], file: str | None = None) -> list[str]:
    """The result by machine, in lines."""
    plural = f"{len(result.nodes)} node{'s' * (len(result.nodes) != 1)}"
    reduce = (
        f", all-reduce over {result.kind}: {result.bandwidth / 1e6:,.0f} MB/s" if result.bandwidth else ""
    )
    lines = [f"hlat doctor --cluster: {plural}, {result.world} rank{'s' * (result.world > 1)}{reduce}", ""]
    width = max(4, *(len(node.host) for node in result.nodes))
    lines.append(f"{'node':<{width}}  {'ranks':<9}  {'product':>9}  findings")
    for node in result.nodes:
        first, last = node.ranks[0], node.ranks[-1]
        ranks = f"{first}-{last}" if last > first else f"{first}"
        product = f"{1e3 * node.product:,.1f} ms" if node.product else "-"
        failed = [finding for finding in node.findings if finding.status == "fail"]
        warned = [finding for finding in node.findings if finding.status == "warn"]
        worst = "fail" if failed else "warn" if warned else "ok"
        ok = len(node.findings) - len(failed) - len(warned)
        lines.append(f"{node.host:<{width}}  {ranks:<9}  {product:>9}  {worst} ({ok} checks ok)")
        lines += [_line(finding, width) for finding in [*failed, *warned]]
    lines += [_line(finding, width) for finding in result.findings]
    lines.append("")
    if bad:
        written = f"; written to {file}" if file else ""
        verb = "is" if len(bad) == 1 else "are"
        lines.append(f"{len(bad)} of {plural} {verb} not fit: {', '.join(bad)}{written}")
    elif result.healthy:
        lines.append("every node is fit")
    else:
        lines.append("something failed that no node is to blame for alone")
    return lines


def _line(finding: Finding, width: int) -> str:
    advice = f"; {finding.advice}" if finding.advice else ""
    return f"{'':<{width}}  {finding.status:<4} {finding.check}: {finding.fact}{advice}"
