"""Jobs that walk into NxD's known traps: what the adapter gets, and what NxD gives without it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nxd_jobs
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hlat.backend.nxd.layers import GateUp
from hlat.errors import TrainingStopped
from hlat.train.step import train_step


def _error(got: Tensor, right: Tensor) -> float:
    return float((got.float() - right.float()).norm() / right.float().norm())


def input_gradient(folder: Path) -> dict[str, float]:
    """Relative error of the gradient that a column-parallel product in bf16 passes down: as the adapter
    builds it, and with NxD's default reduce_dtype.
    """
    run = nxd_jobs.make_run(folder, ["parallel.tp=2", "precision.compute=bf16"])
    layer: GateUp = run.model.layers["0"].mlp.joint
    group, device = run.backend.groups.tp, run.backend.device
    torch.manual_seed(0)
    x, out = torch.randn(2, 8, 32).bfloat16(), torch.randn(2, 8, 64).bfloat16()
    result = {}
    for name, dtype in (("adapter", torch.bfloat16), ("default", torch.float32)):
        layer.options["reduce_dtype"] = dtype
        ours = x.clone().to(device).requires_grad_()
        parts = layer(ours)
        own = [o[..., group.rank * 32 : group.rank * 32 + 32].to(device) for o in (out, out)]
        torch.autograd.backward(list(parts), [o.contiguous() for o in own])
        whole = [
            group.gather(w.detach().reshape(-1)).reshape(64, 32).cpu()
            for w in (layer.gate.weight, layer.up.weight)
        ]
        right = x.detach().clone().requires_grad_()
        torch.autograd.backward([F.linear(right, w) for w in whole], [out, out])
        result[name] = _error(ours.grad.cpu(), right.grad)
    return result


def dtypes(folder: Path) -> dict[str, Any]:
    """Dtype of what NxD's embedding gives in a bf16 model: the adapter's, and one cast after it was made."""
    from neuronx_distributed.parallel_layers.layers import ParallelEmbedding

    run = nxd_jobs.make_run(folder, ["parallel.tp=2", "precision.compute=bf16"])
    ids = torch.zeros(1, 4, dtype=torch.int64, device=run.backend.device)
    cast = ParallelEmbedding(96, 32).to(torch.bfloat16).to(run.backend.device)
    names = {name: str(p.dtype) for name, p in run.model.named_parameters()}
    return {
        "adapter": str(run.model.embed(ids).dtype),
        "cast": str(cast(ids).dtype),
        "parameters": sorted(set(names.values())),
    }


def ignored(folder: Path) -> dict[str, float]:
    """Loss and gradient of a batch without a single target; and what NxD's cross-entropy makes of one."""
    from neuronx_distributed.parallel_layers.loss_functions import parallel_cross_entropy

    run = nxd_jobs.make_run(folder, ["parallel.tp=2"])
    batch = run.next_batches()[0]
    batch.targets.fill_(-100)
    loss = run.engine.forward_backward([batch], torch.ones((), device=run.backend.device))
    shards = run.reduce()
    logits = torch.randn(4, 48, device=run.backend.device)
    theirs = parallel_cross_entropy(logits, torch.full((4,), -100, device=run.backend.device))
    return {
        "loss": float(loss),
        "gradient": max(float(shard.abs().max()) for shard in shards),
        "nxd": float(theirs.abs().sum()),
    }


def clipping(folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """A step of plain gradient descent is as long as the learning rate times the clipped norm; and the norm
    that NxD's own step would have clipped to.
    """
    words = ["optim={name: sgd, lr: 1.0, momentum: 0.0, weight_decay: 0.0, clip_norm: 0.05}", *overrides]
    run = nxd_jobs.make_run(folder, words)
    before = [bucket.master.detach().clone() for bucket in run.buckets]
    train_step(run)
    square = sum((b.master.detach() - old).square().sum() for b, old in zip(run.buckets, before, strict=True))
    length = float(run.backend.groups.dp.all_reduce(square.reshape(1))) ** 0.5
    return {"length": length, "nxd": getattr(run.assembly.zero.nxd, "max_norm", None)}


def planted(folder: Path, fault: str) -> dict[str, Any]:
    """A mistake in a step after the warm-up: does the guard end the run, and with which reason?"""
    run = nxd_jobs.make_run(folder, [])
    lines: list[str] = []
    run.backend.graphs.say, run.backend.graphs.limit = lines.append, 1
    for _ in range(5):
        train_step(run)
    quiet = len(lines)
    if fault == "shape":
        batches = run.data.batches

        def shorter(*args: Any) -> Any:
            (batch,) = batches(*args)
            batch.ids, batch.targets = batch.ids[:, :24].contiguous(), batch.targets[:, :24].contiguous()
            return [batch]

        run.data.batches = shorter
    elif fault == "item":
        guard = run.guard

        class Reading:
            metrics, state = guard.metrics, guard.state

            def __call__(self, loss: Tensor, norm: Tensor) -> Tensor:
                return guard(loss, norm) if loss.item() < 1e9 else guard(loss, norm)

        run.guard = Reading()
    try:
        for _ in range(3):
            train_step(run)
    except TrainingStopped as error:
        return {"stopped": str(error), "lines": lines[quiet:]}
    return {"stopped": "", "lines": lines[quiet:]}


def stage_of_70b(folder: Path, nodes: int) -> dict[str, Any]:
    """Every stage of hlat-70b as the adapter builds it for one of its ranks, on the meta device, without the
    other ranks: the process groups are torch's fake ones.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from hlat.backend.nxd import NxdBackend
    from hlat.recipe import load
    from hlat.train.nxd_memory import meta_stage, stage_memory, table

    recipe, world = load("hlat-70b"), 32 * nodes
    layout = recipe.layout(world)
    dist.destroy_process_group()
    new_group = dist.new_group
    dist.new_group = lambda ranks=None, **options: new_group(ranks, backend="fake")
    rows, kinds = [], set()
    for stage in range(layout.pp):
        dist.init_process_group(
            "fake", rank=stage * layout.dp * layout.tp, world_size=world, store=FakeStore()
        )
        backend = NxdBackend(layout, kv_heads=recipe.model.kv_heads)
        model = meta_stage(recipe, layout, backend.place)
        backend.shard_model(model, torch.bfloat16)
        kinds |= {type(module).__name__ for module in model.modules()}
        rows.append(stage_memory(recipe, model, layout, backend.place.pp))
        dist.destroy_process_group()
    return {
        "table": table(rows),
        "most": max(row.total for row in rows),
        "stages": [row.stage for row in rows],
        "parameters": sum(row.parameters for row in rows),
        "kinds": sorted(kinds),
    }


class _Kernel:
    """A stand-in of an NKI kernel: called as kernel[batch, heads](...), in plain torch."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        return self.function


def _forward(q: Tensor, k: Tensor, v: Tensor, seed: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """q, k, v (B, H, K, S) -> (B, H, S, K), as the kernel's documentation has it."""
    assert options["use_causal_mask"] and q.shape == k.shape == v.shape
    scores = (q.transpose(-1, -2) @ k).float() * options["softmax_scale"]
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return weights.to(v.dtype) @ v.transpose(-1, -2), scores.logsumexp(-1)


def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, *rest: Any, **options: Any
) -> tuple[Tensor, ...]:
    """Everything (B, H, K, S)."""
    assert out.shape == grad.shape == q.shape
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        again, _ = _forward(*inputs, None, **options)
        return torch.autograd.grad(again, inputs, grad.transpose(-1, -2))


def flash(folder: Path) -> dict[str, Any]:
    """Error of NxD's flash attention through the adapter, its two kernels replaced by plain torch, against
    HLAT's attention: result and gradients. And what the recipe makes of it.
    """
    import sys

    from hlat.backend.nxd.flash import flash_attention
    from hlat.errors import UserError
    from hlat.model.attention import plain_attention
    from hlat.train.nxd import choose_attention

    long = ["model.max_seq_len=2048", "data.seq_len=2048", "data.micro_batch=1"]
    recipes = {
        kind: nxd_jobs.make_recipe(folder, [f"model.attention={kind}", *long])
        for kind in ("auto", "flash", "plain")
    }
    model = nxd_jobs.make_run(folder, []).model
    result: dict[str, Any] = {"without": choose_attention(recipes["auto"], model)}
    try:
        choose_attention(recipes["flash"], model)
    except UserError as error:
        result["refused"] = str(error)
    kernels = sys.modules["neuronxcc.nki.kernels"]
    kernels.flash_fwd, kernels.flash_attn_bwd = _Kernel(_forward), _Kernel(_backward)
    result["with"] = choose_attention(recipes["auto"], model)
    result["chosen"] = model.layers["0"].attention.core.forward is flash_attention
    torch.manual_seed(0)
    heads = {"q": 4, "k": 2, "v": 2}
    tensors = [torch.randn(1, 2048, n, 8) for n in heads.values()]
    grad, answers = torch.randn(1, 2048, 4, 8), []
    for function in (flash_attention, plain_attention):
        inputs = [x.clone().requires_grad_() for x in tensors]
        out = function(*inputs, None)
        answers.append([out, *torch.autograd.grad(out, inputs, grad)])
    result["errors"] = [_error(a, b) for a, b in zip(*answers, strict=True)]
    return result


def flat_and_rows(folder: Path, overrides: Sequence[str], steps: int = 4) -> dict[str, Any]:
    """Training with NxD's ZeRO-1 and with the shared flat buckets, which another reducer gets."""
    from hlat.parallel.buckets import Bucket
    from hlat.reduce.dense import Dense
    from hlat.registry import register
    from hlat.train.nxd import RowBucket

    @register("reduce", "dense_again")
    class Again(Dense):
        pass

    rows = nxd_jobs.make_run(folder, overrides)
    flat = nxd_jobs.make_run(folder, [*overrides, "reduce.name=dense_again"])
    kinds = [{type(bucket) for bucket in run.buckets} for run in (rows, flat)]
    train = nxd_jobs.shared.train
    return {
        "kinds": kinds == [{RowBucket}, {Bucket}],
        "rows": train(rows, steps),
        "flat": train(flat, steps),
    }
