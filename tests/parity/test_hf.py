"""Conversion to and from Hugging Face against transformers itself."""

import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hlat.checkpoint.hf import HFFolder, from_hf, parse_size, to_hf
from hlat.checkpoint.provenance import provenance_of
from hlat.checkpoint.store import open_checkpoint, write_weights
from hlat.checkpoint.weights import load_model, model_config, open_weights
from hlat.errors import UserError
from hlat.model.config import ModelConfig
from hlat.model.decoder import Decoder
from hlat.model.init import init_tensor, parameter_shapes

transformers = pytest.importorskip("transformers")

SHAPES = [(kv_heads, tied) for kv_heads in (4, 2) for tied in (False, True)]


def config(kv_heads: int = 2, tied: bool = False, **changes) -> ModelConfig:
    shape = {
        "layers": 3,
        "hidden": 32,
        "heads": 4,
        "kv_heads": kv_heads,
        "ffn": 48,
        "vocab": 61,
        "max_seq_len": 64,
    }
    return ModelConfig(**{**shape, "tie_embeddings": tied, "init_std": 0.2, "rope_theta": 5e4, **changes})


def checkpoint(path: Path, c: ModelConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    """A weights-only checkpoint as training leaves it, and its model."""
    tensors = [(f"model/{n}", init_tensor(c, n, s, 1).to(dtype)) for n, s in parameter_shapes(c).items()]
    write_weights(path, iter(tensors), {"model": c.model_dump(), "step": 3})
    return load_model(open_checkpoint(path))


def hf_model(path: Path, kv_heads: int = 2, tied: bool = False, dtype: str = "float32", **changes):
    """A random transformers model saved at `path`."""
    torch.manual_seed(4)
    made = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        **changes,
    )
    model = transformers.LlamaForCausalLM(made).to(getattr(torch, dtype)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones would not show a norm in the wrong place
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(path)
    return model


def ids() -> torch.Tensor:
    return torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(0))


def edit(path: Path, **changes) -> None:
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**raw, **changes}))


@pytest.mark.parametrize(("kv_heads", "tied"), SHAPES)
def test_exported_logits(tmp_path: Path, kv_heads: int, tied: bool) -> None:
    model = checkpoint(tmp_path / "ours", config(kv_heads, tied))
    to_hf(tmp_path / "ours", tmp_path / "hf", dtype="fp32", shard_size=20_000)
    assert (tmp_path / "hf/model.safetensors.index.json").is_file()
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert theirs.dtype == torch.float32
    with torch.no_grad():
        expected = theirs(ids()).logits
        assert expected.abs().max() > 1  # not the logits of a model that does nothing
        assert (model(ids()) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("kv_heads", "tied"), SHAPES)
def test_imported_logits(tmp_path: Path, kv_heads: int, tied: bool) -> None:
    theirs = hf_model(tmp_path / "hf", kv_heads, tied)
    from_hf(tmp_path / "hf", tmp_path / "ours")
    with torch.no_grad():
        expected = theirs(ids()).logits
        assert (load_model(open_checkpoint(tmp_path / "ours"))(ids()) - expected).abs().max() < 1e-4
        assert (
            load_model(HFFolder(tmp_path / "hf"))(ids()) - expected
        ).abs().max() < 1e-4  # without a conversion


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_round_trip_from_hf_is_bit_identical(tmp_path: Path, dtype: str) -> None:
    hf_model(tmp_path / "hf", tied=dtype == "float16", dtype=dtype)
    from_hf(tmp_path / "hf", tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back", dtype="keep")
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("hf", "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == getattr(torch, dtype)
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    old, new = (transformers.AutoConfig.from_pretrained(tmp_path / d).to_dict() for d in ("hf", "back"))
    old.pop("_name_or_path"), new.pop("_name_or_path")
    assert old == new


def test_round_trip_from_hlat_is_bit_identical(tmp_path: Path) -> None:
    c = config()
    checkpoint(tmp_path / "ours", c)
    to_hf(tmp_path / "ours", tmp_path / "hf", dtype="fp32")
    from_hf(tmp_path / "hf", tmp_path / "back")
    before, after = open_checkpoint(tmp_path / "ours"), open_checkpoint(tmp_path / "back")
    assert before.names() == after.names()
    assert all(torch.equal(before.read(n), after.read(n)) for n in before.names())
    assert model_config(after) == c


def test_what_is_known_of_the_weights_goes_through_transformers(tmp_path: Path) -> None:
    """It ignores the entry `hlat` of config.json, and keeps it."""
    checkpoint(tmp_path / "ours", config())
    to_hf(tmp_path / "ours", tmp_path / "hf", dtype="keep")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "again")
    first, again = (provenance_of(HFFolder(tmp_path / name)) for name in ("hf", "again"))
    assert first.ancestors and replace(again, files={}) == replace(first, files={})
    assert json.loads((tmp_path / "again/config.json").read_text())["hlat"]


def test_default_dtype_is_bf16_rounded_once(tmp_path: Path) -> None:
    checkpoint(tmp_path / "ours", config())
    to_hf(tmp_path / "ours", tmp_path / "hf")
    weights, source = load_file(tmp_path / "hf/model.safetensors"), open_checkpoint(tmp_path / "ours")
    assert torch.equal(weights["model.embed_tokens.weight"], source.read("model/embed.weight").bfloat16())
    assert (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").dtype
        == torch.bfloat16
    )


def test_mixed_dtypes_are_kept_aligned(tmp_path: Path) -> None:
    c = config(hidden=28, heads=2, ffn=33, vocab=61)
    tensors = {
        f"model/{n}": init_tensor(c, n, s, 1).to(torch.float32 if "norm" in n else torch.bfloat16)
        for n, s in parameter_shapes(c).items()
    }
    write_weights(tmp_path / "ours", iter(tensors.items()), {"model": c.model_dump()})
    to_hf(tmp_path / "ours", tmp_path / "hf", dtype="keep")
    back = HFFolder(tmp_path / "hf")
    assert all(torch.equal(back.read(n), t) and back.dtype(n) == t.dtype for n, t in tensors.items())


def test_rope_theta_in_both_forms(tmp_path: Path) -> None:
    theirs = hf_model(tmp_path / "new", rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    raw = json.loads((tmp_path / "new/config.json").read_text())
    assert "rope_theta" not in raw  # transformers 5 writes rope_parameters alone
    assert HFFolder(tmp_path / "new").meta["model"]["rope_theta"] == 500000.0
    old = {k: v for k, v in raw.items() if k != "rope_parameters"}
    (tmp_path / "new/config.json").write_text(
        json.dumps({**old, "rope_theta": 500000.0, "rope_scaling": None})
    )
    with torch.no_grad():
        ours = load_model(HFFolder(tmp_path / "new"))(ids())
        assert (ours - theirs(ids()).logits).abs().max() < 1e-4


def test_absent_config_keys_have_transformers_defaults(tmp_path: Path) -> None:
    hf_model(tmp_path / "hf")
    raw = json.loads((tmp_path / "hf/config.json").read_text())
    dropped = (
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "head_dim",
        "tie_word_embeddings",
    )
    (tmp_path / "hf/config.json").write_text(json.dumps({k: v for k, v in raw.items() if k not in dropped}))
    expected = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    c = model_config(HFFolder(tmp_path / "hf"))
    assert (c.max_seq_len, c.norm_eps) == (expected.max_position_embeddings, expected.rms_norm_eps)
    assert c.rope_theta == expected.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "linear"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"head_dim": 16}, "head_dim"),
        ({"num_key_value_heads": 3}, "kv_heads"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"hidden_size": None}, "hidden_size is null"),
        ({"num_attention_heads": 5}, "hidden_size"),
        ({"num_hidden_layers": 4}, "missing"),
        ({"num_hidden_layers": 2}, "do not belong"),
        ({"intermediate_size": 64}, "shape (48, 32)"),
    ],
)
def test_refused_models(tmp_path: Path, changes: dict, words: str) -> None:
    hf_model(tmp_path / "hf")
    edit(tmp_path / "hf", **changes)
    with pytest.raises(UserError) as caught:
        from_hf(tmp_path / "hf", tmp_path / "ours")
    assert words in caught.value.line() and "\n" not in caught.value.line()
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_broken_folders(tmp_path: Path) -> None:
    hf_model(tmp_path / "hf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json"):
        from_hf(tmp_path / "empty", tmp_path / "ours")
    weights = tmp_path / "hf/model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="safetensors"):
        from_hf(tmp_path / "hf", tmp_path / "ours")
    weights.rename(tmp_path / "hf/pytorch_model.bin")
    with pytest.raises(UserError, match=r"only \.bin files"):
        from_hf(tmp_path / "hf", tmp_path / "ours")
    (tmp_path / "hf/config.json").write_text("{")
    with pytest.raises(UserError, match="JSON"):
        from_hf(tmp_path / "hf", tmp_path / "ours")
    with pytest.raises(UserError, match="no such checkpoint"):
        open_weights(tmp_path / "nothing")


def test_missing_shard_and_escaping_name(tmp_path: Path) -> None:
    checkpoint(tmp_path / "ours", config())
    to_hf(tmp_path / "ours", tmp_path / "hf", shard_size=20_000)
    index = tmp_path / "hf/model.safetensors.index.json"
    first = sorted((tmp_path / "hf").glob("model-00001*"))[0]
    first.rename(tmp_path / first.name)
    with pytest.raises(UserError, match="model-00001-of"):
        HFFolder(tmp_path / "hf")
    index.write_text(index.read_text().replace(first.name, f"../{first.name}"))
    with pytest.raises(UserError, match="outside of the folder"):
        HFFolder(tmp_path / "hf")


def test_biases_without_the_flag_are_noticed(tmp_path: Path) -> None:
    hf_model(tmp_path / "hf")
    weights = load_file(tmp_path / "hf/model.safetensors")
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    save_file(weights, tmp_path / "hf/model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"do not belong to the model, first model\.layers\.0\.self_attn\.q_proj\.bias"
    ):
        from_hf(tmp_path / "hf", tmp_path / "ours")


def test_a_tied_models_second_head_and_old_buffers_are_ignored(tmp_path: Path) -> None:
    theirs = hf_model(tmp_path / "hf", tied=True)
    weights = load_file(tmp_path / "hf/model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(weights, tmp_path / "hf/model.safetensors", {"format": "pt"})
    with torch.no_grad():
        assert (load_model(HFFolder(tmp_path / "hf"))(ids()) - theirs(ids()).logits).abs().max() < 1e-4


class Watched:
    """A source that knows how many of the tensors it gave are still held."""

    def __init__(self, c: ModelConfig, fail_at: str = "") -> None:
        self.path, self.tokenizer, self.meta, self.c = Path("watched"), None, {"model": c.model_dump()}, c
        self.alive: set[int] = set()
        self.most, self.fail_at, self.reads = 0, fail_at, 0
        self.shapes = {f"model/{n}": s for n, s in parameter_shapes(c).items()}

    def names(self) -> list[str]:
        return [*self.shapes, "optim/exp_avg/embed.weight"]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str) -> torch.Tensor:
        if name == self.fail_at:
            raise OSError(28, "No space left on device")
        self.reads += 1
        tensor = torch.zeros(self.shapes[name])
        self.alive.add(id(tensor))
        weakref.finalize(tensor, self.alive.discard, id(tensor))
        self.most = max(self.most, len(self.alive))
        return tensor


@pytest.mark.parametrize("shard_size", [10**9, 20_000])
def test_export_holds_one_tensor_at_a_time(tmp_path: Path, shard_size: int) -> None:
    source = Watched(config())
    to_hf(source, tmp_path / "hf", dtype="fp32", shard_size=shard_size)
    assert source.most == 1 and source.reads == len(source.shapes)


def test_shards_are_no_larger_than_asked(tmp_path: Path) -> None:
    checkpoint(tmp_path / "ours", config())
    to_hf(tmp_path / "ours", tmp_path / "hf", dtype="bf16", shard_size=12_000)
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    tensors = [load_file(f) for f in files]
    sizes = [sum(t.nbytes for t in f.values()) for f in tensors]
    assert len(files) > 3 and max(sizes) <= 12_000
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {n: f.name for f, held in zip(files, tensors, strict=True) for n in held}


def test_failed_export_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="disk is full"):
        to_hf(Watched(config(), fail_at="model/norm.weight"), tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_existing_output_is_not_touched(tmp_path: Path) -> None:
    checkpoint(tmp_path / "ours", config())
    (tmp_path / "hf").mkdir()
    to_hf(tmp_path / "ours", tmp_path / "hf")  # an empty folder is fine
    before = sorted(p.name for p in (tmp_path / "hf").iterdir())
    with pytest.raises(UserError, match="exists already"):
        to_hf(tmp_path / "ours", tmp_path / "hf")
    with pytest.raises(UserError, match="exists already"):
        from_hf(tmp_path / "hf", tmp_path / "hf")
    assert before == sorted(p.name for p in (tmp_path / "hf").iterdir())


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("4096", 4096), ("2K", 2000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-1GB", "0", "five"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UserError, match="shard-size"):
        parse_size(text)
