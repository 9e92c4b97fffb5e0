"""Special and added tokens, as `AutoTokenizer` finds them in the files beside a vocabulary."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from hlat.checkpoint.hf_tokenizer import PromptEncoder, export_tokenizer
from hlat.data.build import build
from hlat.data.packed import TokenFolder
from hlat.data.sources import resolve_source
from hlat.data.tokenizer import load_tokenizer
from hlat.errors import UserError

transformers = pytest.importorskip("transformers")

FAST, LLAMA = {"tokenizer_class": "PreTrainedTokenizerFast"}, {"tokenizer_class": "LlamaTokenizer"}
TEXTS = (
    "hello world",
    "hello<tool>world <tool> x",
    "<|im_end|>a</s>b<s><extra>",
    "the<Norm>cat <pad>",
    " <left> and <right> x",
)


def flags(content: str, **changed: bool) -> dict:
    usual = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {"content": content, **usual, **changed}


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory) -> dict[str, Path]:
    """A tokenizer.json and a tokenizer.model, with what their vocabularies themselves hold."""
    folder = tmp_path_factory.mktemp("vocabularies")
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat, hello world"] * 50, trainer)
    backend.save(str(folder / "tokenizer.json"))
    import sentencepiece

    (folder / "text.txt").write_text("\n".join(f"the cat {i} sat on mat {i * 7}, hello" for i in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<user>"],
        minloglevel=2,
    )
    return {name: folder / name for name in ("tokenizer.json", "tokenizer.model")}


def folder_of(path: Path, vocabulary: Path, files: dict[str, dict]) -> Path:
    path.mkdir()
    shutil.copy(vocabulary, path)
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    return path


def size_of(vocabulary: Path) -> int:
    return load_tokenizer(vocabulary).vocab_size


def cases(n: int, classes: dict) -> dict[str, dict[str, dict]]:
    """Which file says what; `n` is the first id beyond the vocabulary."""
    beyond = {"<|im_end|>": n, "<tool>": n + 1, "<Norm>": n + 2}
    config = "tokenizer_config.json"
    return {
        "config": {config: {**classes, "eos_token": "<|im_end|>", "bos_token": "<s>"}},
        "config with objects": {
            config: {
                **classes,
                "eos_token": {"__type": "AddedToken", **flags("<|im_end|>")},
                "bos_token": {"__type": "AddedToken", **flags("</s>")},
            }
        },
        "map": {
            config: classes,
            "special_tokens_map.json": {"eos_token": "<|im_end|>", "bos_token": flags("<s>")},
        },
        "map counts more": {
            config: {**classes, "eos_token": "</s>", "bos_token": "<s>"},
            "special_tokens_map.json": {"eos_token": "<|im_end|>"},
        },
        "decoder counts most": {
            config: {
                **classes,
                "eos_token": "</s>",
                "bos_token": "<s>",
                "added_tokens_decoder": {str(n): flags("<tool>", special=False)},
            },
            "special_tokens_map.json": {"eos_token": "<|im_end|>"},
            "added_tokens.json": {"<other>": n},
        },
        "decoder": {
            config: {
                **classes,
                "eos_token": "<|im_end|>",
                "bos_token": "<s>",
                "added_tokens_decoder": {
                    str(n): flags("<|im_end|>"),
                    str(n + 1): flags("<tool>", special=False, normalized=True),
                    str(n + 2): flags("<left>", special=False, lstrip=True),
                    str(n + 3): flags("<right>", special=False, rstrip=True),
                    str(n + 4): flags("<extra>"),
                },
                "extra_special_tokens": ["<extra>"],
            }
        },
        "added_tokens.json": {
            config: {**classes, "bos_token": "<s>", "eos_token": "<|im_end|>"},
            "added_tokens.json": beyond,
        },
        "further": {
            config: {
                **classes,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "additional_special_tokens": ["<extra>", "<|im_end|>"],
                "image_token": "<image>",
            }
        },
        "padding before others": {
            config: {
                **classes,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "pad_token": "<pad>",
                "additional_special_tokens": ["<extra>"],
            }
        },
        "no bos": {config: {**classes, "bos_token": None, "eos_token": "</s>"}},
    }


NAMES = list(cases(0, {}))


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("name", NAMES)
def test_as_autotokenizer(vocabularies, tmp_path: Path, kind: str, name: str) -> None:
    vocabulary = vocabularies[kind]
    files = cases(size_of(vocabulary), FAST if kind == "tokenizer.json" else LLAMA)[name]
    folder = folder_of(tmp_path / "hf", vocabulary, files)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert (ours.eos_id, ours.bos_id) == (theirs.eos_token_id, theirs.bos_token_id)
    assert ours.vocab_size == len(theirs)
    spelled = dict(enumerate(theirs.convert_ids_to_tokens(list(range(len(theirs))))))
    assert ours.pieces() == spelled
    prompts = PromptEncoder(folder)
    for text in TEXTS if kind == "tokenizer.json" else [text.strip() for text in TEXTS]:
        assert prompts.encode(text, special=False) == theirs.encode(text, add_special_tokens=False), text
        documents = ours.encode(text)
        assert documents == theirs.encode(text, add_special_tokens=False, split_special_tokens=True), text
        assert not {ours.eos_id, ours.bos_id} & set(documents)


def test_padding_and_masks_need_no_rows_of_the_weights(vocabularies, tmp_path: Path) -> None:
    for kind, vocabulary in vocabularies.items():
        eos = load_tokenizer(vocabulary).pieces()[load_tokenizer(vocabulary).eos_id]
        said = {"eos_token": eos, "pad_token": "[PAD]", "mask_token": "[MASK]"}
        folder = folder_of(tmp_path / kind, vocabulary, {"tokenizer_config.json": said})
        ours, plain = load_tokenizer(folder), load_tokenizer(vocabulary)
        assert ours.vocab_size == plain.vocab_size and ours.identity == plain.identity
        assert len(transformers.AutoTokenizer.from_pretrained(folder)) == plain.vocab_size + 2


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
def test_an_id_that_a_new_token_cannot_have_is_one_line(vocabularies, tmp_path: Path, kind: str) -> None:
    n = size_of(vocabularies[kind])
    said = {"added_tokens.json": {"<tool>": n + 7}}
    with pytest.raises(UserError, match=f"gives? '<tool>' the id {n + 7}"):
        load_tokenizer(folder_of(tmp_path / "hf", vocabularies[kind], said))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", '{"eos_token": 5}', "eos_token is 5"),
        ("tokenizer_config.json", '{"eos_token": {"content": 5}}', "eos_token is"),
        ("tokenizer_config.json", '{"eos_token": {"content": "x", "lstrip": "no"}}', "eos_token is"),
        ("tokenizer_config.json", '{"eos_token": ""}', "eos_token is"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens_decoder is"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}', "the id of 'a'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"-1": {"content": "a"}}}', "the id of 'a'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": {}}}', "added_tokens_decoder.1 is"),
        ("tokenizer_config.json", '{"extra_special_tokens": 4}', "extra_special_tokens is 4"),
        ("tokenizer_config.json", '{"additional_special_tokens": [{}]}', "additional_special_tokens"),
        ("tokenizer_config.json", "[" * 9999, "not JSON"),
        ("special_tokens_map.json", "[]", "not a JSON object"),
        ("special_tokens_map.json", '{"bos_token": [1]}', "bos_token is"),
        ("added_tokens.json", "{", "not JSON"),
        ("added_tokens.json", "\xff", "not JSON"),
        ("added_tokens.json", '{"a": "b"}', "the id of 'a'"),
        ("added_tokens.json", '{"a": 1e99}', "the id of 'a'"),
        ("added_tokens.json", '{"a": true}', "the id of 'a'"),
        ("added_tokens.json", '{"a": 999, "b": 999}', "have one id"),
    ],
)
def test_files_that_say_something_else_are_one_line(
    vocabularies, tmp_path: Path, file: str, content: str, message: str
) -> None:
    for kind, vocabulary in vocabularies.items():
        folder = folder_of(tmp_path / kind, vocabulary, {})
        (folder / file).write_bytes(content.encode("latin-1"))
        with pytest.raises(UserError, match=message) as caught:
            load_tokenizer(folder)
        assert file in str(caught.value.where)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("strip", [False, True])
def test_document_marks_that_are_not_special(
    vocabularies, tmp_path: Path, bos: bool, normalized: bool, strip: bool
) -> None:
    """Documents that quote them hold their text; other added tokens are found as in any text."""
    backend = Tokenizer.from_file(str(vocabularies["tokenizer.json"]))
    names = ["<|im_end|>", "<|begin|>", "<tool>"]
    kinds = {"special": False, "normalized": normalized, "lstrip": strip, "rstrip": strip}
    backend.add_tokens([AddedToken(name, **kinds) for name in names])
    folder = tmp_path / "t"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    said = {**FAST, "eos_token": "<|im_end|>", "bos_token": "<|begin|>" if bos else None}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    tokenizer = load_tokenizer(folder)
    text = "quotes <|im_end|> and <|begin|> once <tool>"
    found = tokenizer.encode(text)
    eos, begin, tool = (backend.token_to_id(name) for name in names)
    assert tokenizer.eos_id == eos not in found and tool in found
    assert (begin in found) is not bos
    if not strip:
        assert tokenizer.decode(found) == text
    assert eos in tokenizer.encode_special([text])[0]
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.txt").write_text(text)
    built = build([resolve_source(path=tmp_path / "d")], tokenizer, tmp_path / "o", holdout=0, workers=1)
    [shard] = TokenFolder(built.folder).shards["train"]
    assert shard.documents == 1 and shard.count == len(found) + 1


def test_marks_among_the_pieces_of_a_model(vocabularies, tmp_path: Path) -> None:
    """A user-defined symbol, and an ordinary piece, that a file makes EOS are no longer found in texts."""
    plain = load_tokenizer(vocabularies["tokenizer.model"])
    ordinary = next(piece for piece in plain.pieces().values() if piece.endswith("cat"))
    assert plain.encode("a <user>") != load_tokenizer(vocabularies["tokenizer.json"]).encode("a <user>")
    for number, name in enumerate(["<user>", ordinary]):
        said = {"tokenizer_config.json": {**LLAMA, "eos_token": name}}
        folder = folder_of(tmp_path / str(number), vocabularies["tokenizer.model"], said)
        tokenizer = load_tokenizer(folder)
        text = "the cat <user> sat on the cat"
        assert tokenizer.eos_id in plain.encode(text) and tokenizer.eos_id not in tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.identity != plain.identity


def test_text_that_only_the_mark_can_stand_for_is_dropped_and_counted(vocabularies, tmp_path: Path) -> None:
    said = {"tokenizer_config.json": {**FAST, "eos_token": "!"}}
    folder = folder_of(tmp_path / "t", vocabularies["tokenizer.json"], said)
    (tmp_path / "d").mkdir()
    for number, text in enumerate(["hello", "hello!", "world"]):
        (tmp_path / f"d/{number}.txt").write_text(text)
    source = resolve_source(path=tmp_path / "d")
    built = build([source], load_tokenizer(folder), tmp_path / "o", holdout=0, workers=1)
    manifest = TokenFolder(built.folder).manifest
    [(reason, entry)] = manifest["dropped"].items()
    assert "end-of-document" in reason and entry == {"count": 1, "examples": ["1.txt"]}
    assert manifest["totals"]["train"]["documents"] == 2


def test_decoding_with_tokens_beyond_the_model(vocabularies, tmp_path: Path) -> None:
    n = size_of(vocabularies["tokenizer.model"])
    for legacy in (False, True):
        files = cases(n, {**LLAMA, "legacy": legacy})["added_tokens.json"]
        folder = folder_of(tmp_path / str(legacy), vocabularies["tokenizer.model"], files)
        tokenizer = load_tokenizer(folder)
        for text in ("the cat<tool> sat <Norm>", "<tool>the cat", "the cat", "<tool><tool>", ""):
            assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode([n, *tokenizer.encode("a"), 10**6]) == "a"


def test_what_is_beside_a_vocabulary_is_part_of_its_identity(vocabularies, tmp_path: Path) -> None:
    for kind, vocabulary in vocabularies.items():
        n = size_of(vocabulary)
        said = [
            {},
            {"added_tokens.json": {"<tool>": n}},
            {"added_tokens.json": {"<other>": n}},
            {"special_tokens_map.json": {"eos_token": "<s>"}},
        ]
        found = [
            load_tokenizer(folder_of(tmp_path / f"{kind}{i}", vocabulary, files)).identity
            for i, files in enumerate(said)
        ]
        assert len(set(found)) == len(found)
        assert found[0] == load_tokenizer(vocabulary).identity


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("name", ["map", "decoder", "added_tokens.json", "further"])
def test_an_export_has_the_same_ids(vocabularies, tmp_path: Path, kind: str, name: str) -> None:
    """Of weights trained from a seed with such a tokenizer."""
    vocabulary = vocabularies[kind]
    files = cases(size_of(vocabulary), FAST if kind == "tokenizer.json" else LLAMA)[name]
    tokenizer = load_tokenizer(folder_of(tmp_path / "hf", vocabulary, files))
    (tmp_path / "out").mkdir()
    warnings = export_tokenizer(tokenizer, tmp_path / "out", 64)
    (tmp_path / "out/config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs, again = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "out"),
        load_tokenizer(tmp_path / "out"),
    )
    assert warnings == [] or kind == "tokenizer.model"
    assert (theirs.eos_token_id, theirs.bos_token_id) == (tokenizer.eos_id, tokenizer.bos_id)
    assert len(theirs) == tokenizer.vocab_size == again.vocab_size
    for text in ("hello<tool>world", "<extra>the cat<|im_end|>"):
        assert again.encode(text) == tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode_special([text])[0]
