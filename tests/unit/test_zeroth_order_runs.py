"""Zeroth-order methods of a recipe: memory, resume, the guard, what is refused, what is reported."""

from __future__ import annotations

import math

import pytest
import torch

from hlat.checkpoint.reader import open_checkpoint
from hlat.checkpoint.store import CheckpointStore
from hlat.errors import UserError
from hlat.method.noise import noise
from hlat.train import state
from hlat.train.memory import peak_bytes, persistent_bytes
from hlat.train.step import train_step

MEZO = "method={name: mezo, lr: 1e-3}"
SVRG = "method={name: mezo_svrg, lr_anchor: 1e-3, lr_inner: 1e-3, anchor_examples: 16"
METHODS = {
    "mezo": MEZO,
    "copy": SVRG + "}",
    "seed_log": SVRG + ", snapshot: seed_log, anchor_every: 4}",
    "two": SVRG + ", shared_z: false, anneal: 2, anneal_every: 1}",
    "authors": SVRG + ", compat: authors}",
    "full": "method={name: full_batch_zo, lr: 1e-3, anchor_examples: 16, noise: rademacher}",
}


def masters(run) -> dict[str, torch.Tensor]:
    return {spec.name: spec.view(b.master.detach()).clone() for b in run.buckets for spec in b.specs}


def test_a_step_of_mezo_by_hand(tiny_run) -> None:
    run = tiny_run(MEZO, "data.micro_batch=4")
    start, batches = masters(run), run.next_batches()
    tokens = run.count_targets(batches)
    z = {name: noise(run.recipe.run.seed, name, value.shape) for name, value in start.items()}
    losses = []
    for sign in (1, -1):
        for bucket in run.buckets:
            for spec in bucket.specs:
                spec.view(bucket.weights).copy_(start[spec.name] + sign * 1e-3 * z[spec.name])
        losses.append(float(run.engine.forward(batches, tokens)))
    other = tiny_run(MEZO, "data.micro_batch=4")
    values = train_step(other)
    p = (losses[0] - losses[1]) / 2e-3
    assert float(values["loss"]) == pytest.approx(sum(losses) / 2, abs=1e-6)
    assert float(values["grad_norm"]) == pytest.approx(abs(p), rel=1e-3)
    moved = masters(other)
    for name, value in start.items():
        assert (moved[name] - (value - 1e-3 * p * z[name])).abs().max() < 2e-6, name


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_resume_is_bitwise(tiny_run, tmp_path, method: str, compute: str) -> None:
    options = (METHODS[method], f"precision.compute={compute}", "run.steps=8", "data.micro_batch=4")
    whole, first = tiny_run(*options), tiny_run(*options)
    losses = [float(train_step(whole)["loss"]) for _ in range(7)]
    for _ in range(3):
        train_step(first)
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    store.save(first.step, state.tensors(first), state.meta(first), 0, wait=True)
    second = tiny_run(*options)
    state.restore(second, store.newest())
    assert [float(train_step(second)["loss"]) for _ in range(4)] == losses[3:]
    found, wanted = masters(second), masters(whole)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert all(torch.equal(a.weights, b.weights) for a, b in zip(second.buckets, whole.buckets, strict=True))
    assert len(set(losses)) == 7
    names = set(open_checkpoint(tmp_path / "checkpoints" / "step-00000003").names())
    assert ("optim/anchor/embed.weight" in names) == (method in ("copy", "two"))


def test_seed_log_equals_copy(tiny_run) -> None:
    ends = []
    for snapshot in ("copy", "seed_log"):
        method = SVRG.replace("1e-3", "1e-4") + f", anchor_every: 5, snapshot: {snapshot}}}"
        run = tiny_run(method, "run.steps=12")
        start = masters(run)
        for _ in range(12):
            train_step(run)
        ends.append(masters(run))
    for name, value in ends[0].items():
        assert (ends[1][name] - value).abs().max() <= 1e-6
    assert any((ends[0][name] - value).abs().max() > 1e-5 for name, value in start.items())


def test_memory_is_that_of_inference(tiny_run) -> None:
    """Bytes in units of an fp32 copy of the parameters: nothing for gradients, moments or noise."""

    def units(*options: str) -> float:
        run = tiny_run(*options)
        for _ in range(2):
            train_step(run)
        return persistent_bytes(run) / sum(4 * bucket.length for bucket in run.buckets)

    assert units("optim={name: sgd, momentum: 0.0}") == pytest.approx(2, abs=0.15)
    assert units() == pytest.approx(4, abs=0.15)
    assert units(MEZO) == pytest.approx(1, abs=0.15)
    assert units(METHODS["copy"]) == pytest.approx(2, abs=0.15)
    assert units(METHODS["seed_log"]) == pytest.approx(1, abs=0.15)
    assert units(MEZO, "precision.compute=bf16") == pytest.approx(1.5, abs=0.15)
    assert units(SVRG + ", restore: copy}") == pytest.approx(3, abs=0.15)
    run = tiny_run(MEZO)
    assert all(bucket.grad.device.type == "meta" for bucket in run.buckets)
    assert not any(p.requires_grad for p in run.model.parameters())
    assert 1e8 < peak_bytes(torch.device("cpu")) < 1e11 and peak_bytes(torch.device("meta")) is None


def test_a_bad_loss_skips_the_step(tiny_run, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("mezo", "copy", "seed_log"):
        run = tiny_run(METHODS[method], "precision.compute=bf16")
        train_step(run)
        before, weights = masters(run), [bucket.weights.clone() for bucket in run.buckets]
        with monkeypatch.context() as patch:
            patch.setattr(run.engine, "forward", lambda *a: torch.tensor(float("nan")))
            values = train_step(run)
        assert bool(values["skipped"]) and int(run.updates) == 1 and run.step == 2
        assert all(torch.equal(value, before[name]) for name, value in masters(run).items())
        assert all(torch.equal(b.weights, w) for b, w in zip(run.buckets, weights, strict=True))
        assert not bool(train_step(run)["skipped"])


def test_the_schedule_multiplies_the_rates(tiny_run) -> None:
    run = tiny_run(
        SVRG.replace("lr_inner: 1e-3", "lr_inner: 1e-4") + "}", "schedule={name: linear, floor: 0.0}"
    )
    rates = [float(train_step(run)["lr"]) for _ in range(4)]
    assert rates == pytest.approx([1e-3, 0.8e-4, 0.6e-3, 0.4e-4])
    assert run.learning_rate() == pytest.approx(0.2e-3)
    assert run.learning_rate(3) == pytest.approx(0.4e-4)


def test_train_only_moves_nothing_else(tiny_run) -> None:
    run = tiny_run(MEZO, "train_only=['layers.1.*']")
    frozen = {name: held.value.clone() for name, held in run.frozen.items()}
    start = masters(run)
    train_step(run)
    assert frozen and all(torch.equal(run.frozen[name].value, value) for name, value in frozen.items())
    assert all(not torch.equal(value, start[name]) for name, value in masters(run).items())


def test_queries_are_what_the_engine_saw(tiny_run, monkeypatch: pytest.MonkeyPatch) -> None:
    for method, text in METHODS.items():
        run, seen = tiny_run(text, "data.micro_batch=4"), []
        forward = run.objective.loss
        monkeypatch.setattr(
            run.objective, "loss", lambda m, b, t, f=forward, s=seen: (s.append(len(b.ids)), f(m, b, t))[1]
        )
        for steps in range(1, 6):
            train_step(run)
            assert sum(seen) == run.method.queries(run.recipe, steps), method


def test_the_anchor_in_larger_batches_is_the_same(tiny_run) -> None:
    for text in ("copy", "full"):
        losses = []
        for extra in ("", ", anchor_batch: 4", ", anchor_batch: 12"):
            run = tiny_run(METHODS[text].replace("}", extra + "}"), "data.micro_batch=4")
            losses.append([float(train_step(run)["loss"]) for _ in range(4)])
        assert losses[1] == losses[0] and losses[2] == pytest.approx(losses[0], abs=2e-5)


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("parallel.zero1=true", "parallel.zero1"),
        ("parallel.recompute=full", "parallel.recompute"),
        ("reduce={name: conef}", "reduce.name"),
        ("precision={compute: bf16, master: none}", "precision.master"),
    ],
)
def test_what_makes_no_sense_without_gradients_is_refused(tiny_run, override: str, where: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny_run(METHODS["copy"], override)
    assert caught.value.where == where and "mezo_svrg" in str(caught.value)


@pytest.mark.parametrize(
    ("method", "where"),
    [
        ("{name: mezo_svrg, anchor_examples: 12}", "method.anchor_examples"),
        ("{name: full_batch_zo, anchor_examples: 12}", "method.anchor_examples"),
        ("{name: mezo_svrg, anchor_batch: 12}", "method.anchor_batch"),
        ("{name: mezo, lr: -1}", "method.lr"),
        ("{name: mezo_svrg, anchor_every: 1}", "method.anchor_every"),
        ("{name: mezo_svrg, snapshot: log}", "method.snapshot"),
        ("{name: mezo_svrg, noise: uniform}", "method.noise"),
    ],
)
def test_bad_options_name_their_key(tiny_run, method: str, where: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny_run(f"method={method}")
    assert where in caught.value.where


def test_losses_stay_near_those_of_the_start(tiny_run) -> None:
    """A direction that were not undone would show."""
    run = tiny_run("method={name: mezo_svrg, lr_anchor: 1e-9, lr_inner: 1e-9, anchor_examples: 16}")
    start = masters(run)
    for _ in range(10):
        train_step(run)
    drift = math.sqrt(sum(float((v - start[k]).square().sum()) for k, v in masters(run).items()))
    size = math.sqrt(sum(float(v.square().sum()) for v in start.values()))
    assert 0 < drift / size < 3e-7
