"""The decoder: shapes and counts, masks, caches, meta construction, pipeline cuts, initialisation."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from hlat.model.attention import document_mask, flash_attention, plain_attention
from hlat.model.config import ModelConfig
from hlat.model.decoder import Decoder
from hlat.model.flops import flops_per_token, matmul_parameters
from hlat.model.init import init_std, init_tensor, parameter_shapes

VOCAB = 61


def config(**changes) -> ModelConfig:
    shape = {
        "layers": 2,
        "hidden": 32,
        "heads": 4,
        "kv_heads": 2,
        "ffn": 48,
        "vocab": VOCAB,
        "max_seq_len": 64,
    }
    return ModelConfig(**{**shape, "init_std": 0.1, **changes})


def build(dtype: torch.dtype = torch.float32, seed: int = 1, **changes) -> Decoder:
    with torch.device("meta"):
        model = Decoder(config(**changes))
    model.to(dtype).to_empty(device="cpu")
    model.init_weights(seed)
    return model


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("preset", "count"), [("hlat-7b", 6_738_415_616), ("hlat-70b", 68_976_648_192)])
def test_parameter_counts(preset: str, count: int) -> None:
    with torch.device("meta"):
        model = Decoder(ModelConfig(preset=preset))
    assert sum(p.numel() for p in model.parameters()) == count == model.config.parameter_count()


@pytest.mark.parametrize("tied", [False, True])
def test_parameter_shapes_are_the_models(tied: bool) -> None:
    model = build(tie_embeddings=tied)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == parameter_shapes(model.config)
    assert list(dict(model.named_parameters())) == list(parameter_shapes(model.config))


def test_to_empty_keeps_tables_and_tie() -> None:
    direct = Decoder(config(tie_embeddings=True))
    moved = build(tie_embeddings=True, dtype=torch.bfloat16)
    assert moved.head.weight is moved.embed.weight
    for name in ("cos", "sin"):
        table = getattr(moved.rope, name)
        assert table.dtype == torch.float32 and torch.equal(table, getattr(direct.rope, name))
    assert not any("rope" in name for name in moved.state_dict())
    assert moved(ids(1, 8)).dtype == torch.bfloat16


def test_rope_depends_on_distance_only() -> None:
    model = build(layers=1)
    x = ids(1, 10)
    near = model(x, torch.arange(10)[None])
    far = model(x, torch.arange(10)[None] + 50)
    assert (near - far).abs().max() < 1e-4
    stretched = model(x, torch.arange(10)[None] * 3)
    assert (near - stretched).abs().max() > 1e-3


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("documents", [False, True])
def test_flash_equals_plain(kv_heads: int, documents: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 12, h, 8, generator=generator) for h in (4, kv_heads, kv_heads))
    mask = document_mask(torch.tensor([[0] * 5 + [1] * 7, [0] * 12])) if documents else None
    assert (flash_attention(q, k, v, mask) - plain_attention(q, k, v, mask)).abs().max() < 1e-5


@pytest.mark.parametrize("attention", ["plain", "flash", "auto"])
def test_documents_equal_separate_runs(attention: str) -> None:
    model = build(attention=attention)
    x, cuts = ids(2, 20), [(0, 7), (7, 8), (8, 20)]
    documents = torch.cat([torch.full((2, b - a), i) for i, (a, b) in enumerate(cuts)], 1).int()
    positions = torch.cat([torch.arange(b - a).expand(2, -1) for a, b in cuts], 1)
    packed = model(x, positions, documents)
    for a, b in cuts:
        assert (packed[:, a:b] - model(x[:, a:b])).abs().max() < 1e-5
    assert (packed[:, 8:] - model(x)[:, 8:]).abs().max() > 1e-3  # without documents it is another result


@pytest.mark.parametrize("attention", ["plain", "flash", "auto"])
def test_the_future_changes_nothing(attention: str) -> None:
    model = build(attention=attention)
    x, y = ids(1, 12), ids(1, 12)
    y[:, 8:] = (y[:, 8:] + 1) % VOCAB
    assert torch.equal(model(x)[:, :8], model(y)[:, :8])
    assert not torch.equal(model(x)[:, 8], model(y)[:, 8])


@pytest.mark.parametrize("attention", ["plain", "flash", "auto"])
def test_cache_equals_full_forward(attention: str) -> None:
    model = build(attention=attention)
    x = ids(2, 15)
    cache = model.new_cache(batch=2, length=20)
    parts = [
        model(x[:, a:b], torch.arange(a, b).expand(2, -1), None, cache)
        for a, b in ((0, 6), (6, 7), (7, 11), (11, 15))
    ]
    assert (torch.cat(parts, 1) - model(x)).abs().max() < 1e-5


def test_cache_needs_positions() -> None:
    model = build()
    with pytest.raises(ValueError, match="positions_BS"):
        model(ids(1, 4), cache=model.new_cache(1, 8))


def test_pipeline_stages_equal_the_whole() -> None:
    whole, first, last = build(layers=3), build(layers=3), build(layers=3)
    del first.layers["2"]
    first.norm = first.head = None
    del last.layers["0"], last.layers["1"]
    last.embed = None
    for stage in (first, last):  # a stage makes the values of its own names
        stage.init_weights(1)
    x, documents = ids(2, 9), torch.tensor([[0] * 4 + [1] * 5] * 2).int()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)
    middle = first(x, positions, documents)
    assert torch.equal(last(middle, positions, documents), whole(x, positions, documents))


def test_recomputed_core_gives_the_same_gradients() -> None:
    model, x = build(), ids(2, 9)
    documents = torch.tensor([[0] * 4 + [1] * 5] * 2).int()

    def gradients() -> list[torch.Tensor]:
        loss = model(x, None, documents).float().logsumexp(-1).sum()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    expected = gradients()
    for block in model.layers.values():
        for module in (block.attention.core, block.mlp.product):
            inner = module.forward
            module.forward = lambda *args, inner=inner: checkpoint(inner, *args, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients(), strict=True))


@pytest.mark.parametrize("documents", [False, True])
def test_compiles_to_one_graph(documents: bool) -> None:
    counter = CompileCounter()
    model = build()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for seed in range(3):
        cut = torch.tensor([[3 + seed], [5]])
        numbers = (torch.arange(12)[None] >= cut).int()
        rest = (torch.arange(12).expand(2, -1), numbers) if documents else (None, None)
        compiled(ids(2, 12, seed), *rest).sum().backward()
    assert counter.frame_count == 1


def test_flops_against_torchs_counter() -> None:
    length = 16
    model = build(attention="plain")
    with FlopCounterMode(display=False) as counter:
        model(ids(1, length))
    c = model.config
    square = 4 * c.layers * c.hidden * length * length  # what a plain kernel does
    causal = 4 * c.layers * c.hidden * length * (length + 1) / 2
    assert counter.get_total_flops() - square + causal == flops_per_token(c, length, backward=False) * length
    assert flops_per_token(c, length) == 3 * flops_per_token(c, length, backward=False)


def test_flops_of_the_7b() -> None:
    c = ModelConfig(preset="hlat-7b")
    assert matmul_parameters(c) == 6_738_415_616 - 32000 * 4096 - 65 * 4096
    assert flops_per_token(c, 4096) == pytest.approx(6 * matmul_parameters(c) + 6 * 32 * 4096 * 4097)


def test_initial_values() -> None:
    c = config(layers=8, hidden=256, heads=4, kv_heads=4, ffn=512)
    scaled = 0.1 / math.sqrt(16)
    for name, std in (("attention.q", 0.1), ("attention.o", scaled), ("mlp.gate", 0.1), ("mlp.down", scaled)):
        full = f"layers.3.{name}.weight"
        values = init_tensor(c, full, parameter_shapes(c)[full], seed=5)
        assert values.std().item() == pytest.approx(std, rel=0.02) == init_std(c, full)
        assert abs(values.mean().item()) < 0.02 * std
    assert torch.equal(init_tensor(c, "norm.weight", (256,), 5), torch.ones(256))
    plain = config(scaled_init=False)
    assert init_std(plain, "layers.0.mlp.down.weight") == plain.init_std


def test_every_tensor_can_be_made_alone() -> None:
    model = build(seed=7)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, init_tensor(model.config, name, parameter.shape, 7))
    half = build(torch.bfloat16, seed=7)
    for name, parameter in half.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).bfloat16())
    a = init_tensor(model.config, "layers.0.mlp.up.weight", (48, 32), 7)
    for name, seed in (
        ("layers.0.mlp.gate.weight", 7),
        ("layers.1.mlp.up.weight", 7),
        ("layers.0.mlp.up.weight", 8),
    ):
        assert not torch.equal(a, init_tensor(model.config, name, (48, 32), seed))


def test_initialising_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    build()
    init_tensor(config(), "embed.weight", (VOCAB, 32), 1)
    assert torch.equal(before, torch.get_rng_state())
