"""Every setting of generation_config.json that HLAT does, against transformers' own generate."""

import json
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hlat.checkpoint.hf import HFFolder
from hlat.checkpoint.hf_generation import generation_defaults, left_out, rules_of
from hlat.checkpoint.weights import load_model
from hlat.errors import UserError
from hlat.evaluate.generate import generate
from hlat.evaluate.rules import Rules, Step
from hlat.evaluate.sampling import Sampling, draw

transformers = pytest.importorskip("transformers")

VOCAB, EOS = 17, [3, 5]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"min_length": 9},
    {"min_new_tokens": 7},
    {"suppress_tokens": [1, 2, 400]},
    {"begin_suppress_tokens": list(range(9))},
    {"bad_words_ids": [[4], [3], [7, 8], [1, 2, 9]]},
    {"bad_words_ids": [[a, b] for a in range(17) for b in range(8)]},
    {"forced_eos_token_id": 5},
    {"forced_eos_token_id": [3, 5]},
    {"forced_bos_token_id": 6},
    {"forced_bos_token_id": 6, "begin_suppress_tokens": [0, 1, 2, 4, 7, 9]},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "min_new_tokens": 4, "suppress_tokens": [6]},
    {"temperature": 0.3, "top_k": 4, "top_p": 0.5},
]
PROMPTS = [[1], [1, 6, 6, 2], [4, 9, 4, 9, 4, 9, 16]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("rules") / "hf"
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.6,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(path)
    return theirs, load_model(HFFolder(path))


def expected(model: Any, prompt: list[int], count: int, wanted: dict[str, Any]) -> list[int]:
    """Without the end-of-text id, as HLAT makes them."""
    config = transformers.GenerationConfig(eos_token_id=EOS, pad_token_id=0, **wanted)
    ids = torch.tensor([prompt])
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        do_sample=False,
        max_new_tokens=count,
    )
    new = made[0, len(prompt) :].tolist()
    return new[:-1] if new and new[-1] in EOS else new


def made(model: Any, prompt: list[int], count: int, wanted: dict[str, Any]) -> list[int]:
    return list(generate(model, prompt, max_new_tokens=count, stop=EOS, rules=rules_of(wanted)))


@pytest.mark.parametrize("wanted", [SETTINGS[1], SETTINGS[-2]], ids=["penalty", "several"])
def test_greedy_texts(pair: Any, wanted: dict[str, Any]) -> None:
    theirs, ours = pair
    assert made(ours, PROMPTS[1], 8, wanted) == expected(theirs, PROMPTS[1], 8, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", SETTINGS, ids=lambda wanted: "+".join(wanted) or "none")
def test_greedy_texts_are_those_of_transformers(pair: Any, wanted: dict[str, Any]) -> None:
    theirs, ours = pair
    for prompt in PROMPTS:
        assert made(ours, prompt, 12, wanted) == expected(theirs, prompt, 12, wanted), prompt


@pytest.mark.slow
def test_the_settings_above_change_something(pair: Any) -> None:
    texts = [[made(pair[1], prompt, 12, wanted) for prompt in PROMPTS] for wanted in SETTINGS]
    assert sum(text != texts[0] for text in texts) >= len(SETTINGS) - 3


RULES = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.floats(0.3, 3),
        "no_repeat_ngram_size": st.integers(0, 4),
        "min_length": st.integers(0, 12),
        "min_new_tokens": st.integers(0, 12),
        "suppress_tokens": st.lists(st.integers(0, VOCAB + 3), max_size=5),
        "begin_suppress_tokens": st.lists(st.integers(0, VOCAB - 1), max_size=5),
        "bad_words_ids": st.lists(
            st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3), min_size=1, max_size=8
        ),
        "forced_eos_token_id": st.sampled_from([3, 5, [5, 3]]),
        "forced_bos_token_id": st.integers(0, VOCAB - 1),
    },
)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(wanted=RULES, prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8))
def test_any_settings_together(pair: Any, wanted: dict[str, Any], prompt: list[int]) -> None:
    theirs, ours = pair
    banned = {*wanted.get("suppress_tokens", ()), *wanted.get("begin_suppress_tokens", ())}
    forced = wanted.get("forced_eos_token_id", [])
    forced = {*(forced if isinstance(forced, list) else [forced]), wanted.get("forced_bos_token_id")}
    assume(not banned & forced)  # which transformers refuses
    wanted_ids, found = expected(theirs, prompt, 8, wanted), []
    try:
        for token in generate(ours, prompt, max_new_tokens=8, stop=EOS, rules=rules_of(wanted)):
            found.append(token)
    except UserError as error:  # transformers takes the first of all tokens where each is forbidden
        assert "the rules leave no token" in error.what
        assert wanted_ids[: len(found) + 1] == [*found, 0]
    else:
        assert found == wanted_ids


NONE_LEFT = {"no_repeat_ngram_size": 1, "bad_words_ids": [[0]], "min_new_tokens": 8}


def test_rules_that_leave_no_token_are_told(pair: Any) -> None:
    prompt = [token for token in range(1, VOCAB) if token not in EOS]
    with pytest.raises(UserError, match="the rules leave no token to choose"):
        made(pair[1], prompt, 8, NONE_LEFT)


@pytest.mark.parametrize(
    ("drawing", "name"),
    [
        ({"min_p": 0.2}, "MinPLogitsWarper"),
        ({"typical_p": 0.6}, "TypicalLogitsWarper"),
        ({"typical_p": 0.2}, "TypicalLogitsWarper"),
    ],
)
def test_what_may_be_drawn(drawing: dict[str, float], name: str) -> None:
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(1)) * 2
    kind = getattr(transformers, name, None) or getattr(transformers.generation.logits_process, name)
    allowed = kind(*drawing.values())(torch.zeros(1, 1, dtype=torch.long), logits).isfinite()[0]
    generator = torch.Generator().manual_seed(0)
    drawn = draw(logits.expand(20_000, 30), Sampling(temperature=1.0, **drawing, generator=generator))
    shares = torch.bincount(drawn, minlength=30) / len(drawn)
    wanted = logits[0].masked_fill(~allowed, float("-inf")).softmax(-1)
    assert 0 < allowed.sum() < 30 and not shares[~allowed].any()
    assert (shares - wanted).abs().max() < 0.02


def test_what_is_left_out_is_named() -> None:
    nothing = {"num_beams": 1, "penalty_alpha": 0, "guidance_scale": 1.0, "max_length": 99, "use_cache": True}
    assert left_out({**nothing, "sequence_bias": None, "repetition_penalty": 1.3, "own": 3}, True) == []
    asked = {"num_beams": 4, "penalty_alpha": 0.6, "top_h": 0.4, "watermarking_config": {}}
    assert left_out(asked, False) == ["num_beams", "penalty_alpha", "watermarking_config"]
    assert left_out(asked, True)[-1] == "top_h"


def test_settings_are_checked_wherever_they_come_from() -> None:
    for files in ({"generation_config": {"top_k": "x"}}, {"generation_config": 3}):
        for meta in ({"huggingface": files}, {"provenance": {"files": files}}):
            with pytest.raises(UserError, match=r"generation_config\.json"):
                generation_defaults(json.loads(json.dumps(meta)))


def test_rules_that_leave_nothing(pair: Any) -> None:
    with pytest.raises(UserError, match="leave no token"):
        made(pair[1], [1, 2], 4, {"suppress_tokens": list(range(VOCAB))})


def test_rows_that_are_not_finite_stay_so() -> None:
    rules = Rules({"forced_eos_token_id": 3, "repetition_penalty": 2.0})
    logits = torch.tensor([[float("nan"), 1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 0.0]])
    found = rules.apply(logits, [Step([1], 1, last=True)] * 2)
    assert draw(found, Sampling()).tolist() == [-1, 3]
