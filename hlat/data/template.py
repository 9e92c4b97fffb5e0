"""Prompt templates: text with {field} placeholders and nothing else of Python's format language."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hlat.data.quoted import Quoted


@dataclass(frozen=True)
class Template:
    """A parsed template: pairs of literal text and the field that follows it (None at the end)."""

    parts: tuple[tuple[str, str | None], ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields it names, in order of their first use."""
        return tuple(dict.fromkeys(field for _, field in self.parts if field is not None))

    @property
    def literals(self) -> str:
        """The text of its own, without the fields."""
        return "\0".join(literal for literal, _ in self.parts)

    def render(self, record: Mapping[str, Any]) -> str | None:
        """The text for one record; None if a field is missing or neither text nor a number."""
        filled = self.fill(record)
        return None if filled is None else filled.text

    def fill(self, record: Mapping[str, Any]) -> Quoted | None:
        """The same, with the fields quoted.

        Only whole values are put in: no attribute, index or format of a value can be asked for, and a value
        that itself holds braces is not looked at again.
        """
        values = {field: field_text(record, field) for field in self.fields}
        if any(value is None for value in values.values()):
            return None
        pairs = ((Quoted(own), Quoted.of(values[field] or "" if field else "")) for own, field in self.parts)
        return Quoted.joined(part for pair in pairs for part in pair)


def parse_template(text: str) -> Template:
    """A template from its text; {{ and }} are braces. Raises ValueError for anything but plain names."""
    parts: list[tuple[str, str | None]] = []
    for literal, field, form, conversion in string.Formatter().parse(text):
        if field is not None and (not field.isidentifier() or form or conversion):
            whole = field + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise ValueError(f"{{{whole}}} is not a plain field name")
        parts.append((literal, field))
    return Template(tuple(parts))


def field_text(record: Mapping[str, Any], field: str) -> str | None:
    """A field of a record as text: a text as it is, a number as Python writes it; else None."""
    value = record.get(field)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return str(value)
