"""Every public class, function and method has a docstring, of its own or of the method that it overrides."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def undocumented(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Qualified names of the public definitions in `body` without a docstring of their own."""
    for item in body:
        if not isinstance(item, Definition) or item.name.startswith("_"):
            continue
        name = f"{prefix}{item.name}"
        if not ast.get_docstring(item):
            yield name
        if isinstance(item, ast.ClassDef):
            yield from undocumented(item.body, f"{name}.")


def inherits(module: str, name: str) -> bool:
    """Whether a method has the docstring of one that it overrides."""
    owner, _, method = name.rpartition(".")
    if not owner:
        return False
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return bool(inspect.getdoc(found))


def test_every_public_name_has_a_docstring() -> None:
    missing, modules = [], 0
    for file in sorted((ROOT / "hlat").rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        tree = ast.parse(file.read_text(encoding="utf-8"))
        modules += 1
        missing += [module] if tree.body and not ast.get_docstring(tree) else []
        missing += [f"{module}.{name}" for name in undocumented(tree.body) if not inherits(module, name)]
    assert missing == [] and modules > 300


def test_a_missing_docstring_is_noticed() -> None:
    source = """
class Known:
    "What it is."
    def said(self): "This."
    def silent(self): pass
    def _own(self): pass
def silent(): pass
"""
    assert list(undocumented(ast.parse(source).body)) == ["Known.silent", "silent"]
    assert inherits("hlat.optim.adamw", "AdamW.update")
