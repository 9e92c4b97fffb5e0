"""The statistics of `hlat compare` against scipy and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hlat.errors import UserError
from hlat.evaluate.compare import compare_scores, comparison, comparison_table, holm, mcnemar, paired_z


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (5, 5), (1, 9), (12, 3), (0, 6), (40, 61)])
def test_mcnemar(gained: int, lost: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == pytest.approx([1.0, 1.0]) and holm([]) == []


def test_difference_of_means_is_the_paired_test() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    a, b = generator.normal(0, 1, 200), generator.normal(0.2, 1, 200)
    scores = [{i: (float(x), 1.0) for i, x in enumerate(values)} for values in (a, b)]
    found = compare_scores(*scores)
    assert found.value == pytest.approx((b - a).mean()) and found.questions == 200
    assert found.error == pytest.approx(stats.sem(b - a))
    assert found.p == pytest.approx(2 * stats.norm.sf(abs(found.value / found.error)))


def test_error_of_a_ratio_is_that_of_repeated_draws() -> None:
    generator = np.random.default_rng(1)

    def draw() -> tuple[float, float]:
        size = generator.integers(50, 500, 300).astype(float)
        bits = size * generator.normal(1.5, 0.2, 300)
        other = bits - size * generator.normal(0.1, 0.1, 300)
        scores = [
            {i: (float(x), float(s)) for i, (x, s) in enumerate(zip(v, size, strict=True))}
            for v in (bits, other)
        ]
        found = compare_scores(*scores)
        assert found.error is not None
        return found.value, found.error

    draws = np.array([draw() for _ in range(300)])
    assert draws[:, 0].std() == pytest.approx(draws[:, 1].mean(), rel=0.15)  # 300 draws: 4 % error of the std
    assert draws[:, 0].mean() == pytest.approx(-0.1, abs=0.005)


def test_binary_scores_use_the_exact_test() -> None:
    first = {i: (float(i < 10), 1.0) for i in range(20)}
    second = {i: (float(i < 16), 1.0) for i in range(20)}
    assert compare_scores(first, second).p == mcnemar(6, 0) == pytest.approx(2 / 2**6)


def test_degenerate() -> None:
    assert paired_z(0.0, 0.0) == 1.0 and paired_z(1.0, None) == 1.0 and paired_z(1.0, 0.0) == 0.0
    same = {0: (1.0, 1.0)}
    assert compare_scores(same, same).error is None
    with pytest.raises(UserError, match="different questions"):
        compare_scores(same, {1: (1.0, 1.0)})


def results(right: list[int], bits: list[float]) -> dict:
    acc = sum(right) / len(right)
    questions = [{"doc_id": i, "filter": "none", "acc": v} for i, v in enumerate(right)]
    texts = [
        {"doc_id": i, "filter": "none", "bits_per_byte": (-b * math.log(2), 10)} for i, b in enumerate(bits)
    ]
    return {
        "results": {
            "q": {"alias": "q", "acc,none": acc, "acc_stderr,none": 0.1},
            "t": {"bits_per_byte,none": sum(bits) / 10 / len(bits)},
        },
        "samples": {"q": questions, "t": texts},
    }


def test_table() -> None:
    bits = [10.0 + i % 3 for i in range(40)]
    one = results([0] * 20 + [1] * 20, bits)
    two = results([1] * 40, [b - 2 - i % 2 for i, b in enumerate(bits)])
    rows = comparison(["a", "b"], [one, two])
    assert [(row["task"], row["metric"]) for row in rows] == [("q", "acc"), ("t", "bits_per_byte")]
    assert rows[0]["differences"][0]["value"] == pytest.approx(0.5)
    assert rows[1]["differences"][0]["value"] == pytest.approx(-0.25)
    table = comparison_table(["a", "b"], rows)
    assert table[0] == ["task", "metric", "a", "b", "difference", "p"]
    assert all(row[4].endswith("*") for row in table[1:]) and table[1][2] == "0.5000 ± 0.1000"
    same = comparison(["a", "b", "c"], [one, one, two])
    assert [d["p_corrected"] for d in same[0]["differences"]][0] == 1.0
