"""Blocked attention against the plain one: values and gradients."""

import pytest
import torch

from hlat.model.attention import document_mask, plain_attention
from hlat.model.blocked_attention import block_size, blocked_attention


def draw(heads: int, kv_heads: int, positions: int, dtype: torch.dtype, rows: int = 2, size: int = 8):
    generator = torch.Generator().manual_seed(heads * 100 + positions)
    shapes = [(rows, positions, h, size) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=generator, dtype=dtype, requires_grad=True) for s in shapes]


def gradients(attention, inputs, *rest):
    out = attention(*inputs, *rest)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return out, torch.autograd.grad((out * weights).sum(), inputs)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("positions", [5, 128, 300, 512])
@pytest.mark.parametrize("documents", [False, True])
def test_equals_plain_attention(heads: int, kv_heads: int, positions: int, documents: bool) -> None:
    inputs = draw(heads, kv_heads, positions, torch.float32)
    mask = None
    if documents:
        cuts = torch.tensor([positions // 3, positions // 2])
        mask = document_mask((torch.arange(positions)[None, :] >= cuts[:, None]).int())
    expected, expected_gradients = gradients(plain_attention, inputs, mask)
    out, found = gradients(blocked_attention, inputs, None if mask is None else mask.allowed)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    for got, want in zip(found, expected_gradients, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_gradient_is_exact_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hlat.model.blocked_attention.MIN_BLOCK", 4)
    monkeypatch.setattr("hlat.model.blocked_attention.MAX_BLOCKS", 8)
    assert block_size(11) == 4
    inputs = draw(4, 2, 11, torch.float64, rows=1, size=4)
    assert torch.autograd.gradcheck(lambda q, k, v: blocked_attention(q, k, v, None), inputs)


def test_bf16_is_as_close_to_fp32_as_plain_is() -> None:
    inputs = draw(4, 4, 256, torch.float32)
    exact, exact_gradients = gradients(plain_attention, inputs, None)
    low = [x.detach().bfloat16().requires_grad_() for x in inputs]
    for attention in (blocked_attention, plain_attention):
        out, found = gradients(attention, low, None)
        errors = [
            (got.float() - want).norm() / want.norm()
            for got, want in zip(found, exact_gradients, strict=True)
        ]
        errors.append((out.float() - exact).norm() / exact.norm())
        assert max(errors) < 2e-2, (attention.__name__, errors)
