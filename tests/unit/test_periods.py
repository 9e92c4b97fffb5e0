"""Windows, counters, rings and epochs past several of their periods, against plain references."""

from __future__ import annotations

import math
import time
import weakref
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hlat.backend.groups import Group
from hlat.data.mixture import SourceRows, TrainStream
from hlat.data.packed import Shard
from hlat.data.skips import Skips
from hlat.method.anneal import Annealing
from hlat.method.noise import noise
from hlat.observe.heartbeat import STEP, Pace
from hlat.observe.metrics import MetricBuffer
from hlat.observe.stopping import Deadline
from hlat.optim.schedule import make_schedule
from hlat.reduce.choice import Choice
from hlat.reduce.feedback import Talk, make_memory
from hlat.reduce.grid import shuffled
from hlat.registry import lookup
from hlat.supervise.goodput import StepTimes
from hlat.train.loop import manual_collection

STRETCH = st.tuples(st.integers(1, 60), st.integers(0, 6)).map(lambda pair: (pair[0], sum(pair)))


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Rows:
    def __init__(self) -> None:
        self.rows: list[Any] = []
        self.row, self.close = self.rows.append, lambda: None


@given(
    st.lists(
        st.tuples(st.sampled_from(["step", "step", "step", "pause", "back"]), st.floats(0.01, 9)),
        max_size=60,
    ),
    st.integers(1, 7),
    st.sampled_from(["cpu", "meta"]),
)
def test_seconds_of_steps_add_up_to_the_time_outside_of_pauses(
    story: list[tuple[str, float]], every: int, device: str
) -> None:
    """Also where windows are cut short; on an accelerator by windows, on a CPU step by step."""
    sink, clock = Rows(), Clock()
    rows = sink.rows
    fetch = lambda tensors: [0.0] * sum(t.numel() for t in tensors)  # noqa: E731
    options = {"tokens_per_step": 100, "flops_per_token": 3.0, "peak_flops": 60.0}
    buffer = MetricBuffer([sink], every=every, clock=clock, fetch=fetch, **options)
    buffer.start()
    took: list[float] = []
    for what, seconds in story:
        if what == "pause":
            with buffer.paused():
                clock.now += seconds
        elif what == "back":
            clock.now += seconds  # goes back, loads: no step's time
            waiting = len(took) - len(rows)
            buffer.rewind(len(rows))
            del took[len(took) - waiting :]
        else:
            clock.now += seconds
            took.append(seconds)
            buffer.add(len(took), {"loss": torch.zeros((), device=device)})
    buffer.flush()
    assert [row["step"] for row in rows] == list(range(1, len(took) + 1))
    assert sum(row["step_seconds"] for row in rows) == pytest.approx(sum(took))
    if device == "cpu":
        assert [row["step_seconds"] for row in rows] == pytest.approx(took)
    for row in rows:
        assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(100)
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * 3.0 / 60.0)


@given(st.lists(st.tuples(st.floats(0, 9), st.booleans()), max_size=300), st.integers(1, 80))
def test_the_longest_of_the_recent_steps(steps: list[tuple[float, bool]], every: int) -> None:
    deadline = Deadline(0.0, 1.0)
    deadline.window(every)
    for seconds, evaluated in steps:
        deadline.step(seconds, evaluated)
    last = max(50, 2 * every)
    plain, evaluations = ([s for s, e in steps if e is kind][-last:] for kind in (False, True))
    assert deadline.longest() == max(plain, default=0.0)
    assert deadline.longest(True) == max(evaluations or plain, default=0.0)


@pytest.mark.parametrize("every", [2, 10, 50, 51, 200])
def test_the_wait_for_queued_steps_is_never_forgotten(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator one step of a window waits for them all: the deadline and the watchdog know it."""
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    deadline, pace = Deadline(0.0, 1.0), Pace()
    for times in (deadline, pace):
        times.window(every)
    for step in range(1, 6 * every + 1):
        seconds = float(every) if step % every == 0 else 0.0
        pace.begin(step, STEP)
        deadline.step(seconds, False)
        clock.now += seconds
        assert step < every or deadline.longest() == every
        assert step <= 2 * every or pace.slowest() == every


def test_a_slow_save_counts_for_a_while() -> None:
    deadline = Deadline(0.0, 300.0)
    seen = []
    for seconds in (10.0, 60.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0):
        deadline.save(seconds)
        seen.append(deadline.save_seconds)
    assert seen == [10.0, 60.0, 60.0, 60.0, 60.0, 60.0, 14.0, 15.0]


def test_what_becomes_garbage_after_a_collection_is_freed_by_the_next() -> None:
    class Node:
        def __init__(self) -> None:
            self.me = self

    made: list[weakref.ref[Node]] = []
    alive: list[Node] = []
    with manual_collection(10) as collect:
        for _ in range(200):
            alive = [*alive[-2:], Node()]  # each lives for three steps
            made.append(weakref.ref(alive[-1]))
            collect()
        assert sum(ref() is not None for ref in made) < 15


@given(st.lists(STRETCH, max_size=6), st.lists(STRETCH, max_size=6), st.integers(1, 40), STRETCH)
def test_data_left_out(given_: list, found: list, within: int, bad: tuple[int, int]) -> None:
    skips = Skips(tuple(given_), ())
    for stretch in found:
        skips = skips.add(*stretch)
    out = {step for first, last in [*given_, *found] for step in range(first, last + 1)}
    read = [step for step in range(1, 300) if step not in out]
    assert [skips.position(step) for step in range(101)] == [0, *read[:100]]
    days = lambda s: range(s[0], s[1] + 1)  # noqa: E731
    near = [s for s in found if min(abs(a - b) for a in days(s) for b in days(bad)) <= within]
    assert skips.near(*bad, within) == near


@given(st.lists(st.floats(0.5, 4), max_size=90), st.integers(1, 5), st.sampled_from([2.0, 5.0]))
@settings(deadline=None, max_examples=30)
def test_annealing(losses: list[float], every: int, factor: float) -> None:
    annealing, divisions = Annealing(factor, every, torch.device("cpu")), 0
    for seen, loss in enumerate(losses, 1):
        annealing.note(torch.tensor(loss, dtype=torch.float64))
        if seen % every == 0 and seen > 4 * every:
            now, before = losses[seen - every : seen], losses[seen - 3 * every : seen - 2 * every]
            ratio = sum(now) / sum(before)
            if abs(ratio - 1.05) < 1e-5:
                return  # within rounding
            divisions += ratio > 1.05
        rate = annealing("lr_anchor", torch.tensor(1e-2, dtype=torch.float64))
        assert float(rate) == pytest.approx(max(1e-5, 1e-2 / factor**divisions))


@given(
    st.sampled_from(["linear", "cosine", "clamped_cosine", "wsd", "constant"]),
    st.integers(0, 30),
    st.integers(1, 60),
    st.floats(0, 1),
    st.floats(0.01, 1),
)
def test_schedules_to_three_horizons(name: str, warmup: int, length: int, floor: float, share: float) -> None:
    options = {"decay_fraction": share} if name == "wsd" else {}
    factor = make_schedule(name, warmup_steps=warmup, horizon_steps=warmup + length, floor=floor, **options)
    way = np.minimum(1.0, np.arange(3 * (warmup + length)) / length)
    half = 0.5 * (1 + np.cos(np.pi * way))
    curve = {
        "linear": 1 - (1 - floor) * way,
        "cosine": floor + (1 - floor) * half,
        "clamped_cosine": np.maximum(floor, half),
        "wsd": np.minimum(1.0, 1 - (1 - floor) * (way - (1 - share)) / share),
        "constant": np.ones_like(way),
    }[name]
    right = [*(np.arange(warmup) / max(1, warmup)), *curve]
    assert [factor(step) for step in range(3 * (warmup + length))] == pytest.approx(
        right[: 3 * (warmup + length)], abs=1e-12
    )


@given(st.integers(20, 200), st.integers(20, 200), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_five_epochs_of_a_mixture(tokens: int, others: int, weight: int, seed: int) -> None:
    """Each window once an epoch, in an order of its own, whatever the other source does."""

    class Tokens(Shard):
        def __init__(self, count: int) -> None:
            self.tokens = np.arange(count)  # type: ignore[assignment]
            self._vocab_size = count

        @property
        def count(self) -> int:  # type: ignore[override]
            return len(self.tokens)

    sources = [SourceRows([Tokens(n)], 8, seed, i, "") for i, n in enumerate((tokens, others))]
    stream = TrainStream(sources, [1.0, float(weight)], eos_id=0, document_mask=False)
    windows = sources[0].windows
    rows: list[np.ndarray] = []
    index = 0
    while len(rows) < 5 * windows:
        if stream.quota.locate(index)[0] == 0:
            rows.append(stream.ids(index))
        index += 1
    orders = []
    for epoch in range(5):
        own = rows[epoch * windows : (epoch + 1) * windows]
        targets = np.concatenate([row[1:] for row in own])
        assert len(np.unique(targets)) == len(targets) == 8 * windows
        orders.append(tuple((row[0] - own[0][0]) % tokens for row in own))
    assert windows < 6 or all(a != b for a, b in pairwise(orders))


@given(
    st.lists(st.tuples(st.sampled_from(["add", "add", "back"]), st.integers(0, 8), st.floats(0, 5))),
    st.integers(0, 40),
)
def test_seconds_by_step(story: list[tuple[str, int, float]], split: int) -> None:
    times, plain, step = StepTimes(), dict[int, float](), 5
    for what, count, seconds in story:
        if what == "back":
            step = max(1, step - count)
            taken = sum(plain.pop(s) for s in [s for s in plain if s > step])
            assert times.take_after(step) == pytest.approx(taken)
        else:
            times.add(step, step + count, seconds)
            for s in range(step, step + count + 1):
                plain[s] = plain.get(s, 0.0) + seconds / (count + 1)
            step += count
    assert times.total() == pytest.approx(sum(plain.values()))
    assert times.total(split) == pytest.approx(sum(s for step, s in plain.items() if step < split))


def test_pace_is_that_of_the_last_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pace = Pace()
    pace.window(3)
    took = [1.0 + (7 * step % 11) for step in range(400)]
    for step, seconds in enumerate(took):
        pace.begin(step, STEP)
        assert pace.slowest() == (sorted(took[max(0, step - 64) : step])[-2] if step >= 6 else -1.0)
        now[0] += seconds
    assert sum(pace.look(now[0])["spent"].values()) == pytest.approx(sum(took))


FAR = [
    ("adamw", {"betas": (0.9, 0.9999)}),
    ("adan", {}),
    ("amsgrad", {}),
    ("avgrad", {}),
    ("yogi", {}),
    ("lion", {}),
    ("muon", {}),
    ("hyperadam", {}),
    ("mada", {"beta3": 0.1, "rho": 0.5, "c": 0.5, "gamma": 0.5}),
]


@pytest.mark.parametrize("start", [100_000, 1_000_000, 2**24 - 4])
@pytest.mark.parametrize(("name", "options"), FAR, ids=[name for name, _ in FAR])
def test_steps_far_into_a_run_are_those_of_double_precision(
    name: str, options: dict[str, Any], start: int
) -> None:
    """Powers that underflow, 1 / t and a counter at the end of what fp32 counts."""
    moved = []
    for dtype in (torch.float32, torch.float64):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 64, dtype=dtype).view(8, 8))
        optimizer = lookup("optim", name)([p], 1e-3, **options)
        optimizer.init_state()
        for slot, value in optimizer.state[p].items():
            if slot in ("step", "updates"):
                value.fill_(start)
            elif slot.endswith("_sq"):
                value.fill_(1.0)
        made = torch.Generator().manual_seed(0)
        for _ in range(8):
            p.grad = torch.randn(8, 8, generator=made, dtype=torch.float64).to(dtype)
            optimizer.step()
        moved.append(p.detach().double())
    assert moved[0].isfinite().all() and (moved[1] - torch.linspace(-1, 1, 64).view(8, 8)).abs().max() > 1e-4
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=1e-6)


def test_noise_does_not_repeat_after_a_power_of_two() -> None:
    steps = [0, 1, 2, *(2**n + d for n in (8, 15, 16, 17, 24, 30) for d in (-1, 0, 1)), 2**31 - 1]
    drawn = torch.stack([noise(0, "w", (64,), step=step) for step in steps])
    alike = (drawn @ drawn.T / 64).abs()
    assert float((alike - alike.diag().diag()).max()) < 0.75


def test_blocks_have_their_turns_past_2_to_the_16_rounds() -> None:
    rounds = (0, 1, 2**16 - 1, 2**16, 2**16 + 1, 2**17, 2**40)
    orders = [[int(shuffled(torch.tensor(n * 40 + i), 40, 3)) for i in range(40)] for n in rounds]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert all(a != b for a, b in pairwise(orders))


@pytest.mark.parametrize("error", ["exact", "sketch", "int8", "fp16"])
def test_an_error_store_stays_bounded_over_many_rounds(error: str) -> None:
    cell = make_memory(
        1024, [(0, 32, 32)], "w", torch.device("cpu"), 1, *_makers(Choice(ratio=0.25, error=error)), 0.25
    )
    made, keep = torch.Generator().manual_seed(0), torch.tensor(True)
    norms, sent, total = [], torch.zeros(1024), torch.zeros(1024)
    for count in range(400):  # a hundred rounds of four blocks
        grad = torch.randn(1024, generator=made) + 0.2
        sent, total = sent + _reduce(cell, grad, count, keep), total + grad
        norms.append(float(cell.store.squared_norm()))
    first, last = np.mean(norms[40:200]), np.mean(norms[240:])
    assert last < 1.5 * first and math.isfinite(last)
    assert error == "sketch" or float((sent - total).norm() / total.norm()) < 0.05


def test_low_rank_survives_a_gradient_of_zeros_and_one_of_lower_rank() -> None:
    cell = make_memory(
        1024, [(0, 32, 32)], "w", torch.device("cpu"), 1, *_makers(Choice("lowrank", rank=2)), 1.0
    )
    made, keep = torch.Generator().manual_seed(0), torch.tensor(True)
    thin = torch.zeros(32, 32)
    thin[0, 0] = 1.0  # rank 1, with nothing but zeros left of a second direction
    for count, grad in enumerate([torch.zeros(1024), thin.view(-1), torch.zeros(1024), thin.view(-1)]):
        _reduce(cell, grad, count, keep)
    assert all((basis != 0).any(0).all() for basis in cell.compressor.state().values())
    flat = (torch.randn(32, 2, generator=made) @ torch.randn(2, 32, generator=made)).view(-1)
    for count in range(6):
        arrived = _reduce(cell, flat, count, keep)
    assert float((arrived - flat).norm()) < 1e-3 * float(flat.norm())


def _makers(choice: Choice) -> tuple[Any, Any]:
    return choice.compressor_maker(), choice.store_maker()


def _reduce(cell: Any, grad: torch.Tensor, count: int, keep: torch.Tensor) -> torch.Tensor:
    talk = Talk(cell, cell.feed(grad, torch.tensor(count), torch.float32), Group())
    while not talk.advance():
        pass
    talk.commit(keep)
    return talk.reduced
