"""YAML as recipes use it: a safe subset without surprises.

Only mappings, lists, texts, numbers, true/false and null. Against YAML 1.1: `3e-4` is a number; `yes`, `on`,
`017`, `1:30` and dates are texts; duplicate keys, anchors and tags are refused. Each refusal names the file
and the line.
"""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Any

import yaml

from hlat.errors import UserError
from hlat.paths import read_whole

MAX_BYTES = 1 << 20  # a recipe is a page long; this is some other file
MAX_NODES = 30_000
_TAG = "tag:yaml.org,2002:"
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"(?:~|null|Null|NULL|)$")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)$")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9]+(?:_[0-9]+)*(?:\.[0-9]*(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)"
    r"|\.[0-9]+(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the resolvers below instead of YAML 1.1's, and without aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "found an alias", self.peek_event().start_mark)
        self.nodes = getattr(self, "nodes", 0) + 1
        if self.nodes > MAX_NODES:
            what = f"more than {MAX_NODES:,} keys and values"
            raise yaml.composer.ComposerError(None, None, what, self.peek_event().start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes texts which `_Loader` would read as numbers."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: Any, text: str) -> Any:
    """Unicode line breaks survive only in double quotes, where they are escaped."""
    style = '"' if any(c in text for c in "\x85\u2028\u2029") else None
    return dumper.represent_scalar(_TAG + "str", text, style=style)


_Dumper.add_representer(str, _represent_text)
_Loader.yaml_implicit_resolvers = {}
_Dumper.yaml_implicit_resolvers = {k: [*v] for k, v in yaml.SafeDumper.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(_TAG + "bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver(_TAG + "null", _NULL, ["~", "n", "N", ""])
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(_TAG + "int", _INT, list("-+0123456789"))
    _kind.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+0123456789."))


def parse_yaml(text: str, where: str, show_line: bool = True) -> tuple[Any, dict[str, int]]:
    """Plain values and the line of each dotted key.

    Args:
        text: one YAML document.
        where: the file, for error messages.
        show_line: name the line, too.

    Raises:
        UserError: a syntax error or anything outside the subset.
    """
    lines: dict[str, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None if node is None else _value(loader, node, "", where, lines)), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}:{mark.line + 1}" if mark and show_line else where
        what = f"not valid YAML: {error.problem or error.context}"
        raise UserError(what, where=place, fix=_hint(error)) from None
    except yaml.reader.ReaderError as error:
        raise UserError(f"not valid YAML: character #{error.position} is not allowed", where=where) from None
    except RecursionError:
        raise UserError("not valid YAML: nested too deeply", where=where) from None


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in a file and the line of each dotted key. Raises UserError."""
    return parse_recipe(recipe_text(read_bytes(path), path), path)


def read_bytes(path: Path) -> bytes:
    """A recipe file as it is, read once. Raises UserError for what is none."""
    if path.is_dir():
        of_run = path / "resolved.yaml"
        fix = f"write {of_run}" if of_run.is_file() else ""
        raise UserError("is a folder, not a recipe file", where=str(path), fix=fix)
    return read_whole(path, str(path), MAX_BYTES, "a recipe")


def recipe_text(data: bytes, path: Path) -> str:
    """The text of a recipe file, without a byte order mark. Raises UserError for what is not UTF-8."""
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"is not UTF-8 text (byte {error.start})"
        raise UserError(what, where=f"{path}:{line}", fix="save it as UTF-8") from None


def parse_recipe(text: str, path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in a recipe's text and the line of each dotted key. Raises UserError."""
    values, lines = parse_yaml(text, str(path))
    if values is None:
        raise UserError("is empty", where=str(path), fix="a recipe needs at least model and data")
    if not isinstance(values, dict):
        fix = "write sections such as 'run:' and 'model:'"
        raise UserError("is not a mapping of sections", where=str(path), fix=fix)
    return values, lines


def dump_yaml(values: dict[str, Any]) -> str:
    """Plain values as YAML that `parse_yaml` reads back as equal values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _value(loader: Any, node: Any, path: str, where: str, lines: dict[str, int]) -> Any:
    place = f"{where}:{node.start_mark.line + 1}"
    if not node.tag.startswith(_TAG) or node.tag[len(_TAG) :] not in _PLAIN[type(node)]:
        raise UserError(f"tag {node.tag!r} is not allowed in a recipe", where=place, fix="remove it")
    if isinstance(node, yaml.MappingNode):
        return _mapping(loader, node, path, where, lines)
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, item, f"{path}.{i}", where, lines) for i, item in enumerate(node.value)]
    try:
        return loader.construct_object(node)
    except ValueError:
        raise UserError(f"cannot read the value of {path!r}", where=place) from None


def _mapping(loader: Any, node: Any, path: str, where: str, lines: dict[str, int]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
            fix = "keys are names such as lr; quote them if they look like numbers"
            raise UserError("a key is not a word", where=f"{where}:{line}", fix=fix)
        dotted = f"{path}.{key}" if path else key
        if key in result:
            what = f"duplicate key {dotted!r}, first in line {lines[dotted]}"
            raise UserError(what, where=f"{where}:{line}", fix="remove one of the two")
        lines[dotted] = line
        result[key] = _value(loader, value_node, dotted, where, lines)
    return result


_PLAIN = {
    yaml.MappingNode: ("map",),
    yaml.SequenceNode: ("seq",),
    yaml.ScalarNode: ("str", "int", "float", "bool", "null"),
}


def _hint(error: yaml.MarkedYAMLError) -> str:
    text = f"{error.context} {error.problem}"
    if "alias" in text or "anchor" in text:
        return "put a value that starts with * or & in quotes"
    if "mapping values are not allowed" in text or "':'" in text:
        return "check the indentation, and put a value that holds ': ' in quotes"
    return "tabs cannot indent YAML: use spaces" if "'\\t'" in text else ""
