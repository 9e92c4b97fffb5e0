"""`hlat train RECIPE [key=value …]`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlat.errors import UserError

if TYPE_CHECKING:
    from hlat.checkpoint.reader import Checkpoint
    from hlat.observe.console import Console
    from hlat.observe.peak import Peak
    from hlat.recipe import Recipe
    from hlat.train.run import Run

_SAMPLE_TOKENS = 120
_SAMPLE_UP_TO = 300_000_000  # parameters; a larger model is sampled with `hlat generate`
_COMPRESS_UP_TO = 64 << 20  # bytes of held-out text


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
    from hlat.data import open_data
    from hlat.observe.console import Console
    from hlat.observe.runfolder import RunFolder
    from hlat.recipe import load
    from hlat.recipe_io import find_recipe
    from hlat.train.run import refuse_unsupported

    recipe = load(args.recipe, args.overrides)
    refuse_unsupported(recipe)
    folder = RunFolder(recipe.run.dir)
    folder.check()
    last = recipe.run.stop_at_step or recipe.run.steps
    console = Console(last, name=recipe.run.name)
    try:
        data = open_data(recipe)
        _check_resume(recipe, data, folder)
        with folder.start(find_recipe(args.recipe).read_text(), recipe.to_yaml()):
            try:
                return _train(recipe, data, folder, console)
            except BaseException:
                folder.abandon()
                raise
    finally:
        console.close()


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
    from hlat.train.loop import GuardWatch, Loop

    backend, compiled, reason = _backend(recipe)
    run = _build(recipe, data, backend, compiled)
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
    console.banner(_banner(run, folder, checkpoint, f"{'on' if compiled else 'off'} ({reason})", peak))
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
        console.close(_summary(run, folder, loop.held_out, stopped))
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


def _build(recipe: Recipe, data: Any, backend: Any, compiled: bool) -> Run:
    from hlat.train.run import build_run

    if data.vocab_size > recipe.model.vocab:
        raise UserError(
            f"the tokenizer has {data.vocab_size} tokens, the model's vocabulary {recipe.model.vocab}",
            where="model.vocab",
            fix=f"write model.vocab={-(-data.vocab_size // 64) * 64}, or take a smaller tokenizer",
        )
    return build_run(recipe, data, backend, compiled=compiled)


def _banner(
    run: Run, folder: Any, checkpoint: Checkpoint | None, compiled: str, peak: Peak | None
) -> list[str | tuple[str, str]]:
    """What was chosen and why."""
    import torch

    from hlat.backend.native import has_native_bf16

    recipe, precision = run.recipe, run.recipe.precision
    trained = sum(spec.numel for bucket in run.buckets for spec in bucket.specs)
    total = sum(p.numel() for p in run.model.parameters())
    model, data = recipe.model, recipe.data
    note = ""
    if precision.compute == "bf16" and not has_native_bf16(run.backend.device):
        note = "; this CPU has no bf16 arithmetic, precision.compute=fp32 will be faster"
    device = run.backend.device.type
    if device == "cpu":
        device = f"cpu, {torch.get_num_threads()} threads"
    lines: list[str | tuple[str, str]] = [
        f"hlat train · {recipe.run.name}",
        (
            "model",
            f"{model.layers} layers x {model.hidden}, {total:,} parameters"
            + (f", {trained:,} of them trained" if trained != total else ""),
        ),
        (
            "step",
            f"{data.global_batch} rows x {data.seq_len} = {recipe.tokens_per_step:,} tokens, "
            f"in {recipe.accumulate()} micro-batches of {data.micro_batch}",
        ),
        (
            "precision",
            f"compute {precision.compute}, masters {precision.master}, moments {precision.states}, "
            f"rounding {precision.rounding}{note}",
        ),
        ("optimizer", _groups_text(run)),
        ("device", device),
        ("compile", compiled),
    ]
    if peak is not None:
        lines.append(("MFU", f"against {peak}"))
    lines += [("data", line) for line in run.data.report_lines()]
    if checkpoint is not None:
        lines.append(("resume", f"step {run.step} of {checkpoint.path}"))
    lines.append(("run folder", str(folder.path)))
    return lines


def _groups_text(run: Run) -> str:
    """Name of the optimizer and what each of its groups holds."""
    counts: dict[Any, int] = {}
    for bucket in run.buckets:
        counts[bucket.group] = counts.get(bucket.group, 0) + len(bucket.specs)
    groups = [
        f"{count} tensors lr {group.lr:g} decay {group.weight_decay:g}" for group, count in counts.items()
    ]
    return f"{run.recipe.optim.name}: {'; '.join(groups)}"


def _summary(
    run: Run, folder: Any, held_out: dict[str, Any] | None, stopped: int | None
) -> list[str | tuple[str, str]]:
    """The end of a run: held-out figures beside general compressors, a sample, where things are."""
    from hlat.observe.text import printable
    from hlat.train.evaluate import compressors, sample

    if stopped is not None:
        return [f"stopped by signal {stopped} after step {run.step}; state saved, the same command continues"]
    lines: list[str | tuple[str, str]] = []
    if held_out is not None:
        figures = f"{held_out['bits_per_byte']:.3f} bits per byte, loss {held_out['loss']:.3f} a token"
        lines.append(("held-out", figures))
        if held_out["held_out_bytes"] <= _COMPRESS_UP_TO:
            text = run.data.holdout_text(run.recipe.data.micro_batch, run.recipe.eval.batches)
            others = ", ".join(f"{name} {bits:.3f}" for name, bits in compressors(text).items())
            lines.append(("", f"{others} bits per byte on the same {len(text):,} bytes"))
    if sum(p.numel() for p in run.model.parameters()) <= _SAMPLE_UP_TO:
        text = printable(sample(run, _SAMPLE_TOKENS)).strip("\n")
        lines += [("sample" if i == 0 else "", line) for i, line in enumerate(text.splitlines())]
    lines.append(("run folder", str(Path(folder.path))))
    return lines
