"""How a token is drawn: as `transformers` does it, and never one that stands for nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hlat.errors import UserError
from hlat.evaluate.sampling import NOT_FINITE, Sampling, check_sampling, draw, drawable, going_on, only

CPU = torch.device("cpu")


def frequencies(logits: torch.Tensor, draws: int = 4000, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = draw(logits.expand(draws, -1), Sampling(generator=generator, **{"temperature": 1.0, **options}))
    return torch.bincount(drawn, minlength=logits.shape[-1]) / draws


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 1e20},
        {"temperature": 1e-20},
        {"temperature": math.inf},
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": 10**20},
        {"top_p": 1e-9},
        {"top_p": 0.0},
        {"top_p": 0.55},
        {"top_p": 0.999999},
        {"top_k": 4, "top_p": 0.7, "temperature": 1.7},
    ],
)
def test_probabilities_are_those_of_transformers(options: dict[str, Any]) -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    third = 0.5 if "top_p" not in options else 0.6  # as likely as another one: both are among the top three
    logits = torch.tensor([[1.0, -2.0, 0.5, third, 3.0, 0.1, -8.0]])
    scores = logits
    if (heat := options.get("temperature", 1.0)) != 1.0:
        scores = processors.TemperatureLogitsWarper(float(heat))(None, scores)
    if "top_k" in options:
        scores = processors.TopKLogitsWarper(options["top_k"])(None, scores)
    if "top_p" in options:
        scores = processors.TopPLogitsWarper(options["top_p"])(None, scores)
    expected = scores.softmax(-1)[0]
    found = frequencies(logits, **options)
    assert (found[expected == 0] == 0).all() and (found - expected).abs().max() < 0.035  # 4 errors of 4,000


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-30, 5e37])
def test_no_temperature_breaks_a_draw(temperature: float) -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0, float("-inf")]])
    found = frequencies(logits, 200, temperature=temperature)
    assert found[3] == 0 and (temperature > 1 or found[0] == 1)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_that_is_not_finite_gives_no_token_and_leaves_the_others_alone(temperature: float) -> None:
    good = [0.0, 9.0, 1.0]
    rows = torch.tensor(
        [good, [0.0, math.nan, 1.0], [0.0, math.inf, 1.0], [-math.inf] * 3, [-math.inf, 50, 1]]
    )
    drawn = draw(rows, Sampling(temperature, top_p=0.9, generator=torch.Generator().manual_seed(1)))
    assert drawn.tolist() == [1, NOT_FINITE, NOT_FINITE, NOT_FINITE, 1]


def test_ids_beyond_the_tokenizers_are_not_drawn_but_one_that_ends_a_text() -> None:
    allowed = drawable(8, 5, {2, 6}, CPU)
    assert allowed is not None and allowed.tolist() == [True] * 5 + [False, True, False]
    logits = torch.tensor([[0.0, 0, 0, 0, 0, 40, 1, 40]])
    for heat in (0.0, 1.0, math.inf):
        drawn = draw(only(logits.expand(300, -1), allowed), Sampling(heat, generator=torch.Generator()))
        assert not {5, 7} & set(drawn.tolist()) and (heat or set(drawn.tolist()) == {6})
    assert drawable(5, 5, {2}, CPU) is None and drawable(5, 9, (), CPU) is None
    assert going_on(8, allowed, {2, 6}, CPU).tolist() == [True, True, False, True, True, False, False, False]
    assert going_on(3, None, {1, 99}, CPU).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, None, None), (1.0, None, None)),
        ((0.7, 0, 1), (0.7, None, None)),
        (("0.5", 10**20, 1e20), (0.5, 10**20, None)),
        ((1e20, 5, 0), (1e20, 5, 0.0)),
    ],
)
def test_what_changes_nothing_is_off(given: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    found = check_sampling(*given)
    assert tuple(found[key] for key in ("temperature", "top_k", "top_p")) == expected
    assert found["min_p"] is found["typical_p"] is None


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ((-1, None, None), "temperature -1"),
        ((math.nan, None, None), "temperature nan"),
        (("warm", None, None), "temperature 'warm'"),
        ((1.0, -1, None), "top_k -1"),
        ((1.0, 1e20, None), r"top_k 1e\+20"),
        ((1.0, 5.0, None), "top_k 5.0"),
        ((1.0, True, None), "top_k True"),
        ((1.0, None, -1), "top_p -1"),
        ((1.0, None, math.nan), "top_p nan"),
    ],
)
def test_what_transformers_refuses_is_one_line(given: tuple[Any, ...], name: str) -> None:
    with pytest.raises(UserError, match=f"^here: {name} is out of range; write "):
        check_sampling(*given, where="here")
