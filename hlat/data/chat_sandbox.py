"""Jinja's sandbox for chat templates, with what `transformers` offers them.

Templates are programs in Jinja's language, written by whoever published the model. They see nothing but the
messages and the tokenizer's special tokens. Imported by the process that runs them alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from functools import cache
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hlat.errors import UserError

OLDEST = (3, 1, 6)  # older ones have known ways out of the sandbox


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` of `transformers`: JSON, without the escapes that HTML needs."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class Generation(Extension):
    """`{% generation %}` … `{% endgeneration %}` says which text the assistant makes."""

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        """The block as a call of `_show`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_show"), [], [], body).set_lineno(line)

    def _show(self, caller: Callable[[], str]) -> str:
        before, after = self.environment.generated  # type: ignore[attr-defined]
        return f"{before}{caller()}{after}"


class Names(jinja2.utils.Namespace):
    """What a template stores; names that Python gives a meaning to are none of its business."""

    def __init__(*args: Any, **names: Any) -> None:
        for name in dict(*args[1:], **names):
            Names.check(name)
        jinja2.utils.Namespace.__init__(*args, **names)

    def __setitem__(self, name: str, value: Any) -> None:
        Names.check(name)
        super().__setitem__(name, value)

    @staticmethod
    def check(name: Any) -> None:
        """Raise SecurityError for a name that begins with an underscore."""
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a template may not store {name!r}")


class Dicts:
    """`dict` without anything else of the type."""

    def __call__(self, *args: Any, **names: Any) -> dict[Any, Any]:
        return dict(*args, **names)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(*args)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


@cache
def sandbox(now: Callable[[], datetime], generated: tuple[str, str] = ("", "")) -> Any:
    """The environment.

    Args:
        now: what `strftime_now` takes for the present.
        generated: what stands before and after the text of `{% generation %}`.

    Raises UserError for a Jinja whose sandbox is known to leak.
    """
    if tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdecimal()) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        what = f"Jinja {jinja2.__version__} cannot keep a chat template in its sandbox"
        raise UserError(what, fix=f"run: pip install 'jinja2>={oldest}'")
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.extend(generated=generated)
    made.filters["tojson"] = to_json
    made.globals |= {"namespace": Names, "raise_exception": _refuse, "dict": Dicts()}
    made.globals["strftime_now"] = lambda form: now().strftime(form)
    return made
