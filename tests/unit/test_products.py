"""Products of 16-bit matrices on CPUs without instructions for them: by way of fp32, rounded once."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hlat.cli import main
from hlat.host import cpu
from hlat.model import products
from hlat.observe import peak


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """A dtype, on a CPU that cannot multiply it."""
    monkeypatch.setattr(cpu, "WIDENED", frozenset({torch.bfloat16, torch.float16}))
    return request.param


def _random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def _rounded(exact: torch.Tensor, got: torch.Tensor) -> None:
    """Within one unit in the last place of the exact result's rounding: fp32 sums in another order."""
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), exact, rtol=eps, atol=eps * 1e-3)


def test_a_product_is_the_exact_one_rounded(narrow: torch.dtype) -> None:
    a, b = _random(3, 17, 40, dtype=narrow), _random(3, 40, 9, dtype=narrow)
    got = products.matmul(a, b)
    assert got.dtype == narrow
    _rounded(a.double() @ b.double(), got)
    out = torch.full((17, 9), float("nan"), dtype=narrow)
    assert products.matmul(a[0], b[0], out=out) is out
    assert torch.equal(out, got[0])


def test_a_layer_and_its_gradients(narrow: torch.dtype) -> None:
    layer = products.Linear(40, 9).to(narrow)
    x = _random(2, 17, 40, dtype=narrow).requires_grad_()
    grad = _random(2, 17, 9, dtype=narrow)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = layer(x)
    out.backward(grad)
    w = layer.weight.detach().double().requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    F.linear(exact_x, w).backward(grad.double())
    _rounded(F.linear(exact_x, w).detach(), out.detach())
    _rounded(exact_x.grad, x.grad)
    _rounded(w.grad, layer.weight.grad)
    assert {t.dtype for t in kept} == {narrow}, "activations and weights kept for backward stay narrow"


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_a_layer_of_which_one_part_is_frozen(narrow: torch.dtype, wanted: str) -> None:
    x, w = _random(5, 8, dtype=narrow), _random(3, 8, dtype=narrow)
    leaf = {"x": x, "weight": w}[wanted].requires_grad_()
    products.linear(x, w).float().sum().backward()
    assert leaf.grad is not None
    assert (w if wanted == "x" else x).grad is None


def test_attention_is_made_in_fp32(narrow: torch.dtype) -> None:
    q, k, v = (_random(2, h, 12, 8, dtype=narrow) for h in (4, 2, 2))
    got = products.attention(q, k, v, is_causal=True, enable_gqa=True)
    wide = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True, enable_gqa=True)
    assert torch.equal(got, wide.to(narrow))


def test_a_compiled_layer_gives_the_same(narrow: torch.dtype) -> None:
    layer = products.Linear(40, 9).to(narrow)
    x = _random(2, 17, 40, dtype=narrow)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    _rounded(x.double() @ layer.weight.double().T, compiled(x).detach())


def test_fp32_and_other_devices_are_left_alone(narrow: torch.dtype) -> None:
    assert cpu.product_dtype(torch.device("cpu"), torch.float32) == torch.float32
    assert cpu.product_dtype(torch.device("cpu"), torch.float64) == torch.float64
    assert cpu.product_dtype(torch.device("cuda"), narrow) == narrow
    x, w = _random(5, 8, dtype=torch.float32), _random(3, 8, dtype=torch.float32)
    assert torch.equal(products.linear(x, w), F.linear(x, w))


def test_utilisation_is_of_the_products_that_are_made(
    narrow: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    monkeypatch.setattr(peak, "measure", lambda device, dtype: measured.append(dtype) or 1e9)
    peak.peak_flops.__wrapped__(torch.device("cpu"), narrow)
    assert measured == [torch.float32]


@pytest.mark.parametrize(
    ("key", "flags", "limit", "bf16", "fp16"),
    [
        ("flags", "avx2 fma", None, False, False),
        ("flags", "avx512f avx512_bf16", None, True, False),
        ("flags", "avx512f amx_bf16 amx_tile avx512_fp16", None, True, True),
        ("flags", "avx512f avx512_bf16", "AVX2", False, False),
        ("flags", "avx512f avx512_bf16", "avx512_core", False, False),
        ("flags", "avx512f avx512_bf16 avx512_fp16", "AVX512_CORE_BF16", True, False),
        ("flags", "avx512f amx_bf16 avx512_fp16", "ALL", True, True),
        ("Features", "asimd bf16 asimdhp", None, True, True),
        ("Features", "asimd", None, False, False),
        (None, "", None, False, False),
    ],
)
def test_what_a_cpu_multiplies(
    key: str | None,
    flags: str,
    limit: str | None,
    bf16: bool,
    fp16: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    file = tmp_path / "cpuinfo"
    if key is not None:
        file.write_text(f"processor : 0\nmodel name : Some CPU\n{key} : fpu {flags} sse\n\nprocessor : 1\n")
    monkeypatch.setattr(cpu, "CPUINFO", str(file))
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    if limit is None:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    else:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert cpu.has_instructions(torch.bfloat16) == bf16
    assert cpu.has_instructions(torch.float16) == fp16
    assert cpu.has_instructions(torch.float32)


RECIPE = """
run: {name: small, steps: 6, seed: 3}
model: {layers: 1, hidden: 16, heads: 2, kv_heads: 1, ffn: 32, vocab: 257, max_seq_len: 16}
data: {sources: [{path: text}], tokenizer: bytes, micro_batch: 2, global_batch: 2, holdout: 0}
optim: {name: adamw, lr: 1e-2}
schedule: {name: constant}
checkpoint: {every: 6, async: false}
log: {every: 1}
compile: false
"""


def test_a_run_trains_alike_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In bf16 with and without instructions for it: the same losses but for bf16's rounding."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("hlat.train.metrics.peak_flops", lambda *args: None)  # measured at each start
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("abcdefghijklmnop" * 420)
    (tmp_path / "small.yaml").write_text(RECIPE)
    losses = {}
    for name, widened in (("direct", frozenset()), ("wide", frozenset({torch.bfloat16}))):
        monkeypatch.setattr(cpu, "WIDENED", widened)
        assert main(["train", "small.yaml", f"run.name={name}"]) == 0
        assert ("products are made in fp32" in " ".join(capsys.readouterr().out.split())) == bool(widened)
        rows = map(json.loads, Path(f"runs/{name}/metrics.jsonl").read_text().splitlines())
        losses[name] = [row["loss"] for row in rows if row["kind"] == "train"]
    assert len(losses["wide"]) == 6
    assert losses["wide"] == pytest.approx(losses["direct"], rel=2e-3)
    assert losses["wide"][-1] < losses["wide"][0] - 0.1
