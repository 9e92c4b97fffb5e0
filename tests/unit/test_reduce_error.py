"""Error feedback in one process: the identities, against implementations written out separately."""

from __future__ import annotations

import pytest
import torch

from hlat.backend.groups import Group
from hlat.reduce.choice import Choice
from hlat.reduce.compressors import Block, orthogonalised
from hlat.reduce.feedback import Memory, Talk, make_memory
from hlat.reduce.grid import Grid, Picked, shuffled, signs
from hlat.reduce.stores import Exact, Rounded, Sketch

CPU = torch.device("cpu")
TRUE, FALSE = torch.tensor(True), torch.tensor(False)
LENGTH = 7 * 1024


def memory(choice: Choice, length: int = LENGTH, matrices=((0, 64, 112),), shards: int = 1) -> Memory:
    makers = choice.compressor_maker(), choice.store_maker()
    return make_memory(length, matrices, "embed.weight", CPU, shards, *makers, choice.ratio)


def step(cell: Memory, grad: torch.Tensor, count: int, keep: torch.Tensor = TRUE) -> torch.Tensor:
    """One reduction of a group of one."""
    talk = Talk(cell, cell.feed(grad, torch.tensor(count), torch.float32), Group())
    while not talk.advance():
        pass
    talk.commit(keep)
    return talk.reduced


def gradients(steps: int, length: int = LENGTH, scale: float = 1.0) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(3)
    return [torch.randn(length, generator=made) * scale for _ in range(steps)]


def test_identity_store_is_classic_error_feedback_bitwise() -> None:
    cell = memory(Choice(error="exact"))
    error = torch.zeros(LENGTH)
    size, units = cell.compressor.size, cell.grid.units
    for t, grad in enumerate(gradients(40)):
        fed = grad + error
        number = int(shuffled(torch.tensor(t), cell.compressor.blocks, cell.compressor.salt))
        start = min(number * size, units - size) * cell.grid.unit
        sent = torch.zeros(LENGTH)
        sent[start : start + size * cell.grid.unit] = fed[start : start + size * cell.grid.unit]
        error = fed - sent
        assert torch.equal(step(cell, grad, t), sent)
        assert torch.equal(cell.store.error.view(-1)[:LENGTH], error)
    assert error.abs().max() > 3


@pytest.mark.parametrize("error", ["sketch", "exact", "int8", "fp16", "none"])
@pytest.mark.parametrize("compressor", ["block", "topk"])
def test_ratio_one_sends_everything(error: str, compressor: str) -> None:
    cell = memory(Choice(compressor, ratio=1.0, error=error))
    for t, grad in enumerate(gradients(5)):
        torch.testing.assert_close(step(cell, grad, t), grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [0.2, 0.1, 0.3])
@pytest.mark.parametrize("length", [1024, 40 * 1024, 41 * 1024])
def test_the_sketch_is_that_of_all_that_was_not_sent(size: float, length: int) -> None:
    """float64: S + Sk(g - D) equals the form that decompresses and sketches anew, S + Sk(p - D) - (1 - beta)
    Sk(U(S)), and the sketch, made from its definition, of the sum of everything not sent.
    """
    grid = Grid.fit(length, 1)
    store, block = Sketch(grid, CPU, size, dtype=torch.float64), Block(grid, 0.1, 5)
    plain, feedback = Definition(store), store.feedback
    other, unsent = torch.zeros(plain.cells, dtype=torch.float64), torch.zeros(length).double()
    for t, grad in enumerate(gradients(50, length)):
        grad = grad.double()
        fed = grad + feedback * plain.spread(other)
        torch.testing.assert_close(store.read().view(-1), fed - grad, rtol=0, atol=1e-12)
        number = int(shuffled(torch.tensor(t), block.blocks, block.salt))
        start = min(number * block.size, grid.units - block.size)
        where = torch.arange(grid.units) - start
        where = torch.where((where >= 0) & (where < block.size), where, block.size)[None]
        chosen = fed.view(1, grid.units, grid.unit)[:, start : start + block.size]
        sent = Picked(chosen, where)
        store.stage(grid.view(grad), sent)
        store.commit(TRUE)
        flat = sent.dense().view(-1)
        other = other + plain.sketch(fed - flat) - feedback * plain.sketch(plain.spread(other))
        unsent = unsent + grad - flat
        torch.testing.assert_close(store.cells.view(-1), other, rtol=0, atol=1e-12)
        torch.testing.assert_close(store.cells.view(-1), plain.sketch(unsent), rtol=0, atol=1e-12)
    assert store.cells.numel() <= max(size * length, grid.unit)


class Definition:
    """Sk and U of a store, element by element."""

    def __init__(self, store: Sketch) -> None:
        element = torch.arange(store.grid.shard)
        unit, column = element // store.grid.unit, element % store.grid.unit
        row = (unit // store.c).clamp(max=store.rows - 1)
        self.cell = row * store.grid.unit + column
        self.sign = store.signs[unit - row * store.c, column].double()
        self.cells = store.cells.numel()

    def sketch(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(self.cells, dtype=torch.float64).index_add(0, self.cell, self.sign * x)

    def spread(self, cells: torch.Tensor) -> torch.Tensor:
        return self.sign * cells[self.cell]


def test_a_sketch_spread_back_is_a_projection() -> None:
    grid = Grid.fit(50 * 1024, 1)
    store = Sketch(grid, CPU, 0.1, dtype=torch.float64)
    body = store.rows * store.c * grid.unit
    x = torch.randn(50 * 1024, dtype=torch.float64)
    x[body:] = 0
    none = Picked(torch.zeros(1, 0, grid.unit), torch.zeros(1, grid.units, dtype=torch.long))
    for _ in range(2):
        store.cells.zero_()
        store.stage(grid.view(x), none)
        store.commit(TRUE)
        before, x = x, store.read().view(-1)
        x[body:] = 0
    torch.testing.assert_close(x, before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("choice", [Choice(error=e) for e in ("sketch", "exact", "int8", "fp16")], ids=str)
def test_a_skipped_step_leaves_the_error_bitwise(choice: Choice) -> None:
    cell = memory(choice)
    for t, grad in enumerate(gradients(4)):
        step(cell, grad, t)
    before = {name: tensor.clone() for name, tensor in cell.tensors().items()}
    bad = gradients(1)[0]
    bad[5], bad[6] = torch.nan, torch.inf
    step(cell, bad, 4, FALSE)
    assert all(torch.equal(before[name], tensor) for name, tensor in cell.tensors().items())
    step(cell, gradients(1)[0], 4)
    assert not all(torch.equal(before[name], tensor) for name, tensor in cell.tensors().items())


@pytest.mark.parametrize("compressor", ["block", "topk", "sign", "int8", "lowrank"])
@pytest.mark.parametrize("error", ["sketch", "exact"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_value_shows_whether_it_is_sent_or_not(compressor: str, error: str, value: float) -> None:
    cell = memory(Choice(compressor, error=error))
    for place in range(0, 6400, 331):
        grad = gradients(1)[0]
        grad[place] = value
        talk = Talk(cell, cell.feed(grad, torch.tensor(0), torch.float32), Group())
        while not talk.advance():
            pass
        talk.commit(FALSE)
        assert talk.health is not None and not talk.health.isfinite()
    step(cell, gradients(1)[0], 0)
    assert all(tensor.isfinite().all() for tensor in cell.tensors().values())


def test_rounded_errors_follow_the_exact_one() -> None:
    grads = gradients(60, scale=1e-6)  # gradients of a mean over many tokens are small
    exact = memory(Choice(error="exact"))
    cells = {"int8": memory(Choice(error="int8")), "fp16": memory(Choice(error="fp16"))}
    for t, grad in enumerate(grads):
        for cell in (exact, *cells.values()):
            step(cell, grad, t)
    norm = exact.store.error.norm()
    for name, most in (("int8", 0.03), ("fp16", 0.002)):
        store = cells[name].store
        assert isinstance(store, Rounded) and isinstance(exact.store, Exact)
        assert (store.read() - exact.store.error).norm() < most * norm
        assert store.squared_norm().sqrt() == pytest.approx(float(norm), rel=0.01)
        index = torch.tensor([0, 17, 900])
        assert torch.equal(store.read(index), store.read().index_select(1, index))
    assert cells["int8"].error_bytes() < 0.255 * exact.error_bytes()
    assert cells["fp16"].error_bytes() < 0.505 * exact.error_bytes()


@pytest.mark.parametrize("compressor", ["block", "topk", "sign", "int8", "lowrank"])
def test_what_is_left_is_less_than_what_went_in(compressor: str) -> None:
    """Contraction, on average over a round of the block."""
    length = 6 * 1024
    cell = memory(Choice(compressor, error="none"), length, [(0, 64, 96)])
    grad = torch.randn(length, generator=torch.Generator().manual_seed(0))
    left = [float((grad - step(cell, grad, t)).square().sum() / grad.square().sum()) for t in range(10)]
    assert sum(left) / len(left) < 0.97


def test_low_rank_is_exact_for_a_low_rank_matrix() -> None:
    cell = memory(Choice("lowrank", rank=3, error="exact"), 6 * 1024, [(0, 64, 90)])
    made = torch.Generator().manual_seed(0)
    matrix = torch.randn(64, 2, generator=made) @ torch.randn(2, 90, generator=made)
    grad = torch.zeros(6 * 1024)
    grad[: 64 * 90] = matrix.view(-1)
    for t in range(2):
        torch.testing.assert_close(step(cell, grad, t), grad, rtol=0, atol=2e-5)
    assert torch.equal(orthogonalised(torch.zeros(5, 2)), torch.zeros(5, 2))


def test_every_block_has_its_turn_once_a_round_in_another_order() -> None:
    for blocks in (1, 7, 10, 100):
        rounds = [
            [int(shuffled(torch.tensor(r * blocks + i), blocks, 9)) for i in range(blocks)] for r in range(6)
        ]
        assert all(sorted(order) == list(range(blocks)) for order in rounds)
        assert blocks < 7 or len({tuple(order) for order in rounds}) == 6
    first = [int(shuffled(torch.tensor(10 * r), 10, 4)) for r in range(2000)]
    assert all(120 < first.count(block) < 290 for block in range(10))
    assert int(shuffled(torch.tensor(3), 99, 1)) != int(shuffled(torch.tensor(3), 99, 2))


def test_signs_are_fixed_and_fair() -> None:
    drawn = signs(200, 256, 42)
    assert drawn[:2, :8].tolist() == signs(7, 256, 42)[:2, :8].tolist()
    assert set(drawn.unique().tolist()) == {-1.0, 1.0} and abs(drawn.mean()) < 0.02
    assert (drawn[1:] * drawn[:-1]).mean().abs() < 0.02 and not torch.equal(drawn, signs(200, 256, 43))


@pytest.mark.parametrize(("length", "shards"), [(1024, 4), (7 * 1024, 2), (300 * 1024, 3)])
def test_shards_do_not_depend_on_zero1(length: int, shards: int) -> None:
    grid = Grid.fit(length, shards)
    padded = -(-length // (1024 * shards)) * 1024 * shards
    assert grid.shards * grid.shard == padded and 1024 % grid.unit == 0
    flat = torch.arange(float(length))
    assert torch.equal(grid.flat(grid.view(flat)), flat)


@pytest.mark.parametrize("ratio", [0.5, 0.1, 0.03, 0.01])
@pytest.mark.parametrize("shards", [2, 8])
def test_a_block_is_the_share_asked_for(ratio: float, shards: int) -> None:
    """Within 1 %, in buckets as long as the benchmark model's and in one that padding makes 1 % longer."""
    for length in (8_388_608, 8_260_608, 300_032):
        grid = Grid.fit(length, shards, ratio)
        block = Block(grid, ratio, 1)
        whole = grid.shards * grid.shard if length < 1e6 else length
        assert shards * block.size * grid.unit == pytest.approx(ratio * whole, rel=0.01)
        assert block.blocks == -(-grid.units // block.size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compressor", ["block", "topk", "sign", "int8", "lowrank"])
def test_nothing_is_lost_but_in_the_store(compressor: str, dtype: torch.dtype) -> None:
    """What was sent and what is remembered add up to all gradients, with rounding on the wire too."""
    cell = memory(Choice(compressor, error="exact"))
    total, sent = torch.zeros(LENGTH), torch.zeros(LENGTH)
    for t, grad in enumerate(gradients(12)):
        grad[cell.matrices[-1][1] * cell.matrices[-1][2] :] = 0
        talk = Talk(cell, cell.feed(grad, torch.tensor(t), dtype), Group())
        while not talk.advance():
            pass
        talk.commit(TRUE)
        total, sent = total + grad, sent + talk.reduced.float()
    torch.testing.assert_close(sent + cell.store.error.view(-1)[:LENGTH], total, rtol=0, atol=5e-5)
    assert sent.norm() > 0.1 * total.norm() and cell.store.error.norm() > 0.001 * total.norm()
