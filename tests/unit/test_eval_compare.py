"""The statistics of `hlat compare` against scipy and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hlat.errors import UserError
from hlat.evaluate.compare import compare_scores, comparison, comparison_notes, comparison_table
from hlat.evaluate.statistics import holm, interval, mcnemar, ratio, student_p


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
    assert found.p == pytest.approx(stats.ttest_rel(b, a).pvalue)
    few = compare_scores(*({i: score[i] for i in range(3)} for score in scores))
    assert few.p == pytest.approx(stats.ttest_rel(b[:3], a[:3]).pvalue) and few.p > 0.01


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


@pytest.mark.parametrize(("count", "most"), [(2, 0.0), (3, 0.07), (5, 0.07), (10, 0.065), (40, 0.065)])
def test_models_that_do_not_differ_get_a_star_in_one_of_twenty_tables(count: int, most: float) -> None:
    """With a normal law it is 29 % at 2 questions, 19 % at 3 and 9 % at 10; four errors of 2,000 draws are
    2 %.
    """
    generator = np.random.default_rng(count)
    p = []
    for a, b in generator.normal(0, 1, (2000, 2, count)):
        first, second = ({i: (float(x), 1.0) for i, x in enumerate(values)} for values in (a, b))
        p.append(compare_scores(first, second).p)
    share = float(np.mean(np.array(p) < 0.05))
    assert share <= most and (count < 3 or share > 0.03), share


def test_nothing_is_known_of_the_error_of_few_questions() -> None:
    assert student_p(1.0, None, 9) == 1.0 and student_p(0.0, 0.5, 9) == 1.0
    assert student_p(1.0, 1e-9, 2) == 1.0 and student_p(1.0, 1e-9, 3) < 0.05
    assert student_p(1.0, 0.0, 5) == 1.0 and student_p(1.0, 0.0, 6) == 2 / 2**6
    assert student_p(4.302652729911275, 1.0, 3) == pytest.approx(0.05)  # t(0.975) of 2, from a printed table
    same = {0: (1.0, 1.0)}
    assert compare_scores(same, same).error is None
    with pytest.raises(UserError, match="different questions"):
        compare_scores(same, {1: (1.0, 1.0)})


@pytest.mark.parametrize("count", [2, 3, 5, 6, 50])
def test_differences_that_differ_in_their_last_bits_have_no_error(count: int) -> None:
    """0.1 + 0.7 - 0.7 is not 0.1: without a tolerance such noise is an error, and everything significant."""
    first = {i: (0.1 * i, 1.0) for i in range(count)}
    second = {i: (0.1 * i + 0.1, 1.0) for i in range(count)}
    found = compare_scores(first, second)
    assert found.p == (1.0 if count < 6 else 2.0 ** (1 - count))
    assert found.error == (None if count < 6 else 0.0)


def test_an_estimate_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(3).gamma(2, 1, 7)
    pairs = [(float(x), 1.0) for x in values]
    found = ratio(pairs)
    assert found.value == pytest.approx(values.mean()) and found.error == pytest.approx(stats.sem(values))
    low, high = stats.t.interval(0.95, 6, values.mean(), stats.sem(values))
    assert interval(pairs) == pytest.approx((low, high))
    # What the page on evaluation says of these laws.
    assert [round(float(stats.t.ppf(0.975, count - 1)), 2) for count in (3, 10)] == [4.3, 2.26]
    assert round(2 * float(stats.t.sf(stats.norm.ppf(0.975), 9)), 2) == 0.08
    assert interval(pairs[:2]) is None and interval([(2.5, 1.0)] * 9) is None
    assert math.isnan(ratio([(0.0, 0.0)] * 4).value)


@pytest.mark.parametrize(("right", "count"), [(0, 3), (3, 3), (7, 20), (40, 40)])
def test_the_interval_of_a_share_is_wilsons(right: int, count: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(right, count).proportion_ci(0.95, "wilson")
    found = interval([(float(i < right), 1.0) for i in range(count)])
    assert found == pytest.approx(tuple(expected), abs=1e-12)
    assert interval([(1.0, 1.0)] * 2) is None


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
        "hlat": {"notes": {}, "left_out": {}},
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


def test_a_task_without_a_figure_is_compared_with_nothing() -> None:
    one, two = results([1, 0, 1], [9.0, 11.0, 10.0]), results([0, 0, 0], [8.0, 9.0, 9.0])
    two["results"]["q"] |= {"acc,none": None, "acc_stderr,none": None}
    two["hlat"] = {"notes": {"truncated": 3}, "left_out": {"q": "logits are not finite"}}
    rows = comparison(["a", "b"], [one, two])
    assert [row["task"] for row in rows] == ["q", "t"]
    assert rows[0]["values"][1] == {"value": None, "error": None}
    assert {rows[0]["differences"][0][key] for key in ("value", "error", "p", "p_corrected")} == {None}
    assert rows[1]["differences"][0]["p_corrected"] == rows[1]["differences"][0]["p"]  # one row, not two
    table = comparison_table(["a", "b"], rows)
    assert table[1][3:] == ["-", "-", "-"] and "*" not in "".join(table[1])
    notes = comparison_notes(["a", "b"], [one, two])
    assert (
        notes[0].startswith("b: 3 requests longer") and notes[1] == "b: q: no figure: logits are not finite"
    )


def test_a_metric_that_is_no_mean_of_its_scores_is_not_compared() -> None:
    """A perplexity is an exponential of them: their difference is not one of perplexities."""
    one, two = results([1, 0, 1], [9.0, 11.0, 10.0]), results([0, 0, 1], [8.0, 9.0, 9.0])
    for found in (one, two):
        found["results"]["p"] = {"perplexity,none": math.exp(2.0)}
        found["samples"]["p"] = [{"doc_id": i, "filter": "none", "perplexity": -2.0} for i in range(3)]
    assert [row["task"] for row in comparison(["a", "b"], [one, two])] == ["q", "t"]
