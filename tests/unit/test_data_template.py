"""Prompt templates: whole fields go in, nothing else is understood."""

from __future__ import annotations

import pytest

from hlat.data.template import parse_template


def test_template_puts_in_whole_values_only() -> None:
    template = parse_template("{{{q}}} is {n}, {q}")
    assert template.fields == ("q", "n")
    assert template.render({"q": "{n}{0.__class__}", "n": 3}) == "{{n}{0.__class__}} is 3, {n}{0.__class__}"
    assert template.render({"q": "x"}) is None
    for wrong in (None, ["x"], {"a": 1}, True):
        assert template.render({"q": wrong, "n": 1}) is None


@pytest.mark.parametrize(
    "text", ["{q.__class__}", "{q[0]}", "{q!r}", "{q:>9}", "{}", "{0}", "{a b}", "{", "}"]
)
def test_template_refuses_everything_else(text: str) -> None:
    with pytest.raises(ValueError):
        parse_template(text)
