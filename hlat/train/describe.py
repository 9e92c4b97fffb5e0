"""What a run says of itself: what was chosen and why when it starts, what came of it when it ends."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hlat.evaluate.generate import Diverged
from hlat.host.cpu import product_dtype
from hlat.mesh import Layout
from hlat.model.init import parameter_shapes
from hlat.train.evaluate import compressors, sample
from hlat.train.rounding import rounding_lines
from hlat.train.run import trained_groups
from hlat.train.update import needs_backward, same_rates_if_longer

if TYPE_CHECKING:
    from pathlib import Path

    from hlat.checkpoint.nxd import NxdFolder
    from hlat.checkpoint.reader import Checkpoint
    from hlat.observe.peak import Peak
    from hlat.train.run import Run

_SAMPLE_TOKENS = 120
_SAMPLE_UP_TO = 300_000_000  # parameters; a larger model is sampled with `hlat generate`
_COMPRESS_UP_TO = 64 << 20  # bytes of held-out text


def banner(
    run: Run,
    folder: Path,
    saved: Checkpoint | NxdFolder | None,
    compiled: str,
    peak: Peak | None,
    began: str = "",
) -> list[str | tuple[str, str]]:
    """What was chosen and why."""
    recipe, precision = run.recipe, run.recipe.precision
    data, parts, layout = recipe.data, recipe.accumulate(run.backend.world), run.backend.layout
    note = ""
    if precision.compute == "bf16" and product_dtype(run.backend.device, torch.bfloat16) == torch.float32:
        note = " (this CPU multiplies no bf16: products are made in fp32, then rounded)"
    device = run.backend.device.type
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' * (count > 1)}" if device == "cpu" else ""
    lines: list[str | tuple[str, str]] = [
        f"hlat train · {recipe.run.name}",
        ("model", _model_text(run)),
        (
            "step",
            f"{data.global_batch} rows x {data.seq_len} = {recipe.tokens_per_step:,} tokens, "
            f"in {parts} micro-batch{'es' * (parts > 1)} of {data.micro_batch}",
        ),
        (
            "precision",
            f"compute {precision.compute}, masters {precision.master}, moments {precision.states}, "
            f"rounding {precision.rounding}{note}",
        ),
        *(("", line) for line in rounding_lines(run)),
        *_update_lines(run),
        ("device", f"{device}{threads}"),
        ("compile", compiled),
    ]
    if peak is not None:
        lines.append(("MFU", f"against {peak}"))
    if layout.world > 1:
        lines.append(("layout", f"{layout}; {_held_text(run)}"))
    lines += [("reduce", line) for line in run.reducer.describe()]
    lines += [("data", line) for line in run.data.report_lines()]
    if began:
        lines.append(("init", began))
    if saved is not None:
        lines.append(("resume", f"step {run.step} of {saved.path}"))
        if ended := _ended_text(run):
            lines.append(("", ended))
        former = saved.meta.get("layout", str(Layout()))
        if former != str(layout):
            lines.append(("layout", f"saved as {former}; continues as {layout}"))
    lines.append(("run folder", str(folder)))
    return lines


def _ended_text(run: Run) -> str:
    """That nothing is left to train, and how to train on; empty when something is."""
    section = run.recipe.run
    if run.step >= section.steps:
        on = "run.steps=MORE"
        if not same_rates_if_longer(run.recipe, run.step):
            on += f" schedule.horizon_steps={run.recipe.horizon_steps}"
        return f"all {section.steps:,} steps are done, nothing is left to train; to train on: {on}"
    if section.stop_at_step is not None and run.step >= section.stop_at_step:
        stop = f"run.stop_at_step={section.stop_at_step}"
        return f"{stop} is reached, nothing is left to train; to train on, leave it out or raise it"
    return ""


def _sizes(run: Run) -> dict[str, int]:
    """Elements of every parameter of the whole model, whatever this rank holds of it."""
    return {name: math.prod(shape) for name, shape in parameter_shapes(run.recipe.model).items()}


def _model_text(run: Run) -> str:
    model, sizes = run.recipe.model, _sizes(run)
    total, trained = sum(sizes.values()), sum(sizes[name] for name in trained_groups(run.recipe))
    part = f", {trained:,} of them trained" if trained != total else ""
    return f"{model.layers} layers x {model.hidden}, {total:,} parameters{part}"


def _update_lines(run: Run) -> list[str | tuple[str, str]]:
    """What moves the parameters."""
    if needs_backward(run.recipe):
        return [
            ("optimizer", _groups_text(run)),
            *(("", f"note: {line}") for line in _optimizer_notes(run)),
        ]
    name = run.recipe.method.name
    return [
        ("method", f"{name}: {run.method.describe()}"),
        ("optimizer", f"none: {name} moves the parameters itself, and the optim section is not used"),
    ]


def _optimizer_notes(run: Run) -> list[str]:
    """What the optimizer has to say of a run as long as this one; plain torch optimizers say nothing."""
    notes: Callable[[int], list[str]] = getattr(run.optimizer, "notes", lambda updates: [])
    return notes(run.recipe.run.steps)


def _groups_text(run: Run) -> str:
    """Name of the optimizer and what each of its groups holds in the whole model."""
    counts = Counter(trained_groups(run.recipe).values())
    groups = [
        f"{count} {'matrices' if group.matrix else 'tensors'} lr {group.lr:g} decay {group.weight_decay:g}"
        for group, count in counts.items()
    ]
    return f"{run.recipe.optim.name}: {'; '.join(groups)}"


def _held_text(run: Run) -> str:
    """What this rank holds in memory for good, padding included."""
    frozen = [held.value for held in run.frozen.values()]
    parameters = sum(spec.numel for bucket in run.buckets for spec in bucket.specs)
    weights: list[Tensor] = [*frozen]
    masters: list[Tensor] = []
    states: list[Tensor] = []
    for bucket in run.buckets:
        weights += bucket.parameters or [bucket.weights]
        states += [v for v in run.optimizer.state[bucket.master].values() if torch.is_tensor(v)]
        if not bucket.own_master:
            masters.append(bucket.master)
    held: dict[str, list[Tensor]] = {
        "weights": weights,
        "gradients": [bucket.grad for bucket in run.buckets if bucket.grad.device.type != "meta"],
        "masters": masters,
        "optimizer state": states,
        "frozen weights as they came (host memory)": [
            held.exact for held in run.frozen.values() if held.exact is not None
        ],
    }
    sizes = ", ".join(f"{what} {sum(t.nbytes for t in ts) / 1e6:,.1f} MB" for what, ts in held.items() if ts)
    count = parameters + sum(value.numel() for value in frozen)
    return f"rank {run.backend.rank} of {run.backend.world} holds {count:,} parameters: {sizes}"


def summary(
    run: Run, folder: Path, held_out: dict[str, Any] | None, stopped: str
) -> list[str | tuple[str, str]]:
    """The end of a run: held-out figures beside general compressors, a sample, where things are. `stopped` is
    what stopped it before its last step, if anything did.

    One rank calls it, after the last checkpoint is complete: the sample is made from that.
    """
    if stopped:
        return [f"stopped by {stopped} after step {run.step}; state saved, the same command continues"]
    recipe = run.recipe
    lines: list[str | tuple[str, str]] = []
    if held_out is not None and not math.isfinite(held_out["loss"]):
        lines.append(("held-out", "no figure: the loss is not finite"))
    elif held_out is not None and "accuracy" in held_out:
        lines += _accuracy_lines(run, held_out)
    elif held_out is not None:
        figures = f"{held_out['bits_per_byte']:.3f} bits per byte, loss {held_out['loss']:.3f} a token"
        lines.append(("held-out", figures))
        if held_out["held_out_bytes"] <= _COMPRESS_UP_TO and recipe.data.examples is None:
            text = run.data.holdout_text(run.recipe.eval.rows)
            others = ", ".join(f"{name} {bits:.3f}" for name, bits in compressors(text).items())
            lines.append(("", f"{others} bits per byte on the same {len(text):,} bytes"))
    if sum(_sizes(run).values()) <= _SAMPLE_UP_TO and not (held_out and "accuracy" in held_out):
        lines += _sample_lines(run, folder)
    lines.append(("run folder", str(folder)))
    return lines


def _sample_lines(run: Run, folder: Path) -> list[str | tuple[str, str]]:
    """Text that the model writes; of one that has diverged, a word about that."""
    try:
        text = sample(run, folder, _SAMPLE_TOKENS).strip("\n")
    except Diverged as error:
        text = f"none: {error.what}"
    lines = text.split("\n")
    quoted = [f"| {line}" for line in lines] if lines[1:] else lines  # its lines are not taken for ours
    return [("sample", "\n".join(quoted))]


def _accuracy_lines(run: Run, held_out: dict[str, Any]) -> list[str | tuple[str, str]]:
    """Held-out accuracy beside what naming the most frequent label would give."""
    labels = run.data.holdout_labels(run.recipe.eval.rows)
    label, count = max(labels.items(), key=lambda item: item[1])
    total = held_out["held_out_examples"]
    unit = "a token" if run.data.kind == "tokens" else "an example"
    return [
        ("held-out", f"accuracy {held_out['accuracy']:.1%} of {total:,}, loss {held_out['loss']:.3f} {unit}"),
        ("", f"always {label!r}: {count / total:.1%}"),
    ]
