"""The files of a Hugging Face folder's tokenizer, through imports, runs, checkpoints and exports."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from hlat.checkpoint.hf import from_hf, to_hf
from hlat.checkpoint.nxd import file_bytes
from hlat.checkpoint.store import write_weights
from hlat.checkpoint.weights import open_weights
from hlat.cli import main
from hlat.data.build import build
from hlat.data.sources import resolve_source
from hlat.data.tokenizer import load_tokenizer
from hlat.data.tokenizer_files import kept_name, place_in
from hlat.model.config import ModelConfig
from hlat.model.init import init_tensor, parameter_shapes

transformers = pytest.importorskip("transformers")

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TOOLS = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
CHAT = [{"role": "user", "content": "hello <|im_end|> world"}, {"role": "assistant", "content": "hi"}]
RECIPE = """
run: {name: chat, steps: 2, dir: run}
init: {from: hf}
data:
  examples: {path: qa.jsonl, prompt: "{q}", completion: "{a}"}
  seq_len: 32
  micro_batch: 2
  global_batch: 2
  holdout: 0.1
precision: {compute: fp32}
compile: false
"""
TEXTS = """
run: {name: texts, steps: 1, dir: texts}
init: {from: run}
data: {sources: [{path: text}], seq_len: 32, micro_batch: 2, global_batch: 2, holdout: 0.1}
precision: {compute: fp32}
compile: false
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """`hf`: special tokens in files of their own, three chat templates, generation settings."""
    folder = tmp_path_factory.mktemp("files")
    hf = folder / "hf"
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(["hello world question answer user assistant"] * 50, trainer)
    backend.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    n = backend.get_vocab_size()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    config = transformers.LlamaConfig(
        vocab_size=n + 2,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(hf)
    backend.save(str(hf / "tokenizer.json"))
    files = {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "<|im_end|>"},
        "added_tokens.json": {"<tool>": n, "<call>": n + 1},
        "generation_config.json": {
            "eos_token_id": [n - 1],
            "temperature": 0.6,
            "top_k": 9,
            "do_sample": True,
        },
    }
    for name, content in files.items():
        (hf / name).write_text(json.dumps(content))
    (hf / "chat_template.jinja").write_text(TEMPLATE)
    (hf / "additional_chat_templates").mkdir()
    for name in ("tools", "rag"):
        (hf / f"additional_chat_templates/{name}.jinja").write_text(TOOLS + name)
    (hf / "additional_chat_templates/notes.txt").write_text("not a template")
    rows = [json.dumps({"q": f"question {i} hello", "a": f"answer {i}"}) for i in range(30)]
    (folder / "qa.jsonl").write_text("\n".join(rows))
    (folder / "text").mkdir()
    for i in range(12):
        (folder / f"text/{i}.txt").write_text(f"hello world {i} " * 20)
    (folder / "tuned.yaml").write_text(RECIPE)
    (folder / "texts.yaml").write_text(TEXTS)
    return folder


TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
    "additional_chat_templates/rag.jinja",
)


def assert_the_same(out: Path, hf: Path) -> None:
    """File by file, and as AutoTokenizer and GenerationConfig see them."""
    for name in TOKENIZER:
        assert (out / name).read_bytes() == (hf / name).read_bytes(), name
    assert not (out / "additional_chat_templates/notes.txt").exists()
    before, after = (transformers.AutoTokenizer.from_pretrained(path) for path in (hf, out))
    for text in ("hello<tool> world", "a<|im_end|>b<call>"):
        assert after(text).input_ids == before(text).input_ids
    assert after.special_tokens_map == before.special_tokens_map and len(after) == len(before)
    for template in (None, "tools", "rag"):
        ids = [one.apply_chat_template(CHAT, chat_template=template) for one in (before, after)]
        assert ids[0] == ids[1]
    drawn = [transformers.GenerationConfig.from_pretrained(path).to_diff_dict() for path in (hf, out)]
    assert drawn[0] | {"transformers_version": ""} == drawn[1] | {"transformers_version": ""}


def test_an_import_and_its_export(place: Path, tmp_path: Path) -> None:
    assert from_hf(place / "hf", tmp_path / "ours") == []
    names = {
        str(p.relative_to(tmp_path / "ours/tokenizer")) for p in (tmp_path / "ours/tokenizer").rglob("*")
    }
    assert names == {*TOKENIZER, "additional_chat_templates"}
    assert to_hf(tmp_path / "ours", tmp_path / "out") == []
    assert_the_same(tmp_path / "out", place / "hf")


def test_what_a_tokenizer_keeps_is_what_it_was(place: Path, tmp_path: Path) -> None:
    """The files a run hands to its checkpoints, whichever of them names the tokenizer."""
    tokenizer = load_tokenizer(place / "hf")
    assert sorted(map(kept_name, tokenizer.kept_files())) == sorted(TOKENIZER)
    assert load_tokenizer(place / "hf/tokenizer.json").kept_files() == tokenizer.kept_files()
    config = ModelConfig(layers=1, hidden=8, heads=2, ffn=8, vocab=320, max_seq_len=32)
    tensors = ((f"model/{n}", init_tensor(config, n, s, 0)) for n, s in parameter_shapes(config).items())
    write_weights(tmp_path / "ck", tensors, {"model": config.model_dump()}, tokenizer.kept_files())
    again = load_tokenizer(open_weights(tmp_path / "ck").tokenizer)
    assert (again.identity, again.eos_id, again.bos_id) == (
        tokenizer.identity,
        tokenizer.eos_id,
        tokenizer.bos_id,
    )
    to_hf(tmp_path / "ck", tmp_path / "out")
    before, after = (
        transformers.AutoTokenizer.from_pretrained(path) for path in (place / "hf", tmp_path / "out")
    )
    assert after.eos_token_id == before.eos_token_id == tokenizer.eos_id and len(after) == len(before)
    assert after.apply_chat_template(CHAT, tokenize=False) == before.apply_chat_template(CHAT, tokenize=False)


def test_a_tokenized_folder_has_them_too(place: Path, tmp_path: Path) -> None:
    source = resolve_source(path=place / "text")
    build([source], load_tokenizer(place / "hf"), tmp_path / "tokens", holdout=0.1, workers=2)
    copied = load_tokenizer(tmp_path / "tokens")
    assert sorted(map(kept_name, copied.kept_files())) == sorted(TOKENIZER)
    assert copied.identity == load_tokenizer(place / "hf").identity


def test_names_of_kept_files_lead_nowhere_else(tmp_path: Path) -> None:
    for name in ("../x", "/etc/x", "a/../../x", "additional_chat_templates/../../x", "x"):
        assert place_in(tmp_path, name).parent == tmp_path
    for name in ("additional_chat_templates/x.jinja", "../additional_chat_templates/x.jinja"):
        inner = place_in(tmp_path, name)
        assert inner == tmp_path / "additional_chat_templates/x.jinja"
        assert kept_name(inner) == "additional_chat_templates/x.jinja"
    (tmp_path / "f").write_bytes(b"ab")
    assert file_bytes(tmp_path / "f").tolist() == [97, 98]


@pytest.mark.slow
def test_runs_and_their_exports(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on examples from there, resumed after the folder is gone, and a run on texts from that."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    assert main(["train", "tuned.yaml", "run.stop_at_step=1"]) == 0
    (place / "hf").rename(place / "away")
    assert main(["train", "tuned.yaml", "run.stop_at_step=null"]) == 0
    assert main(["train", "texts.yaml", "data.tokenizer=init"]) == 0
    (place / "away").rename(place / "hf")
    for run in ("run", "texts"):
        to_hf(run, f"{run}-hf")
        assert_the_same(place / f"{run}-hf", place / "hf")
