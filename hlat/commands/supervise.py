"""`hlat supervise RECIPE [key=value …] --nproc-per-node N`: train, and start again until it is done."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from typing import TYPE_CHECKING

from hlat.errors import UserError
from hlat.paths import expand

if TYPE_CHECKING:
    from hlat.recipe import Recipe
    from hlat.supervise.attempt import Place
    from hlat.supervise.team import Team


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hlat supervise`."""
    parser.add_argument("recipe", help="a recipe file, or the name of one that ships with HLAT")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="recipe values to change"
    )
    parser.add_argument("--nproc-per-node", type=int, default=1, metavar="N", help="ranks on this machine")
    parser.add_argument("--nnodes", type=int, default=1, metavar="N", help="machines; run this on each")
    parser.add_argument("--node-rank", type=int, default=0, metavar="R", help="this machine, from 0")
    parser.add_argument("--master-addr", metavar="HOST", help="the machine of node rank 0")
    parser.add_argument(
        "--master-port",
        type=int,
        metavar="P",
        help="a free port of that machine; the supervisors use the next one (default: 29500; for one machine"
        " any that is free)",
    )
    parser.add_argument("--max-restarts", type=int, default=100, metavar="N", help="in all (default: 100)")
    parser.add_argument(
        "--max-fruitless",
        type=int,
        default=3,
        metavar="N",
        help="give up after so many attempts in a row that come no further (default: 3)",
    )
    parser.add_argument(
        "--grace", type=float, metavar="SECONDS", help="for a save after SIGTERM or SIGUSR1 (default: 300)"
    )
    parser.add_argument(
        "--hang-seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="a rank hangs when a step takes two of the slowest recent steps and so much more (default: 30)",
    )
    parser.add_argument(
        "--meet-seconds",
        type=float,
        default=600.0,
        metavar="S",
        help="how long machines wait for each other to begin, and to say how an attempt ended (default: 600)",
    )


def main(args: argparse.Namespace) -> int:
    """Supervise. Returns 0 when the run is done; see docs/operations.md for the other codes."""
    if sys.platform != "linux":
        fix = "start training with torchrun instead"
        raise UserError("hlat supervise needs Linux", where=sys.platform, fix=fix)
    _take_node(args)
    _check(args)
    if args.nnodes > 1:
        # torch tells of a machine that is gone with pages of C++ frames; what is to be said of it we say.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from hlat.checkpoint.finished import lacking
    from hlat.commands.recipe_file import load
    from hlat.observe.runfolder import RunFolder
    from hlat.supervise.node import node_findings
    from hlat.supervise.supervisor import Budget, Supervisor
    from hlat.supervise.watch import Limits

    recipe = load(args.recipe, args.overrides)
    recipe.accumulate(args.nproc_per_node * args.nnodes)  # a layout that does not fit starts nothing
    run, place = expand(recipe.run.dir, "run.dir"), _place(args)
    folder, last = RunFolder(run), recipe.run.stop_at_step or recipe.run.steps
    folder.check()  # the restart log lies in it, too
    again = ["run.resume=auto"] if recipe.run.resume == "never" else []
    supervisor = Supervisor(
        ["hlat", "train", args.recipe, *args.overrides],
        run,
        place,
        limits=Limits.of(recipe, args.hang_seconds),
        grace=300.0 if args.grace is None else args.grace,
        budget=Budget(args.max_restarts, args.max_fruitless),
        again=again,
        checks=lambda: node_findings(recipe, nodes=args.nnodes, ranks=args.nproc_per_node),
        lacking=lambda: lacking(folder, last),
    )
    supervisor.team = _team(args, place, recipe, supervisor)
    return supervisor.run()


def _take_node(args: argparse.Namespace) -> None:
    """This machine's number and where the others are, in a step of SLURM that has a task on each of them."""
    from hlat.backend.slurm import node_variables

    if args.nnodes != 1 or args.master_addr:
        return
    if place := node_variables(os.environ):
        args.nnodes, args.node_rank = int(place["NODES"]), int(place["NODE_RANK"])
        args.master_addr = place["MASTER_ADDR"]
        args.master_port = args.master_port or int(place["MASTER_PORT"])


def _check(args: argparse.Namespace) -> None:
    for name, least in (("nproc_per_node", 1), ("nnodes", 1), ("node_rank", 0), ("max_restarts", 0),
                        ("max_fruitless", 1), ("hang_seconds", 1)):  # fmt: skip
        if getattr(args, name) < least:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{getattr(args, name):g} is too small", where=option, fix=f"write {least} or more"
            )
    for name in ("hang_seconds", "grace", "meet_seconds"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            fix = "write a number of seconds above 0"
            raise UserError(f"{value:g} is no duration", where=f"--{name.replace('_', '-')}", fix=fix)
    if args.node_rank >= args.nnodes:
        fix = f"number the machines from 0 to {args.nnodes - 1}"
        raise UserError(f"{args.node_rank} is not below --nnodes {args.nnodes}", where="--node-rank", fix=fix)
    if args.nnodes > 1 and not args.master_addr:
        fix = "give the address of the machine with node rank 0"
        raise UserError("several machines need it", where="--master-addr", fix=fix)


def _place(args: argparse.Namespace) -> Place:
    from hlat.supervise.attempt import Place

    port = args.master_port
    if port is None and args.nnodes == 1:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
    return Place(
        args.nproc_per_node, args.nnodes, args.node_rank, args.master_addr or "127.0.0.1", port or 29500
    )


def _team(args: argparse.Namespace, place: Place, recipe: Recipe, supervisor: object) -> Team:
    from hlat.supervise.team import Machines, Team

    if args.nnodes == 1:
        return Team()
    return Machines(
        place.node,
        place.nnodes,
        place.address,
        place.port + 1,
        args.meet_seconds,
        waiting=lambda: getattr(supervisor, "received", None) is not None,
    )
