"""The base of every recipe section: strict, frozen, closed, and described by its attributes' docstrings.

Strict means that a text is never taken for a number nor a number for a flag. Two conveniences are kept
because YAML makes them natural: a whole-numbered float (`1e6`) is an integer, and a list is stored as a
tuple.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


def whole(value: Any) -> Any:
    """1e6 as 1000000: `int` fields take a float without a fraction."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _path(text: str) -> str:
    """A text that can be a path on some machine: what is there is seen where it is used."""
    if "\0" in text:
        raise problem("holds a NUL character, which no path can", "", "write the path without it")
    return text


# Above these no machine follows for years to come: a slip of the finger (1e19) is told at once, with its key.
MOST_STEPS, MOST_ROWS, MOST_RANKS, MOST_TOKENS = 10**12, 2**31, 2**20, 2**30
MOST_SECONDS = 10 * 365 * 86400
MOST = 2**53  # what a number in JSON holds exactly
# The range comes before the validator: only then does it reach the JSON schema.
Positive = Annotated[int, Field(ge=1, le=MOST), BeforeValidator(whole)]
NonNegative = Annotated[int, Field(ge=0, le=MOST), BeforeValidator(whole)]
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS), BeforeValidator(whole)]
StepsOrNone = Annotated[int, Field(ge=0, le=MOST_STEPS), BeforeValidator(whole)]
Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS), BeforeValidator(whole)]
Rows = Annotated[int, Field(ge=1, le=MOST_ROWS), BeforeValidator(whole)]
Ranks = Annotated[int, Field(ge=1, le=MOST_RANKS), BeforeValidator(whole)]
Seconds = Annotated[float, Field(gt=0, le=MOST_SECONDS)]
WholeSeconds = Annotated[int, Field(ge=1, le=MOST_SECONDS), BeforeValidator(whole)]
Seed = Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(whole)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e30)]  # fp32 ends at 3e38
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e30)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(_path)]


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
    context = {**values, "key": key, "fix": fix}
    context = {
        name: _encodable(value) if isinstance(value, str) else value for name, value in context.items()
    }
    return PydanticCustomError("recipe", _encodable(what), context)  # type: ignore[arg-type]


def _encodable(text: str) -> str:
    r"""The text with halves of surrogate pairs, which YAML's "\ud800" spells and UTF-8 cannot, spelt out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def near_multiple(value: int, factor: int) -> int:
    """The positive multiple of `factor` nearest to `value`."""
    return max(factor, round(value / factor) * factor)


def divisors(total: int) -> list[int]:
    """All divisors of `total`, ascending; quick for totals far beyond any batch."""
    small = [n for n in range(1, math.isqrt(total) + 1) if total % n == 0]
    return sorted({*small, *(total // n for n in small)})


def nearest_divisor(total: int, wanted: int) -> int:
    """The divisor of `total` nearest to `wanted`."""
    return min(divisors(total), key=lambda n: (abs(n - wanted), n))


def largest_divisor(total: int, most: int) -> int:
    """The largest divisor of `total` that is `most` or less."""
    return max(n for n in divisors(total) if n <= max(1, most))
