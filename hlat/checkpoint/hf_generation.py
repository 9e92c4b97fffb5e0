"""What generation_config.json asks for: what HLAT does of it, and what it leaves out and names.

`transformers` heeds the whole file, also in `generate(do_sample=False)`. Here every setting that changes
which token follows is done alike, but for the few of `_LEFT_OUT`: those are named where text is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hlat.checkpoint.hf_schema import GenerationFields, SpecialIds, checked

FILE = "generation_config.json"
RULES = (
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "min_length",
    "min_new_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
)
"""Settings that hold however a token is chosen; `hlat.evaluate.rules` does them."""
DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
"""Settings that hold where tokens are drawn."""
# The values that ask for nothing, beside null. Without beams, length_penalty and early_stopping do nothing.
_LEFT_OUT: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "sequence_bias": (),
    "exponential_decay_length_penalty": (),
    "constraints": (),
    "force_words_ids": (),
    "dola_layers": (),
    "watermarking_config": (),
    "stop_strings": (),
    "max_time": (),
    "token_healing": (False,),
}
_LEFT_OUT_DRAWING: dict[str, tuple[Any, ...]] = {"top_h": (), "epsilon_cutoff": (0,), "eta_cutoff": (0,)}


def generation_stops(meta: Mapping[str, Any]) -> set[int]:
    """End-of-text ids that the files of an imported model name, also of one that was trained on since;
    `meta` is a checkpoint's. Raises UserError for ids that are none.
    """
    kept = _kept(meta)
    ids: set[int] = set()
    for part, file in (("config", "config.json"), ("generation_config", FILE)):
        ids.update(checked(SpecialIds, _object(kept.get(part)), file).eos_token_id or ())
    return {index for index in ids if index >= 0}


def generation_defaults(meta: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json of an imported model, also of one that was trained on since. Raises UserError
    for a setting of a wrong type.
    """
    found = _object(_kept(meta).get("generation_config"))
    checked(GenerationFields, found, FILE)
    return dict(found)


def rules_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of RULES that are given."""
    return {key: settings[key] for key in RULES if settings.get(key) is not None}


def left_out(settings: Mapping[str, Any], drawn: bool) -> list[str]:
    """Names of the settings that ask for something that HLAT does not do.

    Args:
        drawn: whether tokens are drawn, not the most likely taken.
    """
    wanted = {**_LEFT_OUT, **(_LEFT_OUT_DRAWING if drawn else {})}
    given = ((key, settings.get(key)) for key in wanted)
    return [key for key, value in given if value is not None and value not in wanted[key]]


def left_out_line(names: list[str]) -> str:
    """What is said of them."""
    return f"{FILE}: {', '.join(names)} {'is' if len(names) == 1 else 'are'} ignored"


def _object(value: Any) -> Any:
    return {} if value is None else value


def _kept(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    kept = meta.get("huggingface") or (meta.get("provenance") or {}).get("files", {})
    return kept if isinstance(kept, dict) else {}
