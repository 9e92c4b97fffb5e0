"""Ready local tasks, made from text that is on every machine: the standard library of the Python that runs.

Only documents that a run holds out are asked about. A document is held out by the hash of its content
(`hlat.data.packed.document_hash`), so the same fraction names the same documents here and in training, and a
smaller fraction names some of those of a larger one. The lowest hashes come first.

The fraction is the one that is asked for (`holdout`), else what the weights at `pretrained` know of
themselves (the harness's own commands hand the model's arguments to every task), else HOLDOUT. Each question
says which it was, so that whoever knows the model better can refuse it.

Nothing is random: the same Python gives the same questions.
"""

from __future__ import annotations

import ast
import io
import keyword
import logging
import random
import textwrap
import tokenize
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from hlat.data.packed import document_hash, holdout_threshold
from hlat.data.readers import read_pieces
from hlat.data.sources import STDLIB, resolve_source, units
from hlat.errors import UserError
from hlat.paths import expand, kind_of

HOLDOUT = 0.05
SHARE = "held_out_share"
"""Field of a question: the fraction of the documents that it was made from."""
CHOICES = 4
MOST_ITEMS = 400  # of a task
ITEMS_A_FILE = 16  # cloze
WINDOW = 480  # characters of context: below 256 tokens for a small vocabulary
LONGEST_CHOICE = 80
LONGEST_TEXT = 2000


@lru_cache(maxsize=4)
def held_out_documents(fraction: float = HOLDOUT) -> list[tuple[int, str]]:
    """(hash, text) of the held-out documents of the standard library, the lowest hash first.

    Raises UserError when there is none.
    """
    below = holdout_threshold(fraction)
    source = resolve_source(dataset=STDLIB, where="hlat-offline")
    found: dict[int, str] = {}
    for pieces in units(source):
        for document in read_pieces(source.files, pieces, source.text_field):
            mark = document_hash(document.text.encode()) if document.text is not None else below
            if mark < below and document.text is not None:
                found[mark] = document.text
    if not found:
        raise UserError(
            f"no document of Python's standard library is held out at {fraction:g}",
            where="hlat-offline",
            fix="give a run with a larger data.holdout",
        )
    return sorted(found.items())


def shares_asked(requests: Sequence[Any]) -> dict[str, float]:
    """Task -> fraction of the documents that its questions are from, for the harness's requests that ask any
    of them, whatever their task is called.
    """
    found: dict[str, float] = {}
    for request in requests:
        document = getattr(request, "doc", None)
        share = document.get(SHARE) if isinstance(document, dict) else None
        if share is not None:
            found[request.task_name] = max(share, found.get(request.task_name, 0.0))
    return found


def _share(holdout: float | None, pretrained: Any) -> float:
    if holdout is not None:
        return float(holdout)
    known = _known_share(pretrained) if isinstance(pretrained, str) else None
    if known is not None:
        return known
    logging.getLogger(__name__).warning(
        "it is not known which documents the model was trained on: the questions are from %g of Python's "
        "standard library, which may be among them",
        HOLDOUT,
    )
    return HOLDOUT


def _known_share(pretrained: str) -> float | None:
    """What the weights at a path say; None: nothing, or the name is that of a model on a hub."""
    from hlat.checkpoint.provenance import offline_share
    from hlat.checkpoint.weights import open_weights

    try:
        if kind_of(expand(pretrained)) != "folder":
            return None
        return offline_share(open_weights(pretrained))
    except UserError:  # weights of a kind that HLAT does not read have no record of it
        return None


def cloze(holdout: float | None = None, pretrained: Any = None, **_: Any) -> dict[str, Any]:
    """Fill in a name: the code before it, and four lines that differ in the name alone. The wrong names stand
    in the same context.
    """
    share = _share(holdout, pretrained)
    items = (item for mark, text in held_out_documents(share) for item in _cloze_items(mark, text))
    return _dataset(items, share)


def docstring(holdout: float | None = None, pretrained: Any = None, **_: Any) -> dict[str, Any]:
    """Which of four docstrings belongs to a function, given its signature. The wrong ones are those of other
    held-out functions.
    """
    share = _share(holdout, pretrained)
    known = _documented(share)
    lines = sorted({line for _, line in known})
    return _dataset((_docstring_item(signature, line, lines) for signature, line in known), share)


def function(holdout: float | None = None, pretrained: Any = None, **_: Any) -> dict[str, Any]:
    """Which of four functions a docstring belongs to: the same docstring after each signature."""
    share = _share(holdout, pretrained)
    known = _documented(share)
    signatures = [signature for signature, _ in known]
    return _dataset((_function_item(signature, line, signatures) for signature, line in known), share)


def _documented(share: float) -> list[tuple[str, str]]:
    """(signature, first line of the docstring) of the held-out functions, each docstring once."""
    pairs = [pair for _, text in held_out_documents(share) for pair in _functions(text)]
    fitting = {line: signature for signature, line in reversed(pairs) if 15 <= len(line) <= LONGEST_CHOICE}
    return [(signature, line) for line, signature in reversed(fitting.items())]


def code_bits(holdout: float | None = None, pretrained: Any = None, **_: Any) -> dict[str, Any]:
    """Bits per byte of code: functions and classes as they are written."""
    return _texts(_share(holdout, pretrained), _code)


def docstring_bits(holdout: float | None = None, pretrained: Any = None, **_: Any) -> dict[str, Any]:
    """Bits per byte of docstrings."""
    return _texts(_share(holdout, pretrained), _docstrings)


def comment_bits(holdout: float | None = None, pretrained: Any = None, **_: Any) -> dict[str, Any]:
    """Bits per byte of comments: blocks of lines that begin with #."""
    return _texts(_share(holdout, pretrained), _comments)


def _texts(share: float, extract: Callable[[str], Iterator[str]]) -> dict[str, Any]:
    texts = dict.fromkeys(
        text for _, document in held_out_documents(share) for text in extract(document) if len(text) >= 80
    )
    return _dataset(({"text": text} for text in texts), share)


def _dataset(items: Iterator[dict[str, Any]], share: float) -> dict[str, Any]:
    from datasets import Dataset

    rows = [{**item, SHARE: share} for item, _ in zip(items, range(MOST_ITEMS), strict=False)]
    return {"test": Dataset.from_list(rows)}


def _choose(right: str, others: list[str], generator: random.Random) -> tuple[list[str], int]:
    """The right answer among wrong ones, in random order, and its place."""
    choices = [right, *generator.sample(others, CHOICES - 1)]
    generator.shuffle(choices)
    return choices, choices.index(right)


def _cloze_items(mark: int, text: str) -> Iterator[dict[str, Any]]:
    generator = random.Random(mark)
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    names = [(starts[row] + column, row, name) for row, column, name in _names(text)]
    places = [place for place in names if place[0] >= WINDOW]
    generator.shuffle(places)
    made = 0
    for position, row, name in places:
        first = min(start for start in starts if start >= position - WINDOW)
        context = text[first:position]
        near = {other for at, _, other in names if first <= at < position}
        others = sorted(near - {name})
        rest = text[position + len(name) : starts[row + 1]].rstrip("\n")[:LONGEST_CHOICE]
        if name in near and len(others) >= CHOICES - 1 and made < ITEMS_A_FILE:
            made += 1
            chosen, answer = _choose(name, others, generator)
            yield {"context": context, "choices": [word + rest for word in chosen], "answer": answer}


def _names(text: str) -> Iterator[tuple[int, int, str]]:
    """(row from 0, column, name) of the identifiers of at least three characters."""
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NAME and len(token.string) > 2 and not keyword.iskeyword(token.string):
                yield token.start[0] - 1, token.start[1], token.string
    except (tokenize.TokenError, SyntaxError):
        return


def _functions(text: str) -> Iterator[tuple[str, str]]:
    """(signature, first line of the docstring) of the functions of a document."""
    for node in _nodes(text):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            line = (ast.get_docstring(node) or "").partition("\n")[0].strip()
            if line:
                yield f'def {node.name}({ast.unparse(node.args)}):\n    """', line


def _docstring_item(signature: str, line: str, lines: list[str]) -> dict[str, Any]:
    generator = random.Random(document_hash((signature + line).encode()))
    choices, answer = _choose(line, [other for other in lines if other != line], generator)
    return {"context": signature, "choices": [f'{choice}"""' for choice in choices], "answer": answer}


def _function_item(signature: str, line: str, signatures: list[str]) -> dict[str, Any]:
    generator = random.Random(document_hash((line + signature).encode()))
    others = sorted({other for other in signatures if other != signature})
    choices, answer = _choose(signature, others, generator)
    return {"choices": choices, "answer": answer, "docstring": f'{line}"""'}


def _nodes(text: str) -> Iterator[ast.AST]:
    try:
        yield from ast.walk(ast.parse(text))
    except (SyntaxError, ValueError):
        return


def _code(text: str) -> Iterator[str]:
    lines = text.splitlines(keepends=True)
    for node in _nodes(text):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            source = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
            if len(source) <= LONGEST_TEXT and ast.get_docstring(node) is None:
                yield source


def _docstrings(text: str) -> Iterator[str]:
    for node in _nodes(text):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield (ast.get_docstring(node) or "")[:LONGEST_TEXT]


def _comments(text: str) -> Iterator[str]:
    block: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.strip().startswith("#"):
            block.append(line.strip().lstrip("#").strip())
        elif block:
            yield "\n".join(block)[:LONGEST_TEXT]
            block = []
