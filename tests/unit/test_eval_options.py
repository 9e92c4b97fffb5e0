"""A task's generation arguments mean what the harness and its `hf` model take them for."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hlat.errors import UserError

pytest.importorskip("lm_eval")

from hlat.evaluate.options import NEW_TOKENS, TOP_K, read_generation


def options(given: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    return read_generation(given, 1000, defaults).options


@pytest.mark.parametrize("key", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize(
    ("value", "count"),
    [(None, NEW_TOKENS), (8, 8), ("8", 8), (8.7, 8), (999, 999), (1000, 500), (1e20, 500), ("1e20", 500)],
)
def test_lengths(key: str, value: Any, count: int) -> None:
    found = read_generation({key: value}, 1000, {})
    assert found.options == {"max_new_tokens": count} and found.shortened == (count == 500)


@pytest.mark.parametrize("value", [0, -1, "many", [], math.inf, math.nan, "-inf"])
def test_lengths_that_are_none(value: Any) -> None:
    with pytest.raises(UserError, match="^generation_kwargs of a task: max_gen_toks "):
        options({"max_gen_toks": value})


@pytest.mark.parametrize(
    ("given", "temperature"),
    [
        ({}, 0),
        ({"temperature": 0.0}, 0),
        ({"temperature": None}, 0),
        ({"temperature": 0.7}, 0.7),
        ({"temperature": "0.7"}, 0.7),
        ({"temperature": 1e20}, 1e20),
        ({"do_sample": False, "temperature": 0.7}, 0),
        ({"do_sample": None, "temperature": 0.7}, 0.7),
        ({"do_sample": True, "temperature": 0.7}, 0.7),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": None}, 1.0),
        ({"do_sample": True, "temperature": 0}, 0),
    ],
)
def test_a_temperature_is_a_wish_to_sample(given: dict[str, Any], temperature: float) -> None:
    assert options(given).get("temperature", 0) == temperature
    settled = pytest.importorskip("lm_eval.models.utils").normalize_gen_kwargs
    plain = {key: value for key, value in given.items() if value is not None}
    assert settled(plain)["do_sample"] == (temperature > 0) or given.get("temperature") == 0


def test_what_is_not_said_is_as_in_the_models_files_and_transformers() -> None:
    warm = {"temperature": 1.0}
    assert options(warm)["top_k"] == TOP_K == options(warm, top_k=None)["top_k"]
    assert options({**warm, "top_k": None})["top_k"] is None is options({**warm, "top_k": 0})["top_k"]
    assert options(warm, top_k=7, top_p=0.4)["top_k"] == 7 and options(warm, top_p=0.4)["top_p"] == 0.4
    assert options({**warm, "top_p": 0.9, "top_k": 3}, top_k=7, top_p=0.4) == {
        "max_new_tokens": NEW_TOKENS,
        "temperature": 1.0,
        "top_k": 3,
        "top_p": 0.9,
    }
    assert options({**warm, "top_p": None}, top_p=0.4)["top_p"] is None
    transformers = pytest.importorskip("transformers")
    usual = transformers.GenerationConfig()
    get = getattr(usual, "_get_default_generation_params", lambda: vars(usual))
    assert get()["top_k"] == TOP_K


def test_stops_and_the_least_length() -> None:
    found = read_generation({"until": ["\n", "", None, "Q:"], "min_new_tokens": 4, "num_beams": 1}, 100, {})
    assert found.stops == ["\n", "Q:"] and found.options["min_new_tokens"] == 4
    assert read_generation({"until": "x"}, 9, {}).stops == ["x"]
    assert read_generation({"until": None, "min_new_tokens": -1}, 9, {}).stops == []
    assert "min_new_tokens" not in options({"min_new_tokens": 0, "min_length": 0, "repetition_penalty": 1.0})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_beams": 4}, "generation option 'num_beams' is not supported"),
        ({"penalty_alpha": 0.6}, "generation option 'penalty_alpha' is not supported"),
        ({"min_length": -5}, "min_length is -5, not a whole number"),
        ({"bad_words_ids": [3]}, r"bad_words_ids is \[3\], not a list of lists"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, not a number above 0, or null"),
        ({"temperature": 0.5, "min_p": 2}, "min_p 2 is out of range"),
        ({"seed": 5}, "generation option 'seed' is not supported"),
        ({"until": [3]}, "until 3 is no text"),
        ({"temperature": 0.5, "top_k": -1}, "top_k -1 is out of range"),
        ({"top_k": -1}, "top_k -1 is out of range"),
        ({"temperature": -2}, "temperature -2 is out of range"),
    ],
)
def test_what_is_refused_is_one_line(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=f"^generation_kwargs of a task: {words}"):
        options(given)


def test_rules_of_the_task_come_before_those_of_the_models_files() -> None:
    files = {
        "repetition_penalty": 1.3,
        "min_new_tokens": 3,
        "suppress_tokens": [4],
        "num_beams": 2,
        "min_p": 0.2,
    }
    assert options({}, **files)["rules"] == {
        "repetition_penalty": 1.3,
        "min_new_tokens": 3,
        "suppress_tokens": [4],
    }
    task = {"repetition_penalty": 1.0, "min_new_tokens": 1, "suppress_tokens": None, "min_length": 2}
    found = options(task, **files)
    assert found["rules"] == {"repetition_penalty": 1.0} and found["min_new_tokens"] == 1
    assert options({"min_length": 2})["rules"] == {"min_length": 2}
    warm = options({"temperature": 1.0, "typical_p": 0.9}, **files)
    assert (warm["min_p"], warm["typical_p"]) == (0.2, 0.9)
