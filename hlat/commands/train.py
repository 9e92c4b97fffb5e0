"""`hlat train RECIPE [key=value …]`, in one process or in each of those a launcher starts."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hlat.errors import UserError, names_explained
from hlat.paths import expand

if TYPE_CHECKING:
    from hlat.backend.cluster import Cluster
    from hlat.observe.console import Console
    from hlat.observe.heartbeat import Pulse
    from hlat.observe.runfolder import RunFolder
    from hlat.observe.stopping import Signals
    from hlat.recipe import Recipe
    from hlat.train.job import Job
    from hlat.train.loop import Loop
    from hlat.train.saves import Saves


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hlat train`."""
    parser.add_argument(
        "recipe", help="a recipe file, or the name of one that ships with HLAT (see `hlat recipes list`)"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="recipe values to change, e.g. optim.lr=1e-3",
    )
    parser.add_argument(
        "--precompile", action="store_true", help="trn1: compile every graph of the run ahead, then stop"
    )


def main(args: argparse.Namespace) -> int:
    """Train; returns 0 once the last step is done, or 128 + the signal that stopped the run early (its state
    is saved, if this start has done a step).

    In a job of several processes a failure ends the process here: others may hang in a thread of it.
    """
    if getattr(args, "precompile", False):
        return _precompile(args)
    from hlat.backend.launcher import take_place

    take_place()
    os.environ.setdefault("TQDM_DISABLE", "1")  # the console shows progress; read when torch imports tqdm
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # torch tells of a broken connection with pages of C++ frames; what is to be said of it we say.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    pulse = _pulse()
    from hlat.observe.failures import Terminated, say
    from hlat.observe.stopping import Signals

    with Signals().watch() as signals:
        try:
            code = _start(args, signals, pulse)
            if pulse is not None and code == 0:
                pulse.finish()
            return code
        except Terminated as stopped:  # in a job of one process; others have ended
            say(f"hlat: {stopped.line()}")
            return 128 + stopped.number


def _start(args: argparse.Namespace, signals: Signals, pulse: Pulse | None) -> int:
    neuron_profile = _prepare_neuron(args)  # before anything imports torch
    from hlat.backend.cluster import join
    from hlat.train.job import Job

    job = Job(join(), neuron_profile, signals)
    if pulse is not None:
        job.watchdog.pace, pulse.look = pulse.pace, job.watchdog.look
    if job.cluster.world == 1:
        return _main(args, job)
    job.watch()
    try:
        with names_explained():
            return _main(args, job)
    except BaseException as error:
        job.note(error)
        if job.ending is not None:
            job.ending.end()
        raise


def _pulse() -> Pulse | None:
    """Heartbeats for `hlat supervise`, from before torch is imported; None without it."""
    from hlat.observe.heartbeat import Pulse, prepare, supervised

    prepare()
    folder = supervised()
    return None if folder is None else Pulse(folder, int(os.environ.get("RANK", "0")))


def _precompile(args: argparse.Namespace) -> int:
    """Let Neuron's tool compile the graphs of short runs. Returns its exit status."""
    import subprocess

    from hlat.backend.nxd.precompile import commands, scratch
    from hlat.backend.slurm import node_variables
    from hlat.commands.cache import share
    from hlat.commands.recipe_file import load
    from hlat.host.python import environment
    from hlat.train.runnable import check_recipe

    os.environ.update(node_variables(os.environ))
    recipe = load(args.recipe, args.overrides)
    if recipe.backend != "nxd":
        fix = "leave --precompile out, or write backend=nxd"
        raise UserError(f"backend {recipe.backend} compiles nothing ahead", where="backend", fix=fix)
    check_recipe(recipe)
    if recipe.compile_cache is not None:
        share(recipe, push=False)
    with scratch(str(expand(recipe.run.dir, "run.dir"))) as folder:
        for words in commands(args.recipe, args.overrides, recipe, folder):
            status = subprocess.run(words, check=False, env=environment()).returncode
            if status:
                return status
    if recipe.compile_cache is not None and os.environ.get("NODE_RANK", "0") == "0":  # one writer
        share(recipe, push=True)
    return 0


def _prepare_neuron(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Set the variables of the Neuron profile where a run will use NxD; returns them for environment.json."""
    on_cpu = os.environ.get("NXD_CPU_MODE") == "1" or os.environ.get("PJRT_DEVICE") == "CPU"
    if on_cpu or importlib.util.find_spec("neuronx_distributed") is None:
        return []
    from hlat.backend.neuron import machine
    from hlat.backend.neuron.profile import cluster, prepare
    from hlat.commands.cache import share
    from hlat.commands.recipe_file import load

    try:
        recipe = load(args.recipe, args.overrides)
    except UserError:
        return []  # reported once, after the ranks have met
    if recipe.backend != "nxd":
        return []
    if recipe.compile_cache is not None:
        share(recipe, push=False)
    nodes, cores = cluster(os.environ)
    efa = machine.efa_devices() if machine.neuron_devices() else None  # a host without Neuron has no EFA
    return [item.to_dict() for item in prepare(recipe, nodes=nodes, cores=cores, efa_devices=efa)]


def _main(args: argparse.Namespace, job: Job) -> int:
    from hlat.commands.recipe_file import load_written
    from hlat.observe.console import Console
    from hlat.observe.runfolder import RunFolder
    from hlat.train.initial import one_checkpoint
    from hlat.train.run import refuse_unsupported
    from hlat.train.same import check_machines, check_recipe
    from hlat.train.unused import unused

    cluster, limit = job.cluster, job.watchdog.limit
    check_machines(cluster, limit)
    recipe, text, written = load_written(args.recipe, args.overrides)
    check_recipe(cluster, recipe, limit)
    refuse_unsupported(recipe)
    if recipe.compile is True and recipe.backend == "native" and cluster.first_here:
        from hlat.backend.native import refuse_compile

        refuse_compile(cluster.device)
    if recipe.eval.tasks and cluster.rank == 0:
        from hlat.train.tasks import check_names

        check_names(recipe)
    recipe.accumulate(cluster.world)
    folder = RunFolder(recipe.run.dir)
    job.watchdog.limit = job.watchdog.long_limit = recipe.parallel.first_timeout
    job.watchdog.logs = folder.logs
    with one_checkpoint(recipe, cluster, job.watchdog.limit):
        if cluster.rank:
            return _work(text, recipe, job, folder, None)
        folder.check()
        console = Console(recipe.run.stop_at_step or recipe.run.steps, name=recipe.run.name)
        for line in unused(recipe, written):
            console.event(f"note: {line}")
        if job.ending is not None:
            job.ending.before_print = console.close
        try:
            return _work(text, recipe, job, folder, console)
        finally:
            console.close()


def _work(text: bytes, recipe: Recipe, job: Job, folder: RunFolder, console: Console | None) -> int:
    """Data, run folder, training. Rank 0 has the console and starts the run folder, which keeps the recipe's
    `text`; the others wait for that.
    """
    from hlat.data import open_data
    from hlat.observe.environment import describe
    from hlat.observe.failures import Terminated
    from hlat.observe.stopping import name_of
    from hlat.train.initial import starting_tokenizer
    from hlat.train.resume import check_resume
    from hlat.train.same import check_data

    cluster, limit = job.cluster, recipe.parallel.first_timeout
    job.watchdog.beat(0, "data")
    tokenizer = starting_tokenizer(recipe, folder.checkpoints)
    data = cluster.in_turn("data-ready", lambda: open_data(recipe, tokenizer=tokenizer), limit)
    check_data(cluster, data.fingerprint, limit)
    if console is None:
        cluster.from_first("started", None, limit)
        return _train(recipe, data, folder, None, job)
    check_resume(recipe, data.fingerprint, folder, console.warn)
    description = describe(job.neuron_profile)
    with folder.start(text, recipe.to_yaml(), description=description, say=console.warn):
        job.watchdog.before_exit = folder.close
        try:
            cluster.from_first("started", True, limit)
            return _train(recipe, data, folder, console, job)
        except BaseException as error:
            job.note(error)
            if isinstance(error, Terminated | KeyboardInterrupt):
                by = error.number if isinstance(error, Terminated) else signal.SIGINT
                folder.note_stop(by=name_of(by), step=None)
            folder.abandon()
            raise


def _train(recipe: Recipe, data: Any, folder: RunFolder, console: Console | None, job: Job) -> int:
    from hlat.observe.spot import watching
    from hlat.observe.stopping import exit_status, name_of, text_of
    from hlat.train.describe import summary
    from hlat.train.fingerprint import note_start
    from hlat.train.initial import initial_from
    from hlat.train.metrics import open_metrics
    from hlat.train.origin import origin_of, remarks
    from hlat.train.resume import settle_rows
    from hlat.train.run import build_run
    from hlat.train.same import check_shared

    cluster, limit = job.cluster, recipe.parallel.first_timeout
    job.watchdog.beat(0, "building")
    check_shared(cluster, folder.path, limit)
    cluster.connect(limit, _process_group(recipe))
    warn = _warn(cluster) if console is None else console.warn
    backend, compiled, reason = _backend(recipe, cluster, warn)
    saves = _saves(recipe, data, folder, cluster, warn)
    try:
        saved = saves.find()
    except UserError:
        folder.undo()
        raise
    # A run that continues has its own weights: those it began with are not read again.
    initial, began = initial_from(recipe) if recipe.init.from_ and saved is None else (None, "")
    origin = origin_of(recipe, None if saved is None else saved.meta)
    if console is not None and initial is not None and origin is not None:
        for line in remarks(recipe, data, origin):
            console.warn(line)
    run = build_run(recipe, data, backend, compiled=compiled, initial=initial, origin=origin)
    cluster.note_groups()
    tasks = _tasks(run, job)
    job.watchdog.beat(0, "restoring")
    if saved is not None:
        saves.restore(run, saved)
    if console is not None:
        settle_rows(folder, run.step, console.warn)
        note_start(run, folder.path, saved, console.warn)
    note = f"{'on' if compiled else 'off'} ({reason})"
    metrics = open_metrics(run, folder, saved, console, note, began)
    metrics.notes = saves.journal.rows
    loop = _loop(run, metrics, saves, console, job, tasks)
    try:
        try:
            with watching(recipe.run.spot_notice if cluster.first_here else False, job.signals.note):
                stopped = loop.train()
            job.leave(limit)
        except BaseException as error:
            job.note(error)
            raise
        if console is not None:
            if stopped is not None:
                folder.note_stop(by=name_of(stopped), step=run.step)
            why = "" if stopped is None else text_of(stopped)
            console.close(summary(run, folder.path, loop.held_out, why))
    finally:
        metrics.close()
        saves.wait()
    return 0 if stopped is None else exit_status(stopped)


def _loop(run: Any, metrics: Any, saves: Any, console: Console | None, job: Job, tasks: Any) -> Loop:
    from hlat.observe.stopping import Deadline, end_of_time
    from hlat.train.loop import Loop

    recipe = run.recipe
    ends = end_of_time(os.environ, recipe.run.max_hours, job.signals.began)
    return Loop(
        run,
        metrics,
        saves,
        console.checkpoint if console else lambda step: None,
        warn=console.warn if console else lambda line: None,
        signals=job.signals,
        deadline=Deadline(ends, recipe.checkpoint.grace),
        cluster=job.cluster,
        watchdog=job.watchdog,
        tasks=tasks,
    )


def _saves(
    recipe: Recipe, data: Any, folder: RunFolder, cluster: Cluster, warn: Callable[[str], None]
) -> Saves:
    """Where the run's state is kept."""
    from hlat.train.saves import kind_of_saves

    make, tokenizer = kind_of_saves(recipe), data.tokenizer.kept_files()
    checkpoints, files = folder.checkpoints, folder.nxd_checkpoints
    return make(checkpoints, files, recipe, warn, tokenizer, cluster.exchange, folder.claim, data.fingerprint)


def _tasks(run: Any, job: Job) -> Any:
    """What runs the tasks of `eval.tasks`; None without any."""
    if not run.recipe.eval.tasks:
        return None
    from hlat.train.tasks import TaskEvaluation

    def beat() -> None:
        job.watchdog.beat(run.step, "evaluation", patient=True)
        if job.cluster.world == 1:  # else other ranks would wait for this one
            job.signals.check()

    job.watchdog.beat(0, "reading tasks", patient=True)
    return TaskEvaluation(run, beat)


def _process_group(recipe: Recipe) -> str:
    """What the backend wants torch.distributed to be; empty: no wish."""
    if recipe.backend != "nxd":
        return ""
    from hlat.backend.nxd.start import process_group

    return process_group()


def _backend(recipe: Recipe, cluster: Cluster, warn: Callable[[str], None]) -> tuple[Any, bool, str]:
    """The backend, whether to compile, and why; the last two as rank 0 decides."""
    if recipe.backend == "nxd":
        from hlat.backend.nxd import NxdBackend

        layout = recipe.layout(cluster.world)
        made = NxdBackend(layout, kv_heads=recipe.model.kv_heads, say=warn)
        return made, *made.compile_by_default(recipe.run.steps)
    from hlat.backend.native import NativeBackend

    backend = NativeBackend(
        recipe.layout(cluster.world), device=cluster.device, kv_heads=recipe.model.kv_heads
    )
    if recipe.compile != "auto":
        return backend, bool(recipe.compile), f"recipe: compile={str(recipe.compile).lower()}"
    choice = backend.compile_by_default(recipe.run.steps) if cluster.rank == 0 else None
    compiled, reason = cluster.from_first("compile", choice, recipe.parallel.first_timeout)
    return backend, compiled, reason


def _warn(cluster: Cluster) -> Callable[[str], None]:
    """Warnings of a rank that has no console."""
    return lambda text: print(f"hlat: {cluster.me}: warning: {text}", file=sys.stderr)
