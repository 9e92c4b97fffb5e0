"""Recipe keys in the documentation exist, stated defaults are the code's, and lists of names are whole."""

from __future__ import annotations

import inspect
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from hlat.recipe import Recipe
from hlat.recipe_errors import annotation, is_section
from hlat.registry import KINDS, lookup, names, options_of

sys.path.insert(0, str(Path(__file__).parent))
from docs_pages import PAGES, ROOT, codes, column, fences, name, number, prose, table

SECTIONS = tuple(key for key in Recipe.model_fields if is_section(annotation(key)))
KEY = re.compile(rf"(?<![\w./-])({'|'.join(SECTIONS)})\.([a-z_]\w*(?:\.[a-z_]\w*)*)")
# Names that look like keys and are files, attributes of objects in Python, or contents of a fingerprint.
NO_KEYS = {
    *("model.safetensors", "model.safetensors.index.json", "model.fp16.safetensors", "checkpoint.load_into"),
    *("init.texts", "data.examples.eval"),
}
# Values that a page gives in its examples for options of a plug-in that is not HLAT's.
FOREIGN_OPTIONS = {"guard.loss", "reduce.scale"}
VALUE = r"([\d.,]*\d(?:e-?\d+)?)"


def hlat_names(kind: str) -> list[str]:
    """The plug-ins of a kind that are HLAT's own: another package's may be installed here."""
    return [plugin for plugin in names(kind) if lookup(kind, plugin).__module__.startswith("hlat.")]


def defaults_of_option(option: str, *kinds: str) -> list[Any]:
    """The defaults of an option in every plug-in of HLAT that has it."""
    found = [options_of(lookup(kind, plugin)) for kind in kinds or KINDS for plugin in hlat_names(kind)]
    return [options[option].default for options in found if option in options]


def exists(key: str) -> bool:
    """Whether a dotted key may stand in a recipe."""
    section, _, option = key.partition(".")
    known = annotation(key) is not None or any(
        field.alias == option for field in fields_of(annotation(section)).values()
    )
    return known or bool(section in KINDS and defaults_of_option(option, section))


def fields_of(section: Any) -> dict[str, Any]:
    """Field name -> pydantic's record of it."""
    return section.model_fields if inspect.isclass(section) and issubclass(section, BaseModel) else {}


def default_of(key: str) -> list[Any]:
    """The default of a key: of a field of a section, else of the options of plug-ins."""
    section, _, option = key.rpartition(".")
    for field, info in fields_of(annotation(section) if section else Recipe).items():
        if option in (field, info.alias):
            return [info.get_default(call_default_factory=True)]
    return defaults_of_option(option, *([section] if section in KINDS else []))


def test_keys_in_the_text_exist() -> None:
    wrong, seen = [], set()
    for page in PAGES:
        for code in codes(page):
            for section, rest in KEY.findall(code):
                key = f"{section}.{rest}"
                seen.add(key)
                if key not in NO_KEYS | FOREIGN_OPTIONS and not exists(key):
                    wrong.append(f"{name(page)}: {key}")
    assert wrong == [] and len(seen) > 60
    assert [key for key in NO_KEYS if key not in seen] == []


def recipe_blocks(page: Path) -> Iterator[dict[str, Any]]:
    """What the YAML blocks of a page hold, where it is a recipe or a part of one."""
    for block in fences(page, "yaml"):
        values = yaml.safe_load(block.replace("…", "x"))
        if isinstance(values, dict) and set(values) <= {*Recipe.model_fields, "base"}:
            yield values


def keys_in(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a recipe's mapping, as deep as sections go."""
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        yield dotted
        if isinstance(value, dict) and is_section(annotation(dotted)):
            yield from keys_in(value, f"{dotted}.")
        if isinstance(value, list):
            for number, item in enumerate(value):
                if isinstance(item, dict) and dotted != "log.sinks":
                    yield from keys_in(item, f"{dotted}.{number}.")


def test_keys_in_blocks_exist() -> None:
    wrong, blocks = [], 0
    for page in PAGES:
        for values in recipe_blocks(page):
            blocks += 1
            keys = [key for key in keys_in(values) if key != "base"]
            wrong += [
                f"{name(page)}: {key}" for key in keys if key not in FOREIGN_OPTIONS and not exists(key)
            ]
    assert wrong == [] and blocks > 15


def stated_in(text: str) -> Iterator[tuple[str, float]]:
    """(key or option, default) wherever a text states one: `` `checkpoint.grace` … (default 30)``."""
    near = re.compile(rf"`([a-z_]+(?:\.[a-z_]+)?)`(?:\s+[a-z]+){{0,6}}\s+\((?:default )?{VALUE}(?: s)?\)")
    for key, value in near.findall(text):
        yield key, number(value)


def test_defaults_in_the_text() -> None:
    wrong, seen = [], 0
    for page in PAGES:
        for key, value in stated_in(prose(page)):
            found = default_of(key)
            seen += bool(found)
            if found and value not in found:
                wrong.append(f"{name(page)}: {key} is {value:g} there, {found} in the code")
    assert wrong == [] and seen >= 8
    assert list(stated_in("in `checkpoint.grace` how long it is (default 30)")) == [
        ("checkpoint.grace", 30.0)
    ]


def test_defaults_in_blocks() -> None:
    """`bad_steps: 3  # … (default 1)`, and values that stand beside `…` as those of a plug-in."""
    line = re.compile(rf"^ *([a-z_]+): *(\S+) .*\(default {VALUE}\)", re.MULTILINE)
    found = [match for page in PAGES for block in fences(page, "yaml") for match in line.findall(block)]
    assert [(key, value) for key, _, value in found if number(value) not in default_of(key)] == [] and found


def test_options_of_methods_without_gradients() -> None:
    """The table of docs/methods/mezo_svrg.md has every option with its default."""
    rows = table("docs/methods/mezo_svrg.md", "option", "default").rows
    own = {
        o for plugin in ("mezo", "mezo_svrg", "full_batch_zo") for o in options_of(lookup("method", plugin))
    }
    assert set(column(rows)) == own
    for row in rows:
        options = column([row])
        values = [value.strip(" `") for value in row[1].split(",")]
        for option, value in zip(
            options, values if len(values) == len(options) else values * 2, strict=False
        ):
            found = defaults_of_option(option, "method")
            plain = value.split(" ")[0]
            assert any(same(plain, default) for default in found) or {*found} == {None}, (option, found)


def same(written: str, default: Any) -> bool:
    """Whether a default as a page writes it is that of the code."""
    try:
        return yaml.safe_load(written) == default or number(written) == default
    except (ValueError, yaml.YAMLError):
        return False


def test_options_of_mada() -> None:
    from hlat.optim.mada_options import _DEFAULTS

    rows = table("docs/methods/mada.md", "option", "default").rows
    stated = {option: row[1].split(",")[0] for row in rows for option in column([row])}
    assert {option.removeprefix("hyper_"): number(value) for option, value in stated.items()} == _DEFAULTS
    starts = {row[0].strip("`"): number(row[2]) for row in table("docs/methods/mada.md", "coefficient").rows}
    assert starts == {key: options_of(lookup("optim", "mada"))[key].default for key in starts}
    assert tuple(starts) == tuple(options_of(lookup("optim", "mada"))["learn"].default)


SEAMS = {
    "optim": ("docs/methods/mada.md", ("name", "source"), {"mada"}),
    "reduce": ("docs/methods/conef.md", ("reducer",), set()),
    "guard": ("docs/operations/anomalies.md", ("`guard.name`",), set()),
    "method": ("docs/methods/mezo_svrg.md", ("method", "held"), {"backprop"}),
}


@pytest.mark.parametrize("kind", SEAMS)
def test_tables_name_every_plugin(kind: str) -> None:
    page, header, elsewhere = SEAMS[kind]
    tables = [t for t in rows_of(page) if t[0][: len(header[0])] == header[0]]
    assert tables, f"{page} has no table of {kind}"
    known = {word for _, rows in tables for word in column(rows)}
    assert set(hlat_names(kind)) <= known | elsewhere
    assert [word for word in column(tables[0][1]) if word not in {*hlat_names(kind), "seed_log"}] == []


def rows_of(page: str) -> list[tuple[str, list[list[str]]]]:
    """(first header cell, rows) of every table of a page."""
    from docs_pages import tables

    return [(t.header[0], t.rows) for t in tables(ROOT / page)]


def test_the_four_seams() -> None:
    """docs/design.md lists every method, objective, reducer and optimizer, and no other."""
    rows = table("docs/design.md", "section", "question").rows
    assert {row[0].strip("`") for row in rows} == {"method", "objective", "reduce", "optim"}
    for row in rows:
        assert sorted(column([row], 2)) == hlat_names(row[0].strip("`")), row[0]


def test_compressors_and_error_stores() -> None:
    from hlat.reduce.choice import CompressorName, ErrorName

    listed = table("docs/methods/conef.md", "", "sends, as a share of fp32").rows
    assert set(column([[row[0]] for row in listed])) == set(typing.get_args(CompressorName))
    sentence = re.search(r"^`error`, for `conef`: (.*)$", prose(ROOT / "docs/methods/conef.md"), re.MULTILINE)
    assert sentence is not None
    assert set(re.findall(r"`(\w+)`", sentence[1])) - {"size"} == set(typing.get_args(ErrorName))


def test_scores_of_labels() -> None:
    from hlat.objective.classification import Classification

    ways = typing.get_args(typing.get_type_hints(Classification.__init__)["by"])
    assert set(column(table("docs/finetune.md", "`objective.by`").rows)) == set(ways)


def test_suffixes_that_are_read() -> None:
    from hlat.data.formats import _LAYOUTS, _SUFFIXES

    for page in ("docs/data.md", "docs/finetune.md"):
        told = set(re.findall(r"`(\.[a-z0-9]+)`", " ".join(row[0] for row in table(page, "source").rows)))
        assert set(_LAYOUTS) <= told, page
        assert told - set(_LAYOUTS) <= set(_SUFFIXES) and {".gz", ".bz2", ".xz", ".zst"} <= told, page


def test_stores() -> None:
    from hlat.storage.urls import KINDS as STORES

    told = set(
        re.findall(r"([a-z0-9]+)://", (ROOT / "docs/operations/storage.md").read_text(encoding="utf-8"))
    )
    assert {"s3", "gs", "abfs", "file"} <= told and told - {"https", "http"} <= {*STORES}


def test_containers_that_are_named() -> None:
    from hlat.data.formats import _CONTAINERS

    told = " ".join(cell for row in table("docs/data.md", "left out, and counted").rows for cell in row)
    kinds = {re.split(r"[ :]", what.removeprefix("compressed "))[0] for _, _, what in _CONTAINERS}
    assert [kind for kind in kinds - {"parquet", "arrow"} if kind not in told] == []


def test_settings_of_generation() -> None:
    from hlat.checkpoint.hf_generation import _LEFT_OUT, DRAWING, RULES

    rows = table("docs/convert.md", "Settings", "What happens").rows
    assert set(column(rows[:1])) == set(RULES) and set(column(rows[1:2])) == set(DRAWING)
    assert set(column(rows[2:3])) <= set(_LEFT_OUT) and "note" in rows[2][1]


def test_checks_of_machines() -> None:
    sources = [
        file.read_text(encoding="utf-8")
        for part in ("doctor", "supervise")
        for file in (ROOT / "hlat" / part).rglob("*.py")
    ]
    words = set(re.findall(r"\"([a-z]+(?:\.[a-z]+)*)\"", "".join(sources)))
    rows = table("docs/operations/node-checks.md", "check", "a machine is not fit when").rows
    told = [f"software{check}" if check.startswith(".") else check for check in column(rows)]
    assert [
        check for check in told if check not in words and check.removeprefix("software.") not in words
    ] == []
    assert len(told) >= 15
