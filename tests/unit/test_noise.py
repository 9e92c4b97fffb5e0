"""Addressable noise: its values, its statistics, and that every part of a parameter has its part of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hlat.method.noise import Grid, draw_noise, keys_of, name_words, noise, noise_bits, seed_words

NAME = "layers.0.attention.q.weight"
GOLDEN_BITS = [[2521454297, 3485291562], [100029980, 1957371658]]
GOLDEN_NORMAL = [[-0.2311504, -0.4419084, -1.2750641], [1.4092177, 0.9693443, 0.2465057]]
GOLDEN_SIGNS = [1.0, 1.0, -1.0, 1.0, -1.0, 1.0, 1.0, -1.0]


def bits(rows: list[int], columns: list[int], seed: int = 7, step: int = 3, name: str = NAME) -> torch.Tensor:
    keys = keys_of(seed_words(seed), name_words([name]), torch.tensor(step, dtype=torch.int32))
    at = torch.tensor(rows, dtype=torch.int32)[:, None], torch.tensor(columns, dtype=torch.int32)
    high, low = noise_bits(keys[0], *at)
    return high.long() << 16 | low


def reference(row: int, column: int, seed: int, step: int, name: str) -> int:
    """The same bits from Python's integers, written from the description alone."""
    import hashlib

    changes = (0, 0, 0, 0, 0x9E37, 0x79B9, 0x7F4A, 0x7C15)

    def cipher(counter: int, key: list[int], rounds: int) -> list[int]:
        left, right = counter % 65536 ^ key[2], counter // 65536 % 65536 ^ key[3]
        for i in range(rounds):
            product = left * 0x7A35
            assert product < 2**31
            left, right = product // 65536 ^ right ^ key[i % 4] ^ changes[i], product % 65536
        return [left, right]

    def new_key(counter: int, key: list[int]) -> list[int]:
        return cipher(counter, key, 8) + cipher(counter, [key[0] ^ 0x6A09, *key[1:]], 8)

    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") ^ seed
    key = [digest >> shift & 0xFFFF for shift in (48, 32, 16, 0)]
    high, low = cipher(column, new_key(row, new_key(step, key)), 7)
    return high << 16 | low


def test_bits_are_those_of_plain_integers() -> None:
    rows, columns = [0, 1, 70_000, 2**31 - 1], [0, 1, 65_536, 2**31 - 1]
    for seed, step, name in ((7, 3, NAME), (2**64 - 1, 2**31 - 1, "0")):
        found = bits(rows, columns, seed, step, name)
        wanted = [[reference(r, c, seed, step, name) for c in columns] for r in rows]
        assert found.tolist() == wanted


def test_known_values() -> None:
    """A changed function would make a resumed run walk other ways."""
    assert bits([0, 70_000], [0, 1]).tolist() == GOLDEN_BITS
    found = noise(7, NAME, (2, 3), step=3)
    assert torch.allclose(found, torch.tensor(GOLDEN_NORMAL), rtol=0, atol=1e-6)
    assert noise(7, "a", (8,), kind="rademacher", draw=1).tolist() == GOLDEN_SIGNS


def test_normal_values_are_within_1e_6_of_exact_arithmetic() -> None:
    x = noise(1, "w", (300, 1000)).double().numpy()
    word = bits(list(range(300)), list(range(1000)), 1, 0, "w").numpy()
    uniform = ((word >> 12) + 0.5) / 2**20
    angle = ((word & 4095) - 2047.5) * (math.pi / 4096)
    assert np.abs(x - np.sqrt(-2 * np.log(uniform)) * np.sin(angle)).max() <= 1e-6


@pytest.mark.parametrize("shape", [(1000, 1000), (1_000_000,), (1_000_000, 1), (1000, 10, 100)])
def test_moments_of_the_normal(shape: tuple[int, ...]) -> None:
    """Within 4.5 standard errors of a million independent draws."""
    x = noise(3, "w", shape).double().flatten()
    assert abs(x.mean()) < 4.5e-3
    assert abs(x.var() - 1) < 4.5e-3 * math.sqrt(2)
    assert abs((x**3).mean()) < 4.5e-3 * math.sqrt(15)
    assert abs((x**4).mean() - 3) < 4.5e-3 * math.sqrt(96)
    counts = torch.histc(x, 40, -4, 4)
    edges = torch.linspace(-4, 4, 41, dtype=torch.float64)
    wanted = 1e6 * torch.special.ndtr(edges).diff()
    assert ((counts - wanted).square() / wanted).sum() < 85  # chi squared, 39 degrees: 1 in 30,000


@pytest.mark.parametrize("kind", ["normal", "rademacher"])
def test_neighbours_in_every_direction_are_uncorrelated(kind) -> None:
    """Rows, columns, steps, draws, names, seeds: 4.5 standard errors of 250,000 pairs are 0.009."""
    a = noise(0, "w", (500, 500), step=5, kind=kind)
    others = [
        a.roll(1, 0),
        a.roll(1, 1),
        a.roll((1, 1), (0, 1)),
        a.T,
        noise(0, "w", (500, 500), step=6, kind=kind),
        noise(0, "w", (500, 500), step=5, draw=1, kind=kind),
        noise(1, "w", (500, 500), step=5, kind=kind),
        noise(1 << 48, "w", (500, 500), step=5, kind=kind),
        noise(0, "v", (500, 500), step=5, kind=kind),
    ]
    for other in others:
        assert abs((a * other).mean()) < 0.009
        assert abs((a.square() * other.square()).mean() - 1) < 0.02
    assert abs(a.mean()) < 0.009


def test_each_input_bit_turns_each_output_bit_half_of_the_time() -> None:
    columns = torch.arange(60_000, dtype=torch.int32)
    base = bits([5], columns.tolist())
    for bit in range(20):
        turned = base ^ bits([5], (columns ^ (1 << bit)).tolist())
        share = torch.stack([(turned >> i & 1).float().mean() for i in range(32)])
        assert (share - 0.5).abs().max() < 0.0145  # 5 standard errors; each pair is there twice


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_rectangle_has_its_part_of_the_whole(data) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    offset = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    size = tuple(data.draw(st.integers(0, n - o)) for n, o in zip(shape, offset, strict=True))
    kind = data.draw(st.sampled_from(["normal", "rademacher"]))
    whole = noise(11, "w", shape, kind=kind)
    box = tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))
    assert torch.equal(noise(11, "w", shape, offset=offset, size=size, kind=kind), whole[box])


@pytest.mark.parametrize("elements", [1, 7, 30, 1000, 0])
def test_chunks_cover_the_rectangle_once(elements: int) -> None:
    grid, seen = Grid((40, 30), (3, 4), (20, 25)), torch.zeros(20, 25, dtype=torch.int)
    for rows, columns in grid.chunks(elements):
        block = seen[rows, columns]
        assert not elements or block.numel() <= elements
        block += 1
    assert seen.eq(1).all()


def test_columns_beyond_16_bits_differ() -> None:
    x = noise(0, "w", (200_000,), offset=(0,), size=(200_000,))
    assert len(x.unique()) > 150_000 and not torch.equal(x[:60_000], x[65_536:125_536])


def test_a_rectangle_outside_is_refused() -> None:
    with pytest.raises(ValueError, match="does not lie in a parameter of"):
        Grid((4, 4), (2, 0), (3, 4))
    with pytest.raises(ValueError, match="does not lie"):
        Grid((4, 4), (0,), (4,))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_agrees() -> None:
    assert torch.equal(
        noise(1, "w", (99, 999), kind="rademacher", device="cuda").cpu(),
        noise(1, "w", (99, 999), kind="rademacher"),
    )
    assert (noise(1, "w", (99, 999), device="cuda").cpu() - noise(1, "w", (99, 999))).abs().max() <= 1e-6


def test_compiled_noise_is_the_same() -> None:
    keys = keys_of(seed_words(0), name_words(["w"]), torch.tensor(0, dtype=torch.int32))[0]
    index = Grid((50, 60)).indices(slice(0, 50), slice(0, 60))
    found = torch.compile(draw_noise, dynamic=True)(keys, *index)
    assert (found - draw_noise(keys, *index)).abs().max() <= 1e-6
