"""Plug-ins by kind and name.

A plug-in is a class or function registered under a kind (`optim`, `reduce`, `method`, `objective`, `guard`,
`schedule`, `sink`) and a name. HLAT's own are imported on first look-up; another package adds its own through
the entry point group `hlat.plugins`, whose entries name modules that call `register` when imported.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar

from hlat.errors import UserError

KINDS = ("optim", "reduce", "method", "objective", "guard", "schedule", "sink")
_BUILTIN = {
    "optim": "hlat.optim",
    "reduce": "hlat.reduce",
    "method": "hlat.method",
    "objective": "hlat.objective",
    "guard": "hlat.train.guard",
    "schedule": "hlat.optim.schedule",
    "sink": "hlat.observe.sinks",
}
_registered: dict[tuple[str, str], Any] = {}
_plugins_loaded = False
T = TypeVar("T")


def register(kind: str, name: str) -> Callable[[T], T]:
    """Decorator that files a class or function under (kind, name). Raises ValueError for an unknown kind or a
    taken name.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown plug-in kind {kind!r}; known: {', '.join(KINDS)}")

    def add(item: T) -> T:
        known = _registered.get((kind, name))
        if known is not None and getattr(known, "__module__", None) != getattr(item, "__module__", None):
            raise ValueError(f"{kind} {name!r} is already registered by {known.__module__}")
        _registered[kind, name] = item
        return item

    return add


def lookup(kind: str, name: str, where: str = "") -> Any:
    """The plug-in registered as (kind, name). Raises UserError with the nearest known name."""
    _load(kind)
    if (kind, name) not in _registered:
        known = names(kind)
        raise UserError(f"unknown {kind} {name!r}", where=where, fix=did_you_mean(name, known))
    return _registered[kind, name]


def names(kind: str) -> list[str]:
    """All names registered for a kind, sorted."""
    _load(kind)
    return sorted(name for registered_kind, name in _registered if registered_kind == kind)


def options_of(plugin: Any) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a plug-in: the options a recipe section may set."""
    parameters = inspect.signature(plugin).parameters
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def did_you_mean(name: str, known: list[str]) -> str:
    """'did you mean X?' for the nearest known name, else the list of known names."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def _load(kind: str) -> None:
    global _plugins_loaded
    if kind not in KINDS:
        raise ValueError(f"unknown plug-in kind {kind!r}; known: {', '.join(KINDS)}")
    importlib.import_module(_BUILTIN[kind])
    if not _plugins_loaded:
        _plugins_loaded = True
        for entry in entry_points(group="hlat.plugins"):
            entry.load()
