"""Damage for files: drawn by hypothesis, so that what fails is made small before it is shown.

A file is bytes; a folder is a mapping of names to bytes, or to None for a subfolder where a file should be.
JSON, also inside the header of a safetensors file, is changed value by value; everything else byte by byte.
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

Files = dict[str, bytes | None]

DEEP: Any = []
for _ in range(400):  # deeper than any honest file; json itself gives up near 1000
    DEEP = [DEEP]

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 256, 65536,
    2**31 - 1, 2**31, 2**32, 2**63, 2**64 - 1, -(2**63), 10**30,
    0.0, 0.5, -0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf"),
    "", " ", "x", "0", "1", "true", "nan", "../x", "/etc/passwd", "a\0b", "\x1b[2J", "\ud800", "é", "名",
    "x" * 5000,
    [], {}, [[]], [{}], [None], [0], ["x"], {"": ""}, {"x": None}, {"a": {"b": []}}, DEEP,
)  # fmt: skip
TEXTS = (b"\0", b"\xff", b"\xef\xbb\xbf", b"\r", b"{", b"[" * 3000, b'"', b"\\u0000", b"1e999")
INTERESTING = (0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def pick(draw: Callable[..., Any], items: Sequence[Any]) -> Any:
    """One of the items, drawn by its number: what is drawn is printed, and files are long."""
    return items[draw(st.integers(0, len(items) - 1))]


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a JSON value can be changed: each key and index in it, outermost first."""
    found = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found.append((*path, key))
        found += paths_of(inner, (*path, key))
    return found


def changed_value(draw: Callable[..., Any], value: Any, odd: tuple[Any, ...] = ODD) -> Any:
    """The value (plain JSON types) with one place changed: another value, gone, renamed, or moved."""
    value = copy.deepcopy(value)
    paths = paths_of(value)
    if not paths:
        return draw(st.sampled_from(odd))
    path = draw(st.sampled_from(paths))
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    what = draw(
        st.sampled_from(["replace", "replace", "replace", "remove", "rename", "add", "nudge", "move"])
    )
    key = path[-1]
    if what == "remove":
        del parent[key]
    elif what == "rename" and isinstance(parent, dict):
        parent[draw(st.sampled_from(["", "x", f"{key}x", str(key).upper()]))] = parent.pop(key)
    elif what == "add" and isinstance(parent, list):
        parent.append(draw(st.sampled_from(odd)))
    elif what == "nudge" and type(parent[key]) in (int, float):
        parent[key] += draw(st.sampled_from([1, -1, 0.5]))
    elif what == "move":  # the value of another place
        other = draw(st.sampled_from(paths))
        source = value
        for step in other:
            source = source[step]
        parent[key] = copy.deepcopy(source)
    else:
        parent[key] = draw(st.sampled_from(odd))
    return value


def dumped(value: Any) -> bytes:
    """As JSON; lone surrogates escaped, NaN and Infinity as Python writes them."""
    return json.dumps(value).encode()


def changed_bytes(draw: Callable[..., Any], content: bytes) -> bytes:
    """The bytes with one change: flipped, put in, cut out, repeated, a whole number overwritten, cut off."""
    place = draw(st.integers(0, len(content)))
    what = draw(st.sampled_from(["flip", "insert", "remove", "repeat", "number", "truncate", "text"]))
    size = draw(st.sampled_from([1, 2, 4, 8, 64, 1000]))
    if what == "flip" and place < len(content):
        flipped = content[place] ^ draw(st.integers(1, 255))
        return content[:place] + bytes([flipped]) + content[place + 1 :]
    if what == "insert":
        return content[:place] + draw(st.binary(min_size=1, max_size=8)) + content[place:]
    if what == "remove":
        return content[:place] + content[place + size :]
    if what == "repeat":
        return (
            content[:place]
            + content[max(0, place - size) : place] * draw(st.integers(2, 50))
            + content[place:]
        )
    if what == "number":
        width = draw(st.sampled_from([2, 4, 8]))
        number = draw(st.sampled_from(INTERESTING)) % 2 ** (8 * width)
        return content[:place] + number.to_bytes(width, "little") + content[place + width :]
    if what == "text":
        odd = draw(
            st.sampled_from(
                [b"\0", b"\xff", b"\xef\xbb\xbf", b"\r", b"{", b"[" * 3000, b'"', b"\\u0000", b"1e999"]
            )
        )
        return content[:place] + odd + content[place:]
    return content[:place]


def changed_safetensors(draw: Callable[..., Any], content: bytes) -> bytes:
    """A safetensors file with one value of its header changed; its data stays where it is."""
    (size,) = struct.unpack("<Q", content[:8])
    header = dumped(changed_value(draw, json.loads(content[8 : 8 + size])))
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def changed_file(draw: Callable[..., Any], name: str, content: bytes) -> bytes:
    """One change of a kind that its name suggests."""
    if draw(st.integers(0, 3)):
        try:
            if name.endswith((".json", ".jsonl")):
                return dumped(changed_value(draw, json.loads(content)))
            if name.endswith(".safetensors"):
                return changed_safetensors(draw, content)
        except (ValueError, struct.error, RecursionError):
            pass  # an earlier change has left nothing to read
    return changed_bytes(draw, content)


def changed_folder(draw: Callable[..., Any], files: Files, names: list[str] | None = None) -> Files:
    """One to three changes somewhere in a folder. `names`: the only files to change."""
    files = dict(files)
    for _ in range(draw(st.integers(1, 3))):
        if not files:
            break
        name = draw(st.sampled_from(names or sorted(files)))
        content = files.get(name)
        what = draw(st.integers(0, 15))
        if what == 0:
            files.pop(name, None)
        elif what == 1:
            files[name] = None
        elif what == 2:
            files[name] = files.get(draw(st.sampled_from(sorted(files))))
        elif what == 3:
            files[name] = draw(st.sampled_from([b"", b"{}", b"[]", b"null", b"\0" * 64, b"\x80\x04."]))
        elif content is not None:
            files[name] = changed_file(draw, name, content)
    return files
