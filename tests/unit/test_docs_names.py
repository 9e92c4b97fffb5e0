"""Python in the documentation: names can be imported, calls fit signatures, files and variables exist."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from docs_pages import PAGES, ROOT, codes, fences, name, prose, table, text

# Beginnings of dotted words that are no modules: an entry point group, and fields of results files.
NO_MODULES = {"hlat.plugins", "hlat.left_out", "hlat.notes", "hlat.ignored"}
# Set by one process of HLAT for another, or by a test: nobody else's business.
OWN_VARIABLES = {"HLAT_HEARTBEATS", "HLAT_PARENT", "HLAT_SETUP_PARENT", "HLAT_TEST_LOCK_SECONDS"}
# Files in examples, and parts of names.
NO_FILES = {"hlat/mine"}


def resolve(dotted: str) -> Any:
    """The object of a dotted name. Raises LookupError."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                raise LookupError(dotted)
            found = getattr(found, part)
        return found
    raise LookupError(dotted)


@cache
def public_classes() -> dict[str, list[str]]:
    """Class name -> the modules of HLAT that define it."""
    found: dict[str, list[str]] = {}
    for file in sorted((ROOT / "hlat").rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for item in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(item, ast.ClassDef) and not item.name.startswith("_"):
                found.setdefault(item.name, []).append(module)
    return found


def candidates(dotted: str) -> list[Any]:
    """What a name in a page may mean: a dotted one of a module, or a class of HLAT and its members."""
    if dotted.startswith("hlat."):
        return [resolve(dotted)]
    first, _, rest = dotted.partition(".")
    return [
        resolve(".".join(filter(None, (module, first, rest)))) for module in public_classes().get(first, [])
    ]


def misfit(function: Any, call: ast.Call) -> str:
    """What of a call does not fit a signature: names that are written where a parameter of another name is,
    keywords that do not exist, defaults that differ. Empty where all fits.
    """
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    by_name = {p.name: p for p in parameters}
    free = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for given, parameter in zip(call.args, parameters, strict=False):
        if isinstance(given, ast.Name) and given.id != parameter.name:
            return f"{given.id} stands for {parameter.name}"
    if len(call.args) > len(parameters):
        return "more arguments than parameters"
    for keyword in call.keywords:
        known = by_name.get(keyword.arg or "")
        if known is None and not free:
            return f"no parameter {keyword.arg}"
        value = keyword.value.value if isinstance(keyword.value, ast.Constant) else ...
        if known is not None and value is not ... and known.default != value:
            return f"{keyword.arg} is {known.default} by default"
    return ""


def signatures(page: Path) -> Iterator[tuple[str, str, ast.Call]]:
    """(code, name, call) of everything in a page's prose that is written as a call of HLAT's."""
    for code in codes(page):
        shown = re.fullmatch(r"((?:hlat\.[a-z_.]+\.)?[A-Z]\w+(?:\.\w+)*|hlat\.[\w.]+)\((.*)\)", code)
        if shown and (shown[1].startswith("hlat.") or shown[1].partition(".")[0] in public_classes()):
            inner = re.sub(r"=(?=,|$)|=…", "=...", shown[2]).removeprefix("..., ")
            yield code, shown[1], ast.parse(f"f({inner})", mode="eval").body  # type: ignore[misc]


def test_names_in_the_text_exist() -> None:
    wrong, seen = [], 0
    for page in PAGES:
        for dotted in re.findall(r"(?<![\w./-])hlat(?:\.\w+)+", prose(page)):
            seen += 1
            if dotted in NO_MODULES or dotted.endswith((".py", ".yaml")):
                continue
            try:
                resolve(dotted)
            except LookupError:
                wrong.append(f"{name(page)}: {dotted}")
    assert wrong == [] and seen > 15


def test_signatures_in_the_text() -> None:
    wrong, seen = [], 0
    for page in PAGES:
        for code, dotted, call in signatures(page):
            seen += 1
            problems = [misfit(function, call) for function in candidates(dotted)]
            wrong += [f"{name(page)}: {code}: {problems}"] if all(problems) else []
    assert wrong == [] and seen >= 6


def test_blocks_of_python() -> None:
    """What they import from HLAT is there, and calls of it fit."""
    wrong, calls = [], 0
    for page in PAGES:
        for block in fences(page, "python"):
            tree = ast.parse(block)
            known: dict[str, Any] = {}
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hlat"):
                    known |= {alias.name: resolve(f"{node.module}.{alias.name}") for alias in node.names}
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
                    calls += 1
                    try:
                        keywords = {keyword.arg or "": None for keyword in node.keywords}
                        inspect.signature(known[node.func.id]).bind(*[None] * len(node.args), **keywords)
                    except TypeError as error:
                        wrong.append(f"{name(page)}: {ast.unparse(node)}: {error}")
    assert wrong == [] and calls >= 5


def test_a_wrong_signature_is_noticed() -> None:
    def holdout(self: Any, rows: int | None = None) -> None: ...

    call = ast.parse("f(batch_size, count)", mode="eval").body
    assert isinstance(call, ast.Call) and misfit(holdout, call) == "batch_size stands for rows"
    call = ast.parse("f(rows=3)", mode="eval").body
    assert isinstance(call, ast.Call) and misfit(holdout, call) == "rows is None by default"


def test_what_a_reducer_may_have() -> None:
    """The table of docs/methods/conef.md is the protocol: names and parameters."""
    from hlat.reduce import Reducer

    told = {}
    for row in table("docs/methods/conef.md", "", "called").rows:
        shown = re.match(r"`(\w+)\(([\w, ]*)\)", row[0])
        assert shown is not None, row
        told[shown[1]] = [word for word in shown[2].split(", ") if word]
    methods = {key: item for key, item in vars(Reducer).items() if not key.startswith("_")}
    assert told == {key: list(inspect.signature(item).parameters)[1:] for key, item in methods.items()}


def test_files_that_are_named_exist() -> None:
    wrong, seen = [], 0
    for page in PAGES:
        found = re.findall(r"(?<![\w./-])(?:hlat|tests|docs|recipes|launch)/[\w./-]+\w", text(page))
        for path in found:
            seen += 1
            if path not in NO_FILES and not (ROOT / path).exists():
                wrong.append(f"{name(page)}: {path}")
    assert wrong == [] and seen > 60


def test_the_house() -> None:
    """docs/design.md draws every part of the package, and no other."""
    drawn = next(block for block in fences(ROOT / "docs/design.md", "text") if block.startswith("hlat/\n"))
    parts = {word for line in drawn.splitlines()[1:] for word in re.findall(r"(\w+)/(?= |$)", line[:24])}
    there = {folder.name for folder in (ROOT / "hlat").iterdir() if (folder / "__init__.py").exists()}
    assert parts - {"recipes", "launch", "tests", "docs"} == there - {"launch"} and "launch" in parts


def test_variables_of_hlat() -> None:
    """None is promised that the code does not read, and none is read that a page should promise."""
    sources = [*(ROOT / "hlat").rglob("*.py"), ROOT / "launch" / "setup_env.py"]
    pattern = re.compile(r"(?<!\w)HLAT_[A-Z_]+")
    read = {word for file in sources for word in pattern.findall(file.read_text(encoding="utf-8"))}
    told = {word for page in PAGES for word in pattern.findall(text(page))}
    assert read == told | OWN_VARIABLES and not told & OWN_VARIABLES
