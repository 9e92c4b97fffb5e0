"""Two sets of finetuning examples that are always there: made from Python's installed standard library.

`stdlib-packages`: functions, labelled by the package they come from. Every name of a package is taken out of
the text, in any case and inside longer words, so that it does not say its own label; classes are balanced.

`stdlib-docstrings`: the signature of a function, and the first sentence of its docstring.

`stdlib-chat`: a conversation about a function, with two questions and their answers.

Which functions there are depends on the version of Python, as with `python-stdlib`.
"""

from __future__ import annotations

import ast
import hashlib
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hlat.data.sources import STDLIB, resolve_source

PACKAGES = ("asyncio", "email", "logging", "multiprocessing", "unittest", "xml")
"""The labels of stdlib-packages: large packages of every Python that HLAT runs on."""
MIN_LINES = 4
_NAMES = re.compile("|".join(PACKAGES), re.IGNORECASE)
_SENTENCE = re.compile(r"(.*?(?<!e\.g)(?<!i\.e)[.!?])(?:\s|$)", re.DOTALL)


class Function(NamedTuple):
    """A function of the standard library: file below its root, source lines, syntax tree."""

    file: str
    lines: list[str]
    node: ast.FunctionDef | ast.AsyncFunctionDef

    @property
    def text(self) -> str:
        """Its source with decorators, moved to the left margin."""
        first = min([self.node.lineno, *(item.lineno for item in self.node.decorator_list)])
        return textwrap.dedent("\n".join(self.lines[first - 1 : self.node.end_lineno]))

    @property
    def signature(self) -> str:
        """`def name(arguments)` in one line, with annotations and defaults, as `ast.unparse` writes it."""
        kind = "async def" if isinstance(self.node, ast.AsyncFunctionDef) else "def"
        returns = f" -> {ast.unparse(self.node.returns)}" if self.node.returns else ""
        return f"{kind} {self.node.name}({ast.unparse(self.node.args)}){returns}"


def labelled_functions() -> Iterator[dict[str, Any]]:
    """The records of `stdlib-packages`: text, label, file and name; as many of each label as of the rarest,
    those whose text has the lowest hashes. A text that two packages have is left out.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {label: {} for label in PACKAGES}
    for function in _functions(PACKAGES):
        label = function.file.partition("/")[0]
        if len(function.text.splitlines()) >= MIN_LINES:
            text = _NAMES.sub("package", function.text)
            record = {"text": text, "label": label, "file": function.file, "name": function.node.name}
            found[label][hashlib.sha256(text.encode()).hexdigest()] = record
    count = Counter(mark for records in found.values() for mark in records)
    marks = {label: sorted(mark for mark in found[label] if count[mark] == 1) for label in PACKAGES}
    for label in PACKAGES:
        for mark in marks[label][: min(map(len, marks.values()))]:
            yield found[label][mark]


def documented_functions() -> Iterator[dict[str, Any]]:
    """The records of `stdlib-docstrings`: signature, summary (the docstring's first sentence, in one line),
    file and name.
    """
    for function in _functions():
        summary = _first_sentence(ast.get_docstring(function.node) or "")
        if summary:
            record = {"signature": function.signature, "summary": summary}
            yield record | {"file": function.file, "name": function.node.name}


def conversations() -> Iterator[dict[str, Any]]:
    """The records of `stdlib-chat`: messages, file and name. A user asks what a documented function does, and
    then how its first argument is called, or for its name where it has none.
    """
    for function in _functions():
        summary = _first_sentence(ast.get_docstring(function.node) or "")
        if not summary:
            continue
        given = function.node.args
        names = [argument.arg for argument in (*given.posonlyargs, *given.args) if argument.arg != "self"]
        second = (
            ("What is its first argument?", names[0]) if names else ("What is it called?", function.node.name)
        )
        turns = (f"What does this do?\n{function.signature}", summary, *second)
        messages = [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant") * 2, turns, strict=True)
        ]
        yield {"messages": messages, "file": function.file, "name": function.node.name}


BUILTIN: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "stdlib-packages": labelled_functions,
    "stdlib-docstrings": documented_functions,
    "stdlib-chat": conversations,
}


def _first_sentence(docstring: str) -> str:
    """The first sentence of the first paragraph; "" if that does not read like one."""
    paragraph = " ".join(docstring.strip().partition("\n\n")[0].split())
    match = _SENTENCE.match(paragraph)
    sentence = match[1] if match else ""
    return sentence if 15 <= len(sentence) <= 160 and sentence[0].isupper() else ""


def _functions(packages: tuple[str, ...] = ()) -> Iterator[Function]:
    """Functions and methods of the standard library, file by file; of `packages` only, if given."""
    for file in resolve_source(dataset=STDLIB).files:
        if packages and file.name.partition("/")[0] not in packages:
            continue
        try:
            text = Path(file.path).read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue  # a few files are made to be unreadable, or for another version of Python
        lines = text.split("\n")
        yield from (Function(file.name, lines, node) for node in _outermost(tree))


def _outermost(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions that lie in no other function: one inside another would be there twice."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        else:
            yield from _outermost(node)
