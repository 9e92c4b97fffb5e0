"""The base of every recipe section: strict, frozen, closed, and described by its attributes' docstrings.

Strict means that a text is never taken for a number nor a number for a flag. Two conveniences are kept
because YAML makes them natural: a whole-numbered float (`1e6`) is an integer, and a list is stored as a
tuple.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


def whole(value: Any) -> Any:
    """1e6 as 1000000: `int` fields take a float without a fraction."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# The range comes before the validator: only then does it reach the JSON schema.
Positive = Annotated[int, Field(ge=1), BeforeValidator(whole)]
NonNegative = Annotated[int, Field(ge=0), BeforeValidator(whole)]
Seed = Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(whole)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]


def tuples(value: Any) -> Any:
    """`value` with every list, at any depth, as a tuple."""
    if isinstance(value, list | tuple):
        return tuple(tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: tuples(item) for key, item in value.items()}
    return value


class Section(BaseModel):
    """One section of a recipe. Raises pydantic's ValidationError; `hlat.recipe.load` makes one line of it."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _lists_as_tuples(cls, data: Any) -> Any:
        return tuples(data) if isinstance(data, dict) else data


class PluginSection(Section):
    """A section whose `name` picks a plug-in; the keys it does not declare are that plug-in's own options."""

    model_config = ConfigDict(extra="allow")
    name: Text

    @property
    def options(self) -> dict[str, Any]:
        """The plug-in's options: its keyword arguments, without the keys every plug-in of the kind shares."""
        return dict(self.__pydantic_extra__ or {})


def problem(what: str, key: str, fix: str, **values: Any) -> PydanticCustomError:
    """A validation error with the key it belongs to (relative to its section) and its fix.

    Args:
        what: the fact, with {placeholders} for `values`; no text from a file belongs in the template itself.
        key: dotted key below the section that raises it; "" for the section itself.
        fix: what to write instead.
    """
    return PydanticCustomError("recipe", what, {**values, "key": key, "fix": fix})  # type: ignore[arg-type]


def near_multiple(value: int, factor: int) -> int:
    """The positive multiple of `factor` nearest to `value`."""
    return max(factor, round(value / factor) * factor)


def nearest_divisor(total: int, wanted: int) -> int:
    """The divisor of `total` nearest to `wanted`."""
    divisors = (n for n in range(1, total + 1) if total % n == 0)
    return min(divisors, key=lambda n: (abs(n - wanted), n))
