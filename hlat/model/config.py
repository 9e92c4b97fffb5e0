"""The shape of a decoder: one frozen object, complete after validation, that needs no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from hlat.model.presets import PRESETS
from hlat.registry import did_you_mean
from hlat.section import (
    Section,
    near_multiple,
    nearest_divisor,
    problem,
    whole,
)

# Bounds a hundred times beyond any model there is: what is larger is a slip, and would only fail later, when
# memory or time runs out.
_Layers = Annotated[int, Field(ge=1, le=10_000), BeforeValidator(whole)]
_Heads = Annotated[int, Field(ge=1, le=100_000), BeforeValidator(whole)]
_Width = Annotated[int, Field(ge=1, le=10_000_000), BeforeValidator(whole)]
_Rows = Annotated[int, Field(ge=1, le=100_000_000), BeforeValidator(whole)]
_Positions = Annotated[int, Field(ge=1, le=20_000_000), BeforeValidator(whole)]
_Classes = Annotated[int, Field(ge=0, le=1_000_000), BeforeValidator(whole)]
_Epsilon = Annotated[float, Field(gt=0, le=1)]
_Theta = Annotated[float, Field(ge=1, le=1e30)]  # powers of what is beyond leave fp32

SHAPE = ("layers", "hidden", "heads", "ffn", "vocab", "max_seq_len")


class ModelConfig(Section):
    """LLaMA-family decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases.

    `preset` fills in every field that is not given; without one the six shape fields are needed and
    `kv_heads` is `heads`. Raises pydantic's ValidationError for a missing field, an unknown preset or an
    impossible shape.
    """

    preset: str | None = None
    """Named shape that fills in the fields not given here: `hlat recipes show` prints the result."""
    layers: _Layers
    """Decoder layers."""
    hidden: _Width
    """Width of the residual stream; a multiple of heads."""
    heads: _Heads
    """Query heads; a multiple of kv_heads."""
    kv_heads: _Heads
    """Key-value heads; fewer than heads is grouped-query attention. Without a preset: heads."""
    ffn: _Width
    """Inner width of the SwiGLU layer."""
    vocab: _Rows
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    max_seq_len: _Positions
    """Longest sequence the model is built for, in tokens."""
    norm_eps: _Epsilon = 1e-5
    """Added to the mean square inside RMSNorm."""
    rope_theta: _Theta = 10000.0
    """Base of the rotary frequencies."""
    tie_embeddings: bool = False
    """Use the embedding matrix as the output head."""
    init_std: Annotated[float, Field(gt=0, le=1e30)] = 0.02
    """Standard deviation of the normal initialisation of every matrix."""
    scaled_init: bool = True
    """Divide that deviation by sqrt(2 layers) for the attention output and the down projection."""
    classes: _Classes = 0
    """Outputs of a linear classifier on the last token's state, beside the head; 0: none. Set by
    objective.by=head to the number of labels.
    """
    attention: Literal["auto", "plain", "flash"] = "auto"
    """Attention kernel: plain matrix products, a fused kernel, or the faster of the two on the device."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        preset = data.get("preset")
        if isinstance(preset, str):
            if preset not in PRESETS:
                fix = did_you_mean(preset, sorted(PRESETS))
                raise problem("unknown preset '{value}'", "preset", fix, value=preset)
            return {**PRESETS[preset], **data}
        if preset is not None:
            fix = f"known: {', '.join(PRESETS)}"
            raise problem("expected the name of a preset, got {value}", "preset", fix, value=repr(preset))
        # A misspelt field is reported as such, not as the missing one it stands for.
        missing = [name for name in SHAPE if name not in data]
        if missing and not set(data) - set(cls.model_fields):
            fix = f"add {'it' if len(missing) == 1 else 'them'}, or a preset: {', '.join(PRESETS)}"
            raise problem("the model has no {missing}", "", fix, missing=", ".join(missing))
        return {"kv_heads": data["heads"], **data} if "heads" in data else data

    @model_validator(mode="after")
    def _divisible(self) -> ModelConfig:
        if self.hidden % self.heads:
            near = near_multiple(self.hidden, 2 * self.heads)  # rotary positions need an even head size
            what = "hidden {a} is not a multiple of heads {b}"
            fix = f"take hidden {near}"
            if self.hidden % 2 == 0:
                fix += f", or heads {nearest_divisor(self.hidden // 2, self.heads)}"
            raise problem(what, "hidden", fix, a=self.hidden, b=self.heads)
        if self.heads % self.kv_heads:
            near = nearest_divisor(self.heads, self.kv_heads)
            what = "heads {a} is not a multiple of kv_heads {b}"
            raise problem(what, "kv_heads", f"take kv_heads {near}", a=self.heads, b=self.kv_heads)
        if self.head_dim % 2:
            near = near_multiple(self.hidden, 2 * self.heads)
            what = "head size {a} (hidden / heads) is odd, and rotary positions need pairs"
            raise problem(what, "hidden", f"take hidden {near}", a=self.head_dim)
        return self

    @property
    def head_dim(self) -> int:
        """Width of one attention head: hidden / heads."""
        return self.hidden // self.heads

    def position_bytes(self) -> int:
        """Bytes that each process needs to make its tables of rotary positions: angles, cosines, sines."""
        return 3 * 4 * self.max_seq_len * (self.head_dim // 2)

    def parameter_count(self) -> int:
        """Number of parameters, a tied head counted once."""
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * self.head_dim
        layer = attention + 3 * self.hidden * self.ffn + 2 * self.hidden
        tables = (1 if self.tie_embeddings else 2) * self.vocab * self.hidden
        return self.layers * layer + tables + self.hidden + self.classes * self.hidden
