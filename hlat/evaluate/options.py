"""What a task of the harness asks of a generation, as `Team.generate` takes it.

The harness's own function settles what its options mean together (a temperature without `do_sample` is a wish
to sample, `do_sample: false` beats a temperature, four names for the length), so that every model of the
harness reads a task alike. Values are taken, and refused, as `transformers` does it for its `hf` model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hlat.checkpoint.hf_generation import DRAWING, RULES, rules_of
from hlat.checkpoint.hf_schema import GenerationFields, checked
from hlat.errors import UserError

NEW_TOKENS = 256
"""Tokens generated where a task does not say."""
TOP_K = 50
"""Ids that are drawn from where neither the task nor the model's files say: the default of `transformers`."""
_WHERE = "generation_kwargs of a task"
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN = ("until", "do_sample", *_LENGTHS, *DRAWING, *RULES)
# Options of `transformers` that ask for nothing with these values.
_NOTHING: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "num_beam_groups": 1,
    "length_penalty": 1,
    "early_stopping": False,
    "use_cache": True,
}


@dataclass(frozen=True)
class Generation:
    """stops: strings that end a text. options: of `Team.generate`. shortened: whether the model's context has
    no room for as many tokens as the task wanted.
    """

    stops: list[str]
    options: dict[str, Any]
    shortened: bool


def read_generation(given: Mapping[str, Any], longest: int, defaults: Mapping[str, Any]) -> Generation:
    """A task's generation arguments.

    Args:
        longest: the model's max_seq_len; half of it stays for the prompt where a task wants more.
        defaults: the model's generation_config.json; its `top_k`, `top_p`, `min_p`, `typical_p` and RULES
            hold where the task has none.

    Raises UserError for an option that is not supported, or a value that `transformers` refuses.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    _check_known(given)
    wanted = {key: value for key, value in given.items() if value is not None or key in ("top_k", "top_p")}
    for key in (*_LENGTHS, "min_new_tokens"):
        if key in wanted:
            wanted[key] = _whole(key, wanted[key])
    if "temperature" in wanted:
        wanted["temperature"] = _checked(wanted["temperature"], None, None)["temperature"]
    settled = dict(normalize_gen_kwargs(wanted, NEW_TOKENS))
    stops = [text for text in settled["until"] if text is not None]
    if bad := [text for text in stops if not isinstance(text, str)]:
        raise UserError(f"until {bad[0]!r} is no text", where=_WHERE, fix="put it in quotes")
    count = int(settled["max_gen_toks"])
    if count < 1:
        raise UserError(f"max_gen_toks {count} is out of range", where=_WHERE, fix="write 1 or more")
    shortened = count >= longest
    options: dict[str, Any] = {"max_new_tokens": longest // 2 if shortened else count}
    if settled.get("min_new_tokens", 0) > 0:
        options["min_new_tokens"] = settled["min_new_tokens"]
    if rules := _rules(given, defaults):
        options["rules"] = rules
    usual = TOP_K if defaults.get("top_k") is None else defaults["top_k"]
    top_p = settled.get("top_p", defaults.get("top_p"))
    rest = [settled.get(key, defaults.get(key)) for key in ("min_p", "typical_p")]
    sampling = _checked(settled.get("temperature"), settled.get("top_k", usual), top_p, *rest)
    if settled["do_sample"] and sampling["temperature"] > 0:
        often = ("temperature", "top_k", "top_p")
        options |= {key: value for key, value in sampling.items() if key in often or value is not None}
    return Generation([text for text in stops if text], options, shortened)


def _check_known(given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        nothing = value is None or (key in _NOTHING and value == _NOTHING[key])
        if key not in _KNOWN and not nothing:
            what = f"generation option {key!r} is not supported"
            raise UserError(what, where=_WHERE, fix=f"there are: {', '.join(_KNOWN)}")


def _rules(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The task's rules, and those of the model's files that it does not change."""
    own = {key: given[key] for key in RULES if key in given and key != "min_new_tokens"}
    checked(GenerationFields, own, _WHERE)
    usual = rules_of(defaults)
    if given.get("min_new_tokens") is not None:  # which stands for min_length too
        usual, own = ({k: v for k, v in part.items() if k[:4] != "min_"} for part in (usual, own))
    return {key: value for key, value in {**usual, **own}.items() if value is not None}


def _checked(temperature: Any, top_k: Any, top_p: Any, *rest: Any) -> dict[str, Any]:
    from hlat.evaluate.sampling import check_sampling

    return check_sampling(temperature, top_k, top_p, _WHERE, *rest)


def _whole(name: str, value: Any) -> int:
    """A number of tokens; one with a fraction loses it, as in the harness."""
    try:
        return int(float(value)) if isinstance(value, str) else int(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name} {value!r} is no number", where=_WHERE, fix="write 1 or more") from None
