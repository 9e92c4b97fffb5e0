"""`hlat launch slurm|torchrun|kubernetes RECIPE [key=value …] --nodes N`: write a script and submit it."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hlat.errors import UserError
from hlat.host.programs import find_program
from hlat.paths import folder_to_write, spelled

if TYPE_CHECKING:
    from hlat.launch.plan import Plan
    from hlat.launch.slurm import Task
    from hlat.recipe import Recipe

_CORES = 32  # of a trn1.32xlarge, where each has a process
_EFA = 8  # EFA devices of one
_ELSEWHERE = (
    "hlat: warning: compiled graphs stay on the nodes that compile them; set compile_cache in the recipe, "
    "or give both jobs the same nodes: --sbatch nodelist=..."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the kinds of clusters and their arguments."""
    kinds = parser.add_subparsers(dest="cluster", required=True, metavar="CLUSTER")
    slurm = kinds.add_parser("slurm", help="a batch job, or a job array for a sweep")
    torchrun = kinds.add_parser("torchrun", help="a script that is started by hand on every node")
    kubernetes = kinds.add_parser("kubernetes", help="an Indexed Job or a PyTorchJob")
    for kind in (slurm, torchrun, kubernetes):
        _common(kind)
    for kind in (slurm, torchrun):
        kind.add_argument(
            "--interface", default="", metavar="NAME", help="network interface between the nodes"
        )
        kind.add_argument(
            "--python", type=spelled, default=sys.executable, metavar="FILE", help="Python on the nodes"
        )
    for kind in (slurm, kubernetes):
        kind.add_argument(
            "--max-requeues", type=int, default=50, metavar="N", help="restarts by the cluster (default: 50)"
        )
    _slurm_arguments(slurm)
    _kubernetes_arguments(kubernetes)
    torchrun.add_argument("--node-rank", type=int, metavar="R", help="start this node here and now")
    torchrun.add_argument("--master-addr", default="", metavar="HOST", help="node 0, with --node-rank")
    torchrun.add_argument("--master-port", type=int, default=29500, metavar="PORT", help="default: 29500")


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a recipe file, or the name of one that ships with HLAT")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="recipe values to change"
    )
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="machines")
    parser.add_argument(
        "--nproc-per-node", type=int, metavar="N", help="processes on each (default on trn1: 32, one a core)"
    )
    parser.add_argument("--job-name", default="", metavar="NAME", help="default: run.name")
    parser.add_argument(
        "--grace", type=int, default=300, metavar="SECONDS", help="for saving before the end (default: 300)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be written, write nothing")


def _slurm_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--partition", default="", metavar="P")
    parser.add_argument("--account", default="", metavar="A")
    parser.add_argument(
        "--time",
        default="",
        metavar="T",
        help="time limit, as 2-00:00:00; 0: none (default: the partition's)",
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="another option of sbatch, as gres=gpu:8",
    )
    parser.add_argument(
        "--no-precompile", action="store_true", help="trn1: submit no job that compiles the graphs ahead"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="a job array: every combination of key=[a, b], each with N seeds",
    )
    parser.add_argument(
        "--out", type=folder_to_write, metavar="FOLDER", help="of all runs of a sweep, as in hlat sweep"
    )
    parser.add_argument(
        "--at-once", type=int, default=0, metavar="N", help="tasks of an array that may run at once"
    )


def _kubernetes_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kind", dest="manifest", choices=("job", "pytorchjob"), default="job", help="(default: job)"
    )
    parser.add_argument("--image", default="", metavar="IMG", help="container image with HLAT in it")
    parser.add_argument("--namespace", default="default", metavar="NS", help="(default: default)")
    parser.add_argument(
        "--shared-volume", default="", metavar="CLAIM", help="PersistentVolumeClaim that all nodes can write"
    )
    parser.add_argument(
        "--mount-path",
        default="/shared",
        metavar="PATH",
        help="where it is in the container (default: /shared)",
    )
    parser.add_argument(
        "--accelerator", choices=("neuron", "gpu", "none"), help="(default: neuron for backend nxd, else gpu)"
    )
    parser.add_argument(
        "--efa", type=int, metavar="N", help="EFA devices of a node (default: 8 with neuron, else 0)"
    )
    parser.add_argument("--memory", default="", metavar="SIZE", help="memory of a node to request, as 440Gi")
    parser.add_argument(
        "--instance-type", default="", metavar="TYPE", help="run on this type only, as trn1.32xlarge"
    )
    parser.add_argument(
        "--secret", default="", metavar="NAME", help="a Secret whose entries become environment variables"
    )
    parser.add_argument("--service-account", default="", metavar="NAME", help="of the pods")
    parser.add_argument(
        "--python",
        type=spelled,
        default="python",
        metavar="FILE",
        help="Python in the image (default: python)",
    )


def main(args: argparse.Namespace) -> int:
    """Check, write, submit. Returns 0, or the exit code of what was started here. Raises UserError."""
    return {"slurm": _slurm, "torchrun": _torchrun, "kubernetes": _kubernetes}[args.cluster](args)


def _slurm(args: argparse.Namespace) -> int:
    from hlat.launch.slurm import Options, precompile_script, train_script

    plan, tasks, folder, recipes = _slurm_plan(args)
    options = Options(args.partition, args.account, args.time, tuple(args.sbatch), args.at_once)
    scripts = {}
    if plan.recipe.backend == "nxd" and not args.no_precompile:
        scripts["precompile.sbatch"] = precompile_script(plan, options, folder, tasks)
    scripts["train.sbatch"] = train_script(plan, options, folder, tasks)
    _note_missing(*recipes)
    if args.dry_run:
        print("\n".join(scripts.values()), end="")
        return 0
    if (
        len(scripts) > 1
        and plan.recipe.compile_cache is None
        and not any("nodelist" in o for o in args.sbatch)
    ):
        print(_ELSEWHERE, file=sys.stderr)
    files = [_write(folder / name, text) for name, text in scripts.items()]
    _find("sbatch", *files, how=_by_hand(files, bool(tasks)))
    before: list[str] = []
    for file in files:
        shown = _run(["sbatch", "--parsable", *before, str(file)], file)
        job = shown.strip().partition(";")[0]
        print(f"submitted job {job}: {file}")
        # Where there are several tasks, each waits for its own.
        before = _after(job, bool(tasks))
    return 0


def _after(job: str, tasks: bool) -> list[str]:
    return [f"--dependency={'aftercorr' if tasks else 'afterok'}:{job}", "--kill-on-invalid-dep=yes"]


def _by_hand(files: Sequence[Path], tasks: bool) -> str:
    """The shell line that submits the scripts as `hlat launch slurm` does."""
    *first, last = [shlex.quote(str(file)) for file in files]
    if not first:
        return f"sbatch {last}"
    options = " ".join(_after("${job%%;*}", tasks))
    return f"job=$(sbatch --parsable {first[0]}) && sbatch {options} {last}"


def _slurm_plan(args: argparse.Namespace) -> tuple[Plan, list[Task], Path, list[Recipe]]:
    """The run, or the tasks of a sweep, the folder of the scripts, and what is to be run."""
    if args.seeds is None:
        if args.out is not None:
            raise UserError("--out is for sweeps", where="--out", fix="add --seeds 1, or set run.dir")
        plan = _plan(args, args.overrides)
        return plan, [], plan.run_dir / "launch", [plan.recipe]
    from hlat.commands.sweep import plan as plan_sweep
    from hlat.launch.slurm import Task

    trials, out = plan_sweep(args.recipe, args.overrides, args.seeds, args.out)
    args.job_name = args.job_name or re.sub(r"[^A-Za-z0-9]+", "-", out.name).strip("-") or "sweep"
    plan = _plan(args, trials[0].overrides)
    for trial in trials[1:]:
        plan.check_recipe(trial.recipe)
    tasks = [Task(tuple(trial.overrides), trial.folder.absolute()) for trial in trials]
    return plan, tasks, out.absolute() / "launch", [trial.recipe for trial in trials]


def _plan(args: argparse.Namespace, overrides: Sequence[str]) -> Plan:
    from hlat.commands.recipe_file import load
    from hlat.launch.plan import Plan

    try:
        recipe = load(args.recipe, overrides)
    except UserError as error:
        if args.cluster == "slurm" and args.seeds is None and any("=[" in text for text in overrides):
            fix = f"{error.fix}; to sweep over the values of a list add --seeds 1".lstrip("; ")
            raise UserError(error.what, where=error.where, fix=fix) from None
        raise
    processes = args.nproc_per_node
    if processes is None:
        if recipe.backend != "nxd":
            fix = "write for example --nproc-per-node 8, one a GPU"
            raise UserError("how many processes has a node?", where="--nproc-per-node", fix=fix)
        processes = _CORES
    plan = Plan(
        recipe,
        args.recipe,
        tuple(overrides),
        nodes=args.nodes,
        processes=processes,
        python=args.python,
        interface=getattr(args, "interface", ""),
        grace=args.grace,
        job_name=args.job_name or recipe.run.name,
        max_requeues=getattr(args, "max_requeues", 0),
        work_dir=Path.cwd(),
    )
    plan.check()
    return plan


def _note_missing(*recipes: Recipe) -> None:
    """Say which paths are not here. They may be on the nodes, so nothing is refused."""
    from hlat.data.presence import missing_paths
    from hlat.observe.redact import redact
    from hlat.observe.terminal import one_line

    lines = (line for recipe in recipes for line in missing_paths(recipe))
    for line in dict.fromkeys(lines):
        print(f"hlat: note: {one_line(redact(line))}; the nodes need it", file=sys.stderr)


def _torchrun(args: argparse.Namespace) -> int:
    from hlat.launch.torchrun import script

    if not 1 <= args.master_port <= 65535:
        raise UserError(f"{args.master_port} is no port", where="--master-port", fix="write 1 to 65535")
    plan = _plan(args, args.overrides)
    rank = 0 if plan.nodes == 1 else args.node_rank
    if rank is not None and not 0 <= rank < plan.nodes:
        fix = f"write 0 to {plan.nodes - 1}"
        raise UserError(f"{rank} is no node of {plan.nodes}", where="--node-rank", fix=fix)
    if rank is not None and plan.nodes > 1 and not args.master_addr:
        raise UserError("where is node 0?", where="--master-addr", fix="give its name or address")
    text = script(plan, args.master_port)
    _note_missing(plan.recipe)
    if args.dry_run:
        print(text, end="")
        return 0
    file = _write(plan.run_dir / "launch" / "torchrun.sh", text, mode=0o755)
    if rank is None:
        print(f"start on each node, NODE_RANK from 0 to {plan.nodes - 1}:")
        print(f"    bash {shlex.quote(str(file))} NODE_RANK MASTER_ADDR")
        return 0
    command = ["bash", str(file), str(rank), *([args.master_addr] if args.master_addr else [])]
    _find(command[0], file, how=shlex.join(command))
    sys.stdout.flush()
    os.execvp(command[0], command)


def _kubernetes(args: argparse.Namespace) -> int:
    from hlat.launch.kubernetes import Options, manifest

    plan = _plan(args, args.overrides)
    neuron = plan.recipe.backend == "nxd"
    accelerator = args.accelerator or ("neuron" if neuron else "gpu")
    options = Options(
        image=args.image,
        claim=args.shared_volume,
        kind=args.manifest,
        namespace=args.namespace,
        mount=args.mount_path,
        accelerator=accelerator,
        efa=_EFA * (accelerator == "neuron") if args.efa is None else args.efa,
        memory=args.memory,
        instance=args.instance_type,
        secret=args.secret,
        account=args.service_account,
    )
    text = manifest(plan, options)
    _note_missing(plan.recipe)
    if args.dry_run:
        print(text, end="")
        return 0
    file = _write(plan.run_dir / "launch" / f"{args.manifest}.yaml", text)
    print(_run(["kubectl", "apply", "--filename", str(file)], file), end="")
    return 0


def _write(file: Path, text: str, mode: int = 0o644) -> Path:
    from hlat.observe.jsonl import replace_file

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, text.encode())
        file.chmod(mode)
    except OSError as error:
        fix = "choose another run.dir, or use --dry-run > FILE"
        raise UserError(f"cannot be written: {error.strerror}", where=str(file), fix=fix) from None
    return file


def _find(command: str, *files: Path, how: str = "") -> None:
    """Raise UserError where there is no such command. `how`: the shell line that does it by hand."""
    if find_program(command) is None:
        written = "the scripts are" if len(files) > 1 else "the script is"
        fix = f"{written} written; where {command} is, run: {how or files[0]}"
        raise UserError(f"there is no command {command} here", fix=fix)


def _run(command: Sequence[str], file: Path) -> str:
    """What a command prints. Raises UserError when there is no such command, or when it fails."""
    _find(command[0], file, how=shlex.join(command))
    done = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        lines = done.stderr.strip() or f"exit code {done.returncode}"
        raise UserError(f"{command[0]} refused it: {lines}", where=str(file))
    return done.stdout
