"""One training step: what must not change its numbers, and what must."""

import pytest
import torch
from torch._dynamo.utils import counters

from hlat.backend.native import NativeBackend, compile_trouble, refuse_compile
from hlat.errors import UserError
from hlat.model.blocked_attention import blocked_attention
from hlat.parallel.buckets import PAD, squared_norm
from hlat.train.unused import unused


def parameters(run) -> dict[str, torch.Tensor]:
    return {spec.name: spec.view(b.master.detach()).clone() for b in run.buckets for spec in b.specs}


@pytest.mark.parametrize("mask", ["true", "false"])
def test_accumulation_changes_nothing(tiny_run, train_steps, mask: str) -> None:
    whole = train_steps(tiny_run(f"data.document_mask={mask}", "data.micro_batch=8"), 5)
    parts = train_steps(tiny_run(f"data.document_mask={mask}", "data.micro_batch=2"), 5)
    for (loss, norm), (loss_parts, norm_parts) in zip(whole, parts, strict=True):
        assert loss_parts == pytest.approx(loss, abs=2e-6)
        assert norm_parts == pytest.approx(norm, rel=1e-5)
    assert len({loss for loss, _ in whole}) == 5


def test_the_first_gradient_equals_autograd(tiny_run) -> None:
    run = tiny_run("data.micro_batch=2")
    batches = run.next_batches()
    tokens = torch.stack([b.targets_count() for b in batches]).sum()
    run.engine.forward_backward(batches, tokens)
    found = {spec.name: spec.view(b.grad).clone() for b in run.buckets for spec in b.specs}
    weights = {name: p.detach().clone().requires_grad_() for name, p in run.model.named_parameters()}
    total = torch.zeros(())
    for b in batches:
        logits = torch.func.functional_call(run.model, weights, (b.ids, b.positions, b.documents))
        total = total + torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), b.targets.flatten(), reduction="sum"
        )
    wanted = torch.autograd.grad(total / tokens, list(weights.values()))
    assert set(found) == set(weights)
    for name, want in zip(weights, wanted, strict=True):
        assert (found[name] - want).abs().max() <= 1e-5 * want.abs().max(), name


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recompute_changes_nothing_but_the_number_of_forwards(
    tiny_run, train_steps, mode, monkeypatch
) -> None:
    calls = []
    attention = blocked_attention
    monkeypatch.setattr(
        "hlat.model.attention.blocked_attention", lambda *a: (calls.append(1), attention(*a))[1]
    )
    plain = train_steps(tiny_run(), 3)
    once = len(calls)
    calls.clear()
    assert train_steps(tiny_run(f"parallel.recompute={mode}"), 3) == plain
    assert len(calls) == 2 * once > 0


def test_tied_embeddings_accumulate_both_uses(tiny_run, train_steps) -> None:
    run = tiny_run("model.tie_embeddings=true")
    names = [spec.name for b in run.buckets for spec in b.specs]
    assert "embed.weight" in names and "head.weight" not in names
    assert run.model.head.weight is run.model.embed.weight
    losses = train_steps(run, 5)
    assert losses[-1][0] != losses[0][0]


def test_train_only_moves_nothing_else(tiny_run, train_steps) -> None:
    run = tiny_run("train_only=[layers.1.mlp.*, norm.weight]", "optim.lr=1e-2")
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    train_steps(run, 3)
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"norm.weight", *(f"layers.1.mlp.{part}.weight" for part in ("gate", "up", "down"))}
    with pytest.raises(UserError, match=r"train_only\[0\]: pattern 'layer.*' matches no parameter"):
        tiny_run("train_only=[layer.9]")


@pytest.mark.parametrize(
    ("overrides", "match", "why"),
    [
        (("train_only=[layers.0.*]",), "embed.weight", "none of its parameters is trained"),
        (("train_only=[norm.weight]",), "layers.*", "none of its parameters is trained"),
        (("model.tie_embeddings=true",), "head.weight", "none of its parameters is trained"),
        ((), "layers.*, {match: norm.*}", ""),
        ((), "layers.*, {match: layers.0.*, lr: 1}", "earlier groups match all of its parameters"),
    ],
)
def test_groups_with_nothing_to_do_are_said_and_change_nothing(tiny_run, overrides, match, why) -> None:
    entries = f"[{{match: {match.replace(', {', '}, {')}" + ("]" if "{" in match else "}]")
    run = tiny_run(*overrides, f"optim.groups={entries}")
    notes = unused(
        run.recipe, {"optim": {"groups": [{"match": group.match} for group in run.recipe.optim.groups]}}
    )
    assert len(notes) == bool(why) and all(note.endswith(f"has nothing to do: {why}") for note in notes)
    if "{" not in match:
        assert [b.group for b in run.buckets] == [b.group for b in tiny_run(*overrides).buckets]


def test_a_misspelt_group_is_one_line_whatever_is_trained(tiny_run) -> None:
    message = r"optim.groups\[0\].match: pattern 'nrom.*' matches no parameter; names look like '"
    for trained in ("train_only=[norm.weight]", "train_only=[]"):
        with pytest.raises(UserError, match=message):
            tiny_run(trained, "optim.groups=[{match: 'nrom*', lr: 1e-3}]")


def test_a_bad_batch_is_skipped_bitwise(tiny_run, train_steps) -> None:
    run = tiny_run("precision.compute=bf16", "precision.rounding=stochastic")
    train_steps(run, 2)
    before, weights, step = parameters(run), [b.weights.clone() for b in run.buckets], run.step
    run.model.norm.weight.data.fill_(float("nan"))
    run.buckets[0].weights.copy_(weights[0])
    from hlat.train.step import train_step

    values = train_step(run)
    assert bool(values["skipped"]) and run.step == step + 1 and int(run.updates) == 2
    after = parameters(run)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(torch.equal(b.weights, old) for b, old in zip(run.buckets, weights, strict=True))
    assert float(run.optimizer.state[run.buckets[0].master]["step"]) == 2


def test_clipping_bounds_the_update(tiny_run) -> None:
    run = tiny_run("optim.clip_norm=0.01")
    loss, shards = torch.tensor(2.0), [torch.ones(PAD), torch.zeros(PAD)]
    assert len(run.buckets) == len(shards)
    agreed, norm, clip = run.agree(loss, shards)
    assert agreed.item() == 2.0
    assert norm.item() == pytest.approx(PAD**0.5, rel=1e-6)
    assert (norm * clip).item() == pytest.approx(0.01, rel=1e-5)
    assert tiny_run("optim.clip_norm=null").agree(loss, shards)[2].item() == 1.0


def test_squared_norm_keeps_its_digits_over_many_elements() -> None:
    flat = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))
    exact = flat.double().square().sum().item()
    assert squared_norm(flat).item() == pytest.approx(exact, rel=1e-6)


def test_learning_rate_of_groups(tiny_run, train_steps) -> None:
    run = tiny_run(
        "schedule.name=linear", "schedule.warmup_steps=2", "optim.groups=[{match: embed.*, lr: 0.5}]"
    )
    assert run.learning_rate() == 0.0
    train_steps(run, 2)
    rates = {}
    for group in run.optimizer.param_groups:
        bucket = next(b for b in run.buckets if b.master is group["params"][0])
        rates.update({spec.name: float(group["lr"]) for spec in bucket.specs})
    assert rates["embed.weight"] == pytest.approx(0.25)
    assert rates["norm.weight"] == pytest.approx(0.0005)
    assert run.learning_rate() == pytest.approx(1e-3)


def test_precision_fields_are_what_is_stored(tiny_run, train_steps) -> None:
    run = tiny_run(
        "precision={compute: bf16, master: none, states: bf16, accumulate: bf16, reduce: bf16}",
        "precision.rounding=stochastic",
    )
    losses = train_steps(run, 5)
    bucket = run.buckets[0]
    assert bucket.master.data_ptr() == bucket.weights.data_ptr()
    assert {bucket.weights.dtype, bucket.grad.dtype, run.optimizer.state[bucket.master]["exp_avg"].dtype} == {
        torch.bfloat16
    }
    assert losses[-1][0] < losses[0][0] + 0.1
    run = tiny_run("precision.compute=bf16")
    bucket = run.buckets[0]
    assert (bucket.weights.dtype, bucket.grad.dtype, bucket.master.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )


def test_bf16_masters_start_from_unrounded_values(tiny_run) -> None:
    low, high = parameters(tiny_run("precision.compute=bf16")), parameters(tiny_run())
    assert all(torch.equal(low[name], high[name]) for name in high)


def test_compiled_steps_match_and_never_recompile(tiny_run, train_steps) -> None:
    eager = train_steps(tiny_run("schedule.name=linear", "schedule.warmup_steps=3"), 5)
    torch._dynamo.reset()
    counters.clear()
    seen = []
    run = tiny_run("schedule.name=linear", "schedule.warmup_steps=3", compiled=True)
    compiled = train_steps(run, 5, lambda run: seen.append(counters["stats"]["unique_graphs"]))
    for (loss, norm), (loss_compiled, norm_compiled) in zip(eager, compiled, strict=True):
        assert loss_compiled == pytest.approx(loss, abs=1e-5)
        assert norm_compiled == pytest.approx(norm, rel=1e-4)
    assert seen[0] > 0 and len(set(seen[1:])) == 1, seen


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("backend=nxd", "backend"),
        ("parallel.tp=2", "parallel"),
        ("parallel.pp=2", "parallel"),
        ("parallel.dp=2", "parallel"),
    ],
)
def test_what_is_not_there_yet_is_refused(tiny_run, override: str, where: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny_run(override, "data.micro_batch=4")
    assert caught.value.where == where


def test_a_tool_chain_that_cannot_compile_is_named_not_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = NativeBackend()
    assert compile_trouble() == ""
    assert backend.compile_by_default(99)[0] is False

    def broken(*args, **kwargs):
        raise RuntimeError("C++ compile error\nld: error: cannot find -lgomp")

    monkeypatch.setattr(torch, "compile", broken)
    on, reason = backend.compile_by_default(1000)
    assert on is False and "does not work here: RuntimeError" in reason and "error" in reason
    with pytest.raises(UserError, match="compile: torch.compile does not work here: RuntimeError"):
        refuse_compile(backend.device)
    monkeypatch.setenv("CXX", "nonexistent")
    assert backend.compile_by_default(1000) == (
        False,
        "torch.compile does not work here: no C++ compiler (nonexistent)",
    )


def test_joint_products_change_nothing(tiny_run, train_steps, monkeypatch: pytest.MonkeyPatch) -> None:
    joint = tiny_run()
    assert joint.model.layers["0"].attention.joint and joint.model.layers["0"].mlp.joint
    monkeypatch.setattr(NativeBackend, "prepare_model", lambda self, model: None)
    single = tiny_run()
    assert not single.model.layers["0"].mlp.joint
    for (loss, norm), (other, other_norm) in zip(train_steps(joint, 3), train_steps(single, 3), strict=True):
        assert loss == pytest.approx(other, abs=2e-6) and norm == pytest.approx(other_norm, rel=1e-5)
