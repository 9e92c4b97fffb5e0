"""Long texts in parts: the ids are those of the whole, for every kind of word pattern."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from hlat.data import long_text
from hlat.data.tokenizer import load_tokenizer

UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
CASE = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
HEAD = r"[^\r\n\p{L}\p{N}]?"
# As they stand in the published tokenizer.json files.
LLAMA3 = rf"{CASE}|{HEAD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{TAIL}"
QWEN2 = rf"{CASE}|{HEAD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{TAIL}"
O200K = (
    rf"{HEAD}[{UPPER}]*[{LOWER}]+{CASE}?|{HEAD}[{UPPER}]+[{LOWER}]*{CASE}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{TAIL}"
)
TEKKEN = (
    rf"{HEAD}[{UPPER}]*[{LOWER}]+|{HEAD}[{UPPER}]+[{LOWER}]*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{TAIL}"
)
DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{TAIL}"
)
LINES = (
    "// a comment",
    "foo(x);",
    "  indented it's",
    "int y = 3;",
    "}",
    "/",
    "",
    "12345 é",
    "東京",
    "\t",
    "<tool>",
)
any_text = st.lists(
    st.sampled_from([*LINES, "\n", "\r\n", "\n\n", "/", ";", " ", "a", "Z", "7", "e\u0301", "\u0301", "\x85"])
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    max_size=40,
).map(lambda parts: "\n".join(parts[::2]) + "".join(parts[1::2]))


def split(*patterns: str):
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*steps, level])


LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
KINDS = {
    "gpt2": (LEVEL, True),
    "llama3": (split(LLAMA3), True),
    "qwen2": (split(QWEN2), True),
    "o200k": (split(O200K), True),
    "tekken": (split(TEKKEN), True),
    "deepseek": (split(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK), True),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), LEVEL]), True),
    "no pattern": (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), False),
    "space in front": (pre_tokenizers.ByteLevel(add_prefix_space=True), False),
    "numbers alone": (split(r"\p{N}{1,3}"), False),
    "unknown pattern": (split(rf"[^\s]+\n[^\s]|{LLAMA3}"), False),
    "metaspace": (pre_tokenizers.Metaspace(), False),
    "metaspace without prefix": (pre_tokenizers.Metaspace(prepend_scheme="never"), False),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Kind -> (ours, theirs)."""
    found = {}
    for name, (before, _) in KINDS.items():
        backend = Tokenizer(models.BPE())
        if name == "qwen2":
            backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer, backend.decoder = before, decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(["\n".join(LINES * 3), ";\n// a\n/" * 9, "}\n7\n東" * 9] * 20, trainer)
        backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
        folder = tmp_path_factory.mktemp("made")
        backend.save(str(folder / "tokenizer.json"))
        backend.encode_special_tokens = True
        found[name] = (load_tokenizer(folder), backend)
    return found


@pytest.mark.parametrize("kind", KINDS)
@given(text=any_text)
@example(text=";\n// a\n" * 9 + "x")
@example(text="a\n\u0301b\n" * 9)
@settings(max_examples=40, deadline=None)
def test_parts_have_the_ids_of_the_whole(made, kind: str, text: str) -> None:
    ours, theirs = made[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_text, "SPLIT_ABOVE", 8)
        [ids] = ours.encode_arrays([text])
    assert ids.tolist() == theirs.encode(text, add_special_tokens=False).ids
    assert ours.takes_parts == KINDS[kind][1]


def test_parts_are_many_and_make_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_text, "SPLIT_ABOVE", 200)
    text = "".join(f"line {i}\n" + "\n" * (i % 3) + " " * (i % 4) + "é\t\n" * (i % 2) for i in range(500))
    parts = long_text.parts(text)
    assert "".join(parts) == text and len(parts) > 20
    assert not any(part.startswith(("/", "\n", " ")) for part in parts[1:])
    assert long_text.parts("no line end " * 100) == ["no line end " * 100]
    assert long_text.parts("a\n/b" * 100) == ["a\n/b" * 100]


def test_no_more_is_encoded_at_once_than_may_be_whole(made, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encodings of a long text are never all there: they take a hundred bytes a token."""
    kind = next(kind for kind in KINDS if KINDS[kind][1])
    ours, theirs = made[kind]
    monkeypatch.setattr(long_text, "SPLIT_ABOVE", 200)
    text, sizes, encode = "".join(f"line {i}\n" for i in range(500)), [], ours.encode_batch

    def measured(texts: list[str]) -> list[list[int]]:
        sizes.append(sum(map(len, texts)))
        return encode(texts)

    monkeypatch.setattr(ours, "encode_batch", measured)
    [ids] = ours.encode_arrays([text])
    assert ids.tolist() == theirs.encode(text, add_special_tokens=False).ids
    assert sum(sizes) == len(text) and len(sizes) > 10
    longest = max(map(len, text.splitlines(keepends=True)))
    assert max(sizes) <= 200 + long_text.AT_ONCE * longest


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("a\nb", special=False),
        AddedToken("<x>", special=False, lstrip=True),
        AddedToken("<x>", special=False, rstrip=True),
        AddedToken("<x>", special=False, single_word=True),
    ],
)
def test_added_tokens_that_look_beyond_themselves_forbid_parts(made, tmp_path: Path, token) -> None:
    ours, _ = made["gpt2"]
    backend = Tokenizer.from_file(str(ours.files()[0]))
    backend.add_tokens([token])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert ours.takes_parts and not load_tokenizer(tmp_path).takes_parts
    if not token.single_word:  # a special one is not looked for in documents
        backend.add_special_tokens([token])
        backend.save(str(tmp_path / "tokenizer.json"))
        assert load_tokenizer(tmp_path).takes_parts


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"normalizer": {"type": "Prepend", "prepend": "_"}},
        {"pre_tokenizer": None},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "ByteLevel",
                        "add_prefix_space": False,
                        "trim_offsets": True,
                        "use_regex": False,
                    },
                    {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False},
                ],
            }
        },
    ],
)
def test_what_was_not_looked_into_is_encoded_whole(made, tmp_path: Path, change: dict) -> None:
    definition = json.loads(made["gpt2"][0].files()[0].read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition | change), encoding="utf-8")
    assert not load_tokenizer(tmp_path).takes_parts
