"""Ids of prompts and what follows them, whatever the tokenizer; special tokens of templates alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hlat.data.joint import Joint
from hlat.data.quoted import Quoted
from hlat.data.text_encoder import TextEncoder
from hlat.data.tokenizer import Tokenizer, load_tokenizer

WORDS = re.findall(
    r"\w+", "the movie was good bad great answer question yes no paris france capital of is what"
)
LINES = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 9)) for i in range(1, 200)]
MARKS = ("<|im_start|>", "<|im_end|>", "</s>")


def sentencepiece_model(folder: Path, prefix: bool, kind: str) -> Tokenizer:
    import sentencepiece

    (folder / "text.txt").write_text("\n".join(LINES))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "sp"),
        vocab_size=330,
        model_type=kind,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return load_tokenizer(folder / "sp.model")


def fast(folder: Path, kind: str) -> Tokenizer:
    """A tokenizer.json that puts a space before texts in one of the known ways, or none."""
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if kind.startswith("byte level"):
        backend = Backend(models.BPE())
        before = pre_tokenizers.ByteLevel(add_prefix_space=kind.endswith("prefix"))
        backend.pre_tokenizer, backend.decoder = before, decoders.ByteLevel()
    else:
        alphabet = ["\u2581", *sorted(set("".join(LINES)))]
        backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tail = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        if kind == "prepend":
            steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
            backend.normalizer = normalizers.Sequence(steps)
        else:
            scheme = kind.partition(" ")[2]
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        backend.decoder = decoders.Sequence(
            [*tail, decoders.Strip(" ", 1, 0)][: 3 + (kind != "metaspace never")]
        )
    bytes_ = [] if kind.startswith("byte level") else [f"<0x{n:02X}>" for n in range(256)]
    special = ["<unk>", "</s>", *bytes_]
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + len(alphabet) + 60,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(LINES, trainer)
    definition = json.loads(backend.to_str())
    definition["added_tokens"] = [t for t in definition["added_tokens"] if t["content"] not in bytes_]
    backend = Backend.from_str(json.dumps(definition))
    backend.add_special_tokens([AddedToken(mark, normalized=False) for mark in MARKS[:2]])
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


SENTENCEPIECE = {
    "sentencepiece": (True, "bpe"),
    "sentencepiece without prefix": (False, "bpe"),
    "sentencepiece unigram": (True, "unigram"),
}
FAST = [
    "byte level",
    "byte level prefix",
    "metaspace first",
    "metaspace always",
    "metaspace never",
    "prepend",
]
KINDS = [*SENTENCEPIECE, *FAST, "bytes"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    made: dict[str, Tokenizer] = {"bytes": load_tokenizer("bytes")}
    for name, options in SENTENCEPIECE.items():
        made[name] = sentencepiece_model(tmp_path_factory.mktemp("sp"), *options)
    return made | {name: fast(tmp_path_factory.mktemp("fast"), name) for name in FAST}


fields = st.text(
    st.one_of(st.sampled_from([*" \n\tgbad:", "\u00e9", "\u6771"]), st.characters(exclude_categories=["Cs"])),
    max_size=8,
)
texts = st.lists(st.sampled_from([*WORDS, " ", "\n", "  ", ":", "\u00fc\U0001f600"]), max_size=6).map("".join)
some_text = st.one_of(texts, fields)


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_are_those_of_the_whole_text(tokenizers, kind: str) -> None:
    tokenizer = tokenizers[kind]

    @given(some_text, some_text)
    @settings(deadline=None, max_examples=20)
    def check(prompt: str, rest: str) -> None:
        joint = Joint(tokenizer)
        ((head, tail),) = joint.split([[Quoted.of(prompt), Quoted.of(rest)]])
        whole, alone = tokenizer.encode(prompt + rest), tokenizer.encode(prompt)
        assert head.tolist() == alone
        made = [*head.tolist(), *tail.tolist()]
        assert tokenizer.decode(made) == tokenizer.decode(whole)
        if whole[: len(alone)] == alone:
            assert made == whole and joint.straddling == 0
        else:
            assert joint.straddling == 1
        ((again, label, other),) = joint.choices([Quoted.of(prompt)], [Quoted(rest), Quoted(" good")])
        assert (again.tolist(), label.tolist()) == (head.tolist(), tail.tolist())
        assert tokenizer.decode([*alone, *other]) == tokenizer.decode(tokenizer.encode(prompt + " good"))

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_plain_cases(tokenizers, kind: str) -> None:
    tokenizer = tokenizers[kind]
    prompt = "what is the capital of france ? answer :"
    for completion in (" paris", "paris", "\nparis", "", " \u00e9 paris\n", "\n\n"):
        ((head, tail),) = Joint(tokenizer).split([[Quoted(prompt), Quoted(completion)]])
        assert [*head, *tail] == tokenizer.encode(prompt + completion)
        assert tokenizer.decode([*head, *tail]) == tokenizer.decode(tokenizer.encode(prompt + completion))
    ((head, tail),) = Joint(tokenizer).split([[Quoted(""), Quoted("paris")]])
    assert not len(head) and tail.tolist() == tokenizer.encode("paris")


def test_a_prompt_that_ends_within_a_token(tokenizers) -> None:
    """Its ids are those that `hlat generate` makes of it, and what follows is the completion and no more."""
    for kind in ("byte level", "sentencepiece", "metaspace first", "prepend"):
        tokenizer, joint = tokenizers[kind], Joint(tokenizers[kind])
        for word in WORDS:
            ((head, tail),) = joint.split([[Quoted("answer : "), Quoted(word)]])
            assert head.tolist() == tokenizer.encode("answer : ")
            assert tokenizer.decode([*head, *tail]) == f"answer : {word}"
        assert joint.straddling > 0


def test_parts_of_a_conversation(tokenizers) -> None:
    for tokenizer in tokenizers.values():
        parts = ["what is :", " yes", "\nno ?", " good", ""]
        (ids,) = Joint(tokenizer).split([[Quoted(part) for part in parts]])
        assert [i for part in ids for i in part] == tokenizer.encode("".join(parts))
        assert [len(part) > 0 for part in ids] == [True, True, True, True, False]


# Special tokens


@pytest.mark.parametrize("kind", FAST)
def test_special_tokens_of_a_template_and_never_of_a_field(tokenizers, kind: str) -> None:
    """Where no field spells one, the ids are those of the whole; where one does, its characters are text and
    all other ids are as they were.
    """
    tokenizer = tokenizers[kind]
    from tokenizers import Tokenizer as Backend

    theirs = Backend.from_file(str(tokenizer.files()[0]))  # as AutoTokenizer encodes
    encoder = TextEncoder(tokenizer)
    special = {theirs.token_to_id(mark) for mark in MARKS}
    assert set(MARKS) <= set(encoder.control)

    def filled(field: str) -> Quoted:
        parts = ["<|im_start|>user\n", field, "<|im_end|>\n<|im_start|>answer"]
        return Quoted(parts[0]) + Quoted.of(parts[1]) + Quoted(parts[2])

    def of_template(ids) -> list[int]:
        return [i for i in ids if i in special]

    @given(some_text, st.sampled_from([*MARKS, "<|im_", "|>", "</s></s>", "<|im_start|>"]), some_text)
    @settings(deadline=None, max_examples=20)
    def check(before: str, mark: str, after: str) -> None:
        plain = filled(before)
        wanted = theirs.encode(plain.text, add_special_tokens=False).ids
        assert encoder.encode([plain])[0].tolist() == wanted
        assert encoder._apart(plain).tolist() == wanted
        text = filled(before + mark + after)
        found = encoder.encode([text])[0].tolist()
        assert of_template(found) == of_template(wanted)
        assert encoder.without(text) == "user\n" + before + mark + after + "\nanswer"
        with_text = tokenizer.decode(found)
        assert mark.replace(" ", "") in with_text.replace(" ", "")

    check()


def test_halves_of_a_special_token_are_none(tokenizers) -> None:
    encoder = TextEncoder(tokenizers["byte level"])
    mark = encoder.control["<|im_end|>"]
    for parts in (["<|im_", "end|>"], ["<", "|im_end|>"], ["<|im_end|", ">"]):
        for text in (Quoted.of(parts[0]) + Quoted(parts[1]), Quoted(parts[0]) + Quoted.of(parts[1])):
            assert encoder.quotes_any(text) and mark not in encoder.encode([text])[0]
    whole = Quoted("<|im_") + Quoted("end|>")
    assert mark in encoder.encode([whole])[0]


def test_a_vocabulary_that_has_the_token_as_a_word(tmp_path: Path) -> None:
    """A unigram model finds `</s>` in plain text by itself."""
    from tokenizers import AddedToken, models
    from tokenizers import Tokenizer as Backend

    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -9.0) for c in "</s>ab")]
    backend = Backend(models.Unigram(pieces, 0, False))
    backend.add_special_tokens([AddedToken("</s>", normalized=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    encoder = TextEncoder(load_tokenizer(tmp_path))
    ids = encoder.encode([Quoted("a</s>") + Quoted.of("b</s>") + Quoted("</s>")])[0].tolist()
    assert [backend.id_to_token(i) for i in ids] == ["a", "</s>", "b", *"</s>", "</s>"]


def test_letters_that_normalisation_makes_a_special_token_of(tmp_path: Path, tokenizers) -> None:
    from tokenizers import AddedToken, normalizers
    from tokenizers import Tokenizer as Backend

    definition = json.loads(tokenizers["byte level"].files()[0].read_text())
    backend = Backend.from_str(json.dumps(definition))
    backend.normalizer = normalizers.NFKC()
    backend.add_special_tokens([AddedToken("<stop>", normalized=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    encoder, mark = TextEncoder(load_tokenizer(tmp_path)), backend.token_to_id("<stop>")
    assert mark in backend.encode("a\uff1cstop\uff1e").ids
    found = encoder.encode([Quoted("<stop>a") + Quoted.of("\uff1cstop\uff1e")])[0].tolist()
    assert found.count(mark) == 1 and found[0] == mark


def test_added_tokens_that_are_not_marked_as_special(tmp_path: Path, tokenizers) -> None:
    """One that a template spells is a mark of it; other words that were added stay what they are."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(tokenizers["byte level"].files()[0]))
    backend.add_tokens([AddedToken(text, normalized=False) for text in ("<turn>", "hydroxy", "    ")])
    backend.save(str(tmp_path / "tokenizer.json"))
    turn, word, spaces = (backend.token_to_id(text) for text in ("<turn>", "hydroxy", "    "))
    text = Quoted("<turn>") + Quoted.of("hydroxy<turn>    b")
    with_template = TextEncoder(load_tokenizer(tmp_path), "<turn>    ")
    found = with_template.encode([text])[0].tolist()
    assert (found.count(turn), found.count(word), found.count(spaces)) == (1, 1, 1) and found[0] == turn
    assert with_template.used and not TextEncoder(load_tokenizer(tmp_path), "no mark").used


@given(st.lists(st.tuples(st.text("ab", max_size=3), st.booleans()), max_size=6), st.data())
@settings(deadline=None, max_examples=30)
def test_quoted_parts_keep_their_places(parts, data) -> None:
    marks = "".join(("q" if quoted else "-") * len(text) for text, quoted in parts)
    text = Quoted.joined(Quoted.of(part) if quoted else Quoted(part) for part, quoted in parts)

    def marked(text: Quoted) -> str:
        return "".join("q" if text.touches(n, n + 1) else "-" for n in range(len(text.text)))

    assert text.text == "".join(part for part, _ in parts) and marked(text) == marks
    assert all(a[1] < b[0] for a, b in zip(text.quotes, text.quotes[1:], strict=False))
    first = data.draw(st.integers(0, len(marks)))
    end = data.draw(st.integers(first, len(marks)))
    assert marked(text.part(first, end)) == marks[first:end] and text.part(first).text == text.text[first:]


def test_bos_stands_before_prompts_once(tmp_path: Path, tokenizers) -> None:
    from dataclasses import replace

    tokenizer = load_tokenizer(tokenizers["byte level"].files()[0])
    mark = TextEncoder(tokenizer).control["<|im_start|>"]
    tokenizer.convention = replace(tokenizer.convention, bos=mark, special=True)
    ((head, tail),) = Joint(tokenizer).split([[Quoted("what"), Quoted(" is")]])
    assert [*head, *tail] == [mark, *tokenizer.encode("what is")] and len(head) > 1
    ((head, _),) = Joint(tokenizer).split([[Quoted("<|im_start|>what"), Quoted(" is")]])
    assert head.tolist() == [mark, *tokenizer.encode("what")]
    spelled = Quoted.of("<|im_start|>what")
    assert np.array_equal(TextEncoder(tokenizer).encode([spelled])[0][:1], [mark])
    assert TextEncoder(tokenizer).encode([spelled])[0].tolist().count(mark) == 1


def test_the_harness_divides_texts_as_training_does(tokenizers) -> None:
    """As its own model where the context keeps its ids; elsewhere the continuation is all that is scored."""
    pytest.importorskip("lm_eval")
    from types import SimpleNamespace

    from hlat.evaluate.harness import lm_class
    from hlat.evaluate.text import TextCodec

    for kind in ("byte level", "sentencepiece", "metaspace first"):
        tokenizer = tokenizers[kind]
        live = SimpleNamespace(config=SimpleNamespace(max_seq_len=99))
        team = SimpleNamespace(codec=TextCodec(tokenizer), live=live, chat=None)
        model, theirs = lm_class()(pretrained=team), lm_class().__mro__[2]._encode_pair
        for pair in ((" what is :", " good"), ("answer : ", "bad"), ("a", "\ngreat"), ("what  ", "  ")):
            assert model._encode_pair(*pair) == theirs(model, *pair)
        split = [("what is goo", "d yes"), ("answ", "er"), ("is bad\n", "\nno")]
        for context, rest in split:
            head, tail = model._encode_pair(context, rest)
            ((ours, ids),) = Joint(tokenizer).split([[Quoted(context), Quoted(rest)]])
            if context == context.rstrip():
                assert (head, tail) == (ours.tolist(), ids.tolist())
            assert tail and tokenizer.decode([*head, *tail]) == context + rest
