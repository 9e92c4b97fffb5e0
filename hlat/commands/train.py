"""`hlat train RECIPE [key=value …]`."""

from __future__ import annotations

import argparse
import importlib.util
import os
from typing import TYPE_CHECKING, Any

from hlat.errors import UserError

if TYPE_CHECKING:
    from hlat.observe.console import Console
    from hlat.recipe import Recipe


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hlat train`."""
    parser.add_argument(
        "recipe", help="a recipe file, or the name of one that ships with HLAT (see `hlat recipes list`)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe values to change, e.g. optim.lr=1e-3"
    )


def main(args: argparse.Namespace) -> int:
    """Train; returns 0, or 128 + the signal that stopped the run early (its state is saved)."""
    from hlat.recipe import load

    recipe = load(args.recipe, args.overrides)
    neuron_profile = _prepare_neuron(recipe)  # before anything imports torch

    from hlat.data import open_data
    from hlat.observe.console import Console
    from hlat.observe.environment import describe
    from hlat.observe.runfolder import RunFolder
    from hlat.recipe_io import find_recipe
    from hlat.train.run import refuse_unsupported

    refuse_unsupported(recipe)
    folder = RunFolder(recipe.run.dir)
    folder.check()
    last = recipe.run.stop_at_step or recipe.run.steps
    console = Console(last, name=recipe.run.name)
    try:
        data = open_data(recipe)
        _check_resume(recipe, data, folder)
        text, description = find_recipe(args.recipe).read_text(), describe(neuron_profile)
        with folder.start(text, recipe.to_yaml(), description=description):
            try:
                return _train(recipe, data, folder, console)
            except BaseException:
                folder.abandon()
                raise
    finally:
        console.close()


def _prepare_neuron(recipe: Recipe) -> list[dict[str, Any]]:
    """Set the variables of the Neuron profile where a run will use NxD; returns them for environment.json."""
    on_cpu = os.environ.get("NXD_CPU_MODE") == "1" or os.environ.get("PJRT_DEVICE") == "CPU"
    if recipe.backend != "nxd" or on_cpu or importlib.util.find_spec("neuronx_distributed") is None:
        return []
    from hlat.backend.neuron import machine
    from hlat.backend.neuron.profile import cluster, prepare

    nodes, cores = cluster(os.environ)
    efa = machine.efa_devices() if machine.neuron_devices() else None  # a host without Neuron has no EFA
    return [item.to_dict() for item in prepare(recipe, nodes=nodes, cores=cores, efa_devices=efa)]


def _check_resume(recipe: Recipe, data: Any, folder: Any) -> None:
    """Refuse, before anything is written, to continue a run that this recipe does not continue."""
    from hlat.checkpoint.peers import Peers
    from hlat.checkpoint.reader import newest_in
    from hlat.train import state

    if recipe.run.resume == "never":
        if folder.checkpoints.is_dir() and any(folder.checkpoints.iterdir()):
            raise UserError(
                "the run folder holds checkpoints and run.resume is never",
                where=str(folder.path),
                fix="choose another run.dir, or run.resume=auto to continue",
            )
        return
    newest, _ = newest_in(folder.checkpoints, False, Peers.meet())
    if newest is not None:
        state.check_same_run(recipe, data.fingerprint, newest.meta, str(folder.path))


def _train(recipe: Recipe, data: Any, folder: Any, console: Console) -> int:
    from hlat.checkpoint.store import CheckpointStore
    from hlat.model.flops import flops_per_token
    from hlat.observe.metrics import MetricBuffer
    from hlat.observe.peak import peak_flops
    from hlat.observe.sinks import open_sinks
    from hlat.train import state
    from hlat.train.describe import banner, summary
    from hlat.train.loop import GuardWatch, Loop
    from hlat.train.run import build_run

    backend, compiled, reason = _backend(recipe)
    run = build_run(recipe, data, backend, compiled=compiled)
    section = recipe.checkpoint
    store = CheckpointStore(
        folder.checkpoints,
        keep=section.keep,
        permanent_every_tokens=section.permanent_every_tokens,
        async_=section.async_,
        warn=console.warn,
    )
    checkpoint = store.newest()
    if checkpoint is not None:
        state.restore(run, checkpoint)
    peak = peak_flops(backend.device, next(run.model.parameters()).dtype)
    console.start(run.step, mfu_note=str(peak) if peak else "")
    console.banner(banner(run, folder.path, checkpoint, f"{'on' if compiled else 'off'} ({reason})", peak))
    sinks = open_sinks(["tensorboard"] if recipe.log.tensorboard else [], folder.path, run.step)
    metrics = MetricBuffer(
        [console, *sinks, GuardWatch(run.guard)],
        every=recipe.log.every,
        tokens_per_step=recipe.tokens_per_step,
        flops_per_token=flops_per_token(recipe.model, recipe.data.seq_len),
        peak_flops=peak.flops if peak else None,
    )
    loop = Loop(run, metrics, store, data.tokenizer.files(), console.checkpoint)
    try:
        stopped = loop.train()
        console.close(summary(run, folder.path, loop.held_out, stopped))
    finally:
        metrics.close()
        store.wait()
    return 0 if stopped is None else 128 + stopped


def _backend(recipe: Recipe) -> tuple[Any, bool, str]:
    """The backend, whether to compile, and why."""
    from hlat.backend.native import NativeBackend

    backend = NativeBackend()
    if recipe.compile == "auto":
        return backend, *backend.compile_by_default(recipe.run.steps)
    return backend, bool(recipe.compile), f"recipe: compile={str(recipe.compile).lower()}"
