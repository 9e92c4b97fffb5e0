"""Tokenizers, chat templates and BOS on their way through a conversion, read back by AutoTokenizer."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from hlat.checkpoint.hf import from_hf, to_hf
from hlat.checkpoint.hf_tokenizer import prompt_ids
from hlat.checkpoint.sentencepiece_json import PROBES, read_sentencepiece
from hlat.checkpoint.store import open_checkpoint, write_weights
from hlat.data.tokenizer import load_tokenizer
from hlat.model.config import ModelConfig
from hlat.model.init import init_tensor, parameter_shapes

transformers = pytest.importorskip("transformers")

CONFIG = ModelConfig(layers=1, hidden=8, heads=2, ffn=8, vocab=1000, max_seq_len=77)
TEXTS = (*PROBES, "<s>not a special token?", "def f(x):\n    return x")
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"


def checkpoint(path: Path, tokenizer: Path | None, meta: dict | None = None) -> None:
    tensors = ((f"model/{n}", init_tensor(CONFIG, n, s, 0)) for n, s in parameter_shapes(CONFIG).items())
    write_weights(path, tensors, {"model": CONFIG.model_dump(), **(meta or {})}, tokenizer)


def byte_level(folder: Path, bos: bool = False) -> Path:
    """A small tokenizer.json; with `bos` its post-processor puts <s> first, as Llama 3's does."""
    folder.mkdir()
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(folder / "tokenizer.json"))
    return folder


def hf_folder(path: Path, tokenizer: Path) -> None:
    """A model as it would be published: weights, tokenizer, chat template, generation settings."""
    made = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    made.bos_token_id, made.eos_token_id, made.pad_token_id = 0, [1, 5], 1
    transformers.LlamaForCausalLM(made).save_pretrained(path)
    (path / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
        },
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>"},
        "generation_config.json": {
            "bos_token_id": 0,
            "eos_token_id": [1, 5],
            "temperature": 0.6,
            "do_sample": True,
        },
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    (path / "README.md").write_text("not the tokenizer's")


def test_imported_files_come_back_unchanged(tmp_path: Path) -> None:
    hf_folder(tmp_path / "hf", byte_level(tmp_path / "tokenizer", bos=True))
    assert from_hf(tmp_path / "hf", tmp_path / "ours") == []
    assert to_hf(tmp_path / "ours", tmp_path / "back") == []
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    assert not (tmp_path / "back/README.md").exists()
    for name in ("config.json", "generation_config.json"):
        old, new = (json.loads((tmp_path / d / name).read_text()) for d in ("hf", "back"))
        keys = [k for k in old if k.endswith("_token_id") or k in ("temperature", "do_sample")]
        assert {k: old[k] for k in keys} == {k: new[k] for k in keys}
    before, after = (transformers.AutoTokenizer.from_pretrained(tmp_path / d) for d in ("hf", "back"))
    assert before("hello").input_ids == after("hello").input_ids
    assert after("hello").input_ids[0] == after.bos_token_id == 0
    chat = [{"role": "user", "content": "hi"}]
    assert after.apply_chat_template(chat, tokenize=False) == "[user] hi\n"


def test_prompts_of_imported_models_are_encoded_as_autotokenizer_does(tmp_path: Path) -> None:
    for bos in (False, True):
        path = tmp_path / f"hf{bos}"
        hf_folder(path, byte_level(tmp_path / f"tokenizer{bos}", bos=bos))
        theirs = transformers.AutoTokenizer.from_pretrained(path)
        for text in (*TEXTS, "chat</s>and on"):
            assert prompt_ids(path, text) == theirs(text).input_ids


SAID = (None, True, False)


def say(folder: Path, **wanted: object) -> None:
    """Write tokenizer_config.json with what is not None."""
    known = {key: value for key, value in wanted.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", **known})
    )


@pytest.mark.parametrize("kind", [None, "PreTrainedTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer"])
def test_what_is_put_around_a_prompt_is_what_autotokenizer_puts(tmp_path: Path, kind: str | None) -> None:
    """The post-processor of tokenizer.json decides, not `add_bos_token` and `add_eos_token` beside it."""
    folder = byte_level(tmp_path / "tokenizer")
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = set()
    for single in ("$A", "<s> $A", "$A </s>", "<s> $A </s>"):
        tokens = [("<s>", 0), ("</s>", 1)]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
        backend.save(str(folder / "tokenizer.json"))
        for bos, eos in itertools.product(SAID, SAID):
            say(folder, add_bos_token=bos, add_eos_token=eos, tokenizer_class=kind)
            theirs = transformers.AutoTokenizer.from_pretrained(folder)
            for text in ("hello", "<s>hello"):
                assert prompt_ids(folder, text) == theirs(text).input_ids, (single, bos, eos, text)
            found.add(tuple(theirs("hello").input_ids))
    assert len(found) == 4


def train_small(folder: Path, name: str = "small", **options: Any) -> Path:
    """Make FOLDER/NAME.model, of the source of torch.nn.functional. Returns the file of that text."""
    sentencepiece = pytest.importorskip("sentencepiece")
    text = folder / "text.txt"
    text.write_text(Path(torch.nn.functional.__file__).read_text(encoding="utf-8")[:60000])
    prefix = str(folder / name)
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=prefix, minloglevel=2, **options)
    return text


def test_what_is_put_around_a_prompt_without_a_tokenizer_json(tmp_path: Path) -> None:
    """There tokenizer_config.json decides; without `add_bos_token` BOS is added, as LlamaTokenizer says."""
    train_small(tmp_path, "tokenizer", vocab_size=400, model_type="bpe", byte_fallback=True)
    for bos, eos in itertools.product(SAID, SAID):
        say(tmp_path, add_bos_token=bos, add_eos_token=eos, tokenizer_class="LlamaTokenizer")
        ours = prompt_ids(tmp_path, "hello")
        assert (ours[0] == 1, ours[-1] == 2) == (bos is not False, eos is True)
        if bos is not None:  # versions of transformers differ there
            theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
            assert ours == theirs("hello").input_ids, (bos, eos)


@pytest.mark.parametrize("bos", [False, True])
def test_a_trained_model_has_no_bos(tmp_path: Path, bos: bool) -> None:
    folder = byte_level(tmp_path / "tokenizer", bos=bos)
    checkpoint(tmp_path / "ours", folder)
    to_hf(tmp_path / "ours", tmp_path / "hf")
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in PROBES:
        assert theirs(text).input_ids == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id) == (0, 1)
    assert theirs.model_max_length == 77
    raw = json.loads((tmp_path / "hf/config.json").read_text())
    assert (raw["bos_token_id"], raw["eos_token_id"]) == (0, 1)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert loaded.generation_config.eos_token_id == 1


def test_bytes(tmp_path: Path) -> None:
    checkpoint(tmp_path / "ours", None, {"recipe": {"data": {"tokenizer": "bytes"}}})
    assert to_hf(tmp_path / "ours", tmp_path / "hf") == []
    ours, theirs = load_tokenizer("bytes"), transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in PROBES:
        assert theirs(text).input_ids == ours.encode(text) == list(text.encode())
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == ours.eos_id == 256


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("like_llama", [True, False])
def test_sentencepiece(tmp_path: Path, kind: str, like_llama: bool) -> None:
    text = train_small(
        tmp_path,
        vocab_size=600,
        model_type=kind,
        byte_fallback=like_llama,
        normalization_rule_name="identity" if like_llama else "nmt_nfkc",
        remove_extra_whitespaces=not like_llama,
        user_defined_symbols=[] if like_llama else ["<tool>"],
    )
    model = read_sentencepiece(tmp_path / "small.model")
    assert len(model.pieces) == 600 and model.byte_fallback == like_llama
    checkpoint(tmp_path / "ours", tmp_path / "small.model")
    assert to_hf(tmp_path / "ours", tmp_path / "hf") == []
    ours, theirs = (
        load_tokenizer(tmp_path / "small.model"),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"),
    )
    for probe in (*PROBES, text.read_text()[:5000]):
        ids = ours.encode(probe)
        assert theirs(probe).input_ids == ids
        if like_llama:
            assert theirs.decode(ids) == ours.decode(ids) == probe
    assert (theirs.bos_token, theirs.eos_token_id) == ("<s>", ours.eos_id)
    assert (tmp_path / "hf/tokenizer.model").read_bytes() == (tmp_path / "small.model").read_bytes()


def test_sentencepiece_that_no_tokenizer_json_can_express(tmp_path: Path) -> None:
    """The model alone is written, says a line, and gives the same ids when it is read again."""
    train_small(tmp_path, vocab_size=600, model_type="bpe", treat_whitespace_as_suffix=True)
    checkpoint(tmp_path / "ours", tmp_path / "small.model")
    [warning] = to_hf(tmp_path / "ours", tmp_path / "hf")
    assert "only tokenizer.model is written" in warning and not (tmp_path / "hf/tokenizer.json").exists()
    assert (tmp_path / "hf/tokenizer.model").read_bytes() == (tmp_path / "small.model").read_bytes()
    assert from_hf(tmp_path / "hf", tmp_path / "back") == []
    ours, back = (load_tokenizer(tmp_path / name) for name in ("small.model", "back/tokenizer"))
    assert [back.encode(text) for text in PROBES] == [ours.encode(text) for text in PROBES]
    assert back.identity == ours.identity


def test_without_a_tokenizer_there_is_a_warning(tmp_path: Path) -> None:
    checkpoint(tmp_path / "ours", None)
    [warning] = to_hf(tmp_path / "ours", tmp_path / "hf")
    assert "no tokenizer" in warning
    [warning] = from_hf(tmp_path / "hf", tmp_path / "back")
    assert "no tokenizer" in warning
    assert open_checkpoint(tmp_path / "back").tokenizer is None
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


@pytest.mark.parametrize(
    "junk", [b"", b"\x0a", b"\xff\xff\xff", b"plain text, no protocol buffer", b"\x0a\x7fab", b"\x0a\x00"]
)
def test_reading_something_else_as_sentencepiece(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "x.model").write_bytes(junk)
    with pytest.raises(ValueError, match="SentencePiece"):
        read_sentencepiece(tmp_path / "x.model")
