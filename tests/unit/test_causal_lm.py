"""The fused head and loss against torch's cross-entropy."""

import pytest
import torch
import torch.nn.functional as F

from hlat.data.batch import Batch
from hlat.objective import causal_lm
from hlat.objective.causal_lm import CausalLM


class OneLayer(torch.nn.Module):
    def __init__(self, vocab: int, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = torch.nn.Parameter(torch.randn(vocab, size, generator=generator, dtype=dtype))
        self.head = torch.nn.Linear(size, vocab, bias=False, dtype=dtype)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(vocab, size, generator=generator))

    def hidden(self, ids, positions=None, documents=None):
        return self.embed[ids]


def make_batch(vocab: int, rows: int, length: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocab, (rows, length), generator=generator)
    targets = torch.randint(0, vocab, (rows, length), generator=generator)
    targets[torch.rand(rows, length, generator=generator) < 0.4] = -100
    return Batch(ids, targets)


@pytest.mark.parametrize("chunk", [1 << 23, 101 * 7, 101])
def test_equals_cross_entropy_for_any_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_lm, "CHUNK_ELEMENTS", chunk)
    model, batch = OneLayer(101, 16, torch.float32), make_batch(101, 3, 14)
    count = batch.targets_count()
    loss = CausalLM().loss(model, batch, count)
    found = torch.autograd.grad(loss, list(model.parameters()))
    logits = model.head(model.hidden(batch.ids))
    expected = F.cross_entropy(logits.view(-1, 101), batch.targets.view(-1), ignore_index=-100)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_bf16_keeps_the_scale_exact() -> None:
    """A bf16 gradient must not carry a rounded 1/tokens: its relative bias would show in the mean."""
    low, exact, batch = (
        OneLayer(257, 32, torch.bfloat16),
        OneLayer(257, 32, torch.float32),
        make_batch(257, 4, 33),
    )
    exact.load_state_dict({k: v.float() for k, v in low.state_dict().items()})
    tokens = torch.tensor(8191)
    grads = []
    for model in (low, exact):
        CausalLM().loss(model, batch, tokens).backward()
        grads.append([p.grad.float() for p in model.parameters()])
    for got, want in zip(*grads, strict=True):
        assert (got * want).sum() / want.square().sum() == pytest.approx(1.0, abs=1e-3)


def test_without_targets_loss_and_gradient_are_zero() -> None:
    model, batch = OneLayer(11, 4, torch.float32), make_batch(11, 1, 5)
    batch.targets.fill_(-100)
    loss = CausalLM().loss(model, batch, torch.tensor(1))
    loss.backward()
    assert loss.item() == 0 and all(not p.grad.any() for p in model.parameters())


def test_evaluation_keeps_no_gradient_buffers() -> None:
    model, batch = OneLayer(101, 16, torch.float32), make_batch(101, 3, 14)
    with torch.no_grad():
        loss = CausalLM().loss(model, batch, torch.tensor(1.0))
    assert not loss.requires_grad and loss > 0


def test_logits_of_a_whole_batch_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_lm, "CHUNK_ELEMENTS", 101 * 7)
    sizes = []
    objective = CausalLM()
    kernel = objective._whole
    objective._whole = lambda logits, *rest: (sizes.append(logits.numel()), kernel(logits, *rest))[1]
    objective.loss(OneLayer(101, 16, torch.float32), make_batch(101, 3, 14), torch.tensor(1.0))
    assert max(sizes) <= 101 * 7 and sum(sizes) == 3 * 14 * 101
