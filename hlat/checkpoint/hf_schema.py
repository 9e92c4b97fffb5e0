"""What the JSON files of a Hugging Face folder must hold: every field that HLAT uses, with its type.

A file is checked whole before any of it is used; what is wrong is one line with the file and the key. Keys
that are not listed here are kept or ignored, never looked into.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hlat.errors import UserError
from hlat.section import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat

LARGEST = 1 << 28  # bytes of a JSON file: an index of 100,000 tensors has 10 MB
_SHOWN = 60

Fields = TypeVar("Fields", bound=BaseModel)


def _number_or_list(value: Any) -> Any:
    return value if isinstance(value, list) or value is None else [value]


Id = Annotated[int, Field(ge=-1, lt=1 << 31)]
"""-1 stands for none, as in the first Llama's files."""
Ids = Annotated[list[Id], BeforeValidator(_number_or_list)]
_ONE_ID, _IDS = "a token id or null", "a token id, a list of them, or null"
_LIST, _COUNT = "a list of token ids or null", "a whole number of 0 or more, or null"
_ROPE = 'an object such as {"rope_type": "default", "rope_theta": 10000.0}, or null'
_SHARE = "a number from 0 to 1, or null"


class _Open(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class Rope(_Open):
    """`rope_scaling` and `rope_parameters`."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: PositiveFloat | None = None
    partial_rotary_factor: float | None = None

    @property
    def kind(self) -> str:
        """The rule by which positions are scaled; `default`: none."""
        return self.rope_type or self.type or "default"


class SpecialIds(_Open):
    """Ids of special tokens, which config.json and generation_config.json both name."""

    bos_token_id: Id | None = Field(None, description=_ONE_ID)
    eos_token_id: Ids | None = Field(None, description=_IDS)
    pad_token_id: Id | None = Field(None, description=_ONE_ID)


class LlamaFields(SpecialIds):
    """config.json; absent keys have the defaults of `LlamaConfig`."""

    model_type: str = Field(description="a text")
    architectures: list[str] | None = Field(None, description="a list of texts or null")
    num_hidden_layers: Positive = Field(description="a whole number of 1 or more")
    hidden_size: Positive = Field(description="a whole number of 1 or more")
    num_attention_heads: Positive = Field(description="a whole number of 1 or more")
    num_key_value_heads: Positive | None = Field(None, description="a whole number of 1 or more, or null")
    intermediate_size: Positive = Field(description="a whole number of 1 or more")
    vocab_size: Positive = Field(description="a whole number of 1 or more")
    max_position_embeddings: Positive = Field(2048, description="a whole number of 1 or more")
    head_dim: Positive | None = Field(None, description="a whole number of 1 or more, or null")
    rms_norm_eps: PositiveFloat = Field(1e-6, description="a number above 0")
    initializer_range: PositiveFloat = Field(0.02, description="a number above 0")
    rope_theta: PositiveFloat | None = Field(None, description="a number above 0, or null")
    rope_scaling: Rope | None = Field(None, description='an object such as {"rope_type": "default"}, or null')
    rope_parameters: Rope | None = Field(
        None, description='an object such as {"rope_type": "default", "rope_theta": 10000.0}, or null'
    )
    partial_rotary_factor: float | None = Field(None, description="a number or null")
    tie_word_embeddings: bool = Field(False, description="true or false")
    attention_bias: bool = Field(False, description="true or false")
    mlp_bias: bool = Field(False, description="true or false")
    hidden_act: str = Field("silu", description="a text")
    quantization_config: dict[str, Any] | None = Field(None, description="an object or null")
    transformers_weights: str | None = Field(None, description="the name of a file or null")


class GenerationFields(SpecialIds):
    """generation_config.json, as far as HLAT heeds it."""

    do_sample: bool | None = Field(None, description="true, false or null")
    temperature: Annotated[float, Field(ge=0)] | None = Field(
        None, description="a number of 0 or more, or null"
    )
    top_k: NonNegative | None = Field(None, description=_COUNT)
    top_p: NonNegativeFloat | None = Field(None, description=_SHARE)
    min_p: Fraction | None = Field(None, description=_SHARE)
    typical_p: PositiveFloat | None = Field(None, description="a number above 0, or null")
    repetition_penalty: PositiveFloat | None = Field(None, description="a number above 0, or null")
    no_repeat_ngram_size: NonNegative | None = Field(None, description=_COUNT)
    min_length: NonNegative | None = Field(None, description=_COUNT)
    min_new_tokens: NonNegative | None = Field(None, description=_COUNT)
    bad_words_ids: list[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]] | None = Field(
        None, description="a list of lists of token ids, or null"
    )
    suppress_tokens: list[int] | None = Field(None, description=_LIST)
    begin_suppress_tokens: list[int] | None = Field(None, description=_LIST)
    forced_bos_token_id: NonNegative | None = Field(None, description=_ONE_ID)
    forced_eos_token_id: (
        Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(_number_or_list)] | None
    ) = Field(None, description=_IDS)


class IndexFields(_Open):
    """model.safetensors.index.json."""

    weight_map: dict[str, str] = Field(description="an object with the file of each tensor")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises UserError when it is not one."""
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"has {path.stat().st_size:,} bytes, too many for such a file", where=str(path))
        value = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"not readable JSON ({error})", where=str(path)) from None
    except RecursionError:
        raise UserError("not readable JSON (nested too deeply)", where=str(path)) from None
    if not isinstance(value, dict):
        raise UserError("not a JSON object", where=str(path))
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes indented UTF-8 JSON with a final newline."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        data = text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can only spell out
        data = json.dumps(value, indent=2).encode()
    path.write_bytes(data + b"\n")


def checked(kind: type[Fields], raw: Any, where: str, fix: str = "") -> Fields:
    """The fields of a JSON object. Raises UserError, with the key, for a value that is not what it must be.

    Args:
        where: the file, for messages.
        fix: what to do; default: what the value must be.
    """
    if not isinstance(raw, dict):
        raise UserError("not a JSON object", where=where)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
    except RecursionError:
        raise UserError("nested too deeply", where=where) from None
    key = str(problem["loc"][0])
    if problem["type"] == "missing" and len(problem["loc"]) == 1:
        raise UserError(f"{key} is missing", where=where, fix=fix)
    wanted = kind.model_fields[key].description
    raise UserError(f"{key} is {shown(raw[key])}, not {wanted}", where=where, fix=fix) from None


def shown(value: Any) -> str:
    """A JSON value for a message: short, in ASCII."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError, TypeError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
