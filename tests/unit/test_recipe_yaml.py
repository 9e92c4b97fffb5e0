"""The YAML subset: what is read as what, what is refused, and that dumping and parsing are inverse."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hlat.errors import UserError
from hlat.recipe_yaml import dump_yaml, parse_yaml, read_yaml


def parse(text):
    return parse_yaml(text, "f.yaml")[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e-8", 1e-8),
        ("1E5", 1e5),
        ("100e9", 100e9),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("1_000_000", 1_000_000),
        ("-7", -7),
        ("0", 0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("[0.9, 0.95]", [0.9, 0.95]),
        ("{a: 1}", {"a": 1}),
        (".inf", math.inf),
        # texts, all of which YAML 1.1 would turn into something else
        ("yes", "yes"),
        ("off", "off"),
        ("017", "017"),
        ("0x1f", "0x1f"),
        ("1:30", "1:30"),
        ("2024-01-31", "2024-01-31"),
        ("1e", "1e"),
        ("160m", "160m"),
        ("train:bpe-4096", "train:bpe-4096"),
        ("'3e-4'", "3e-4"),
        ("none", "none"),
    ],
)
def test_scalars(text, value):
    got = parse(text)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run:\n  steps: 1\n  steps: 2\n", "f.yaml:3: duplicate key 'run.steps', first in line 2"),
        ("a: 1\na: 1\n", "f.yaml:2: duplicate key 'a'"),
        ("a: [1, 2\nb: 3\n", "f.yaml:2: not valid YAML"),
        ("a: b: c\n", "put a value that holds ': ' in quotes"),
        ("\ta: 1\n", "use spaces"),
        ("m: [*.norm]\n", "starts with * or & in quotes"),
        ("a: &x 1\nb: *x\n", "f.yaml:2: not valid YAML: found an alias"),
        ("a: !!python/object/apply:os.system [id]\n", "tag"),
        ("a: !!set {x, y}\n", "tag"),
        ("a: !!timestamp 2024-01-01\n", "tag"),
        ("a: !!int x\n", "cannot read the value of 'a'"),
        ("1: x\n", "f.yaml:1: a key is not a word"),
        ("? [a]\n: x\n", "f.yaml:1: a key is not a word"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("a: \x00\n", "not valid YAML: character #3"),
        ("a: " + "[" * 5000, "not valid YAML"),
        ("a: " + "9" * 5000, "cannot read the value of 'a'"),
    ],
)
def test_refused(text, message):
    with pytest.raises(UserError) as error:
        parse(text)
    assert message in str(error.value)
    assert str(error.value).startswith("f.yaml")
    assert "\n" not in str(error.value)


def test_lines_of_keys():
    assert parse_yaml("a: 1\nb:\n  c: [1]\n  d: {e: 2}\n", "f")[1] == {
        "a": 1,
        "b": 2,
        "b.c": 3,
        "b.d": 4,
        "b.d.e": 4,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"- a\n", "is not a mapping"),
        (b"hello\n", "is not a mapping"),
        (b"a: \xff\n", "is not UTF-8 text (byte 3)"),
        (b"#" * (1 << 20) + b"\na: 1", "is larger than 1 MiB"),
    ],
)
def test_bad_files(tmp_path, content, message):
    file = tmp_path / "r.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"r\.yaml.*{message.replace('(', '.').replace(')', '.')}"):
        read_yaml(file)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="is a folder"):
        read_yaml(tmp_path)


def test_byte_order_mark_is_ignored(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(tmp_path / "r.yaml")[0] == {"a": 1}


@settings(deadline=None, derandomize=True)
@given(st.text() | st.text(alphabet="ab:-[]{}&*!|>'\"#\n ,?%@1.e\t"))
def test_any_text_is_read_or_refused(text):
    try:
        parse(text)
    except UserError as error:
        assert str(error).startswith("f.yaml")


TRICKY = st.sampled_from(
    ["3e-4", "1_0", "yes", "017", "~", "", "null", "*x", "&x", "a: b", "#c", "1.", "=", "- x", "é"]
)
TEXTS = st.text(max_size=20) | TRICKY
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, derandomize=True)
@given(st.dictionaries(TEXTS, VALUES, max_size=5))
def test_dump_and_parse_are_inverse(values):
    again = parse(dump_yaml(values)) or {}
    assert again == values
    assert repr(again) == repr(values)  # 1 and 1.0, True and 1 are equal but not the same
