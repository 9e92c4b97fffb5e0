"""The classification objective against log-softmax and autograd written out; counting of right answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hlat.data.example_rows import label_batch, pair_batch, rows_per_example
from hlat.model.config import ModelConfig
from hlat.model.decoder import Decoder
from hlat.model.flops import flops_per_token
from hlat.objective.causal_lm import CausalLM
from hlat.objective.classification import Classification

SEQ, VOCAB = 12, 40
PROMPTS = [np.array(ids, dtype=np.int64) for ids in ([5, 6, 7], [8], [9, 10, 11, 12, 13])]
LABELS = [2, 0, 1]
SEVERAL = [np.array(ids, dtype=np.int64) for ids in ([20, 21, 22], [20, 23], [24])]
SINGLE = [np.array([i], dtype=np.int64) for i in (20, 30, 39)]


def model(classes: int = 0) -> Decoder:
    config = ModelConfig(
        layers=2, hidden=16, heads=2, ffn=32, vocab=VOCAB, max_seq_len=SEQ, init_std=0.3, classes=classes
    )
    built = Decoder(config).double()
    built.init_weights(1)
    return built


def reference_scores(decoder: Decoder, words) -> torch.Tensor:
    """Mean log-likelihood of each word after each prompt, each in a forward pass of its own, no padding."""
    rows = []
    for prompt in PROMPTS:
        scores = []
        for word in words:
            ids = torch.tensor(np.concatenate([prompt, word]))[None]
            log_p = decoder(ids[:, :-1]).log_softmax(-1)[0, len(prompt) - 1 :]
            scores.append(log_p.gather(-1, ids[0, len(prompt) :, None]).mean())
        rows.append(torch.stack(scores))
    return torch.stack(rows)


def batch(words, size: int = 3, **more):
    return label_batch(PROMPTS, LABELS, words, size, SEQ, 0, **more)


def gradients(loss: torch.Tensor, decoder: Decoder) -> dict[str, torch.Tensor]:
    names, parameters = zip(*decoder.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, grads, strict=True)
    }


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, decoder: Decoder) -> None:
    """The loss is made in fp32 from fp64 states."""
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    found, wanted = gradients(ours, decoder), gradients(theirs, decoder)
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-6 * float(value.abs().max() + 1)), name


@pytest.mark.parametrize("words", [SEVERAL, SINGLE], ids=["several tokens", "one token"])
@pytest.mark.parametrize("size", [3, 5], ids=["full", "filled"])
def test_words_is_cross_entropy_of_mean_log_likelihoods(words, size) -> None:
    decoder = model()
    filled = batch(words, size)
    assert filled.ids.shape[0] == size * (3 if words is SEVERAL else 1) == size * rows_per_example(words)
    assert int(filled.targets_count()) == 3
    ours = Classification(by="words").loss(decoder, filled, torch.tensor(3))
    theirs = F.cross_entropy(reference_scores(decoder, words), torch.tensor(LABELS))
    assert_same(ours, theirs, decoder)


def test_chunks_change_nothing(monkeypatch) -> None:
    monkeypatch.setattr("hlat.objective.causal_lm.CHUNK_ELEMENTS", 3 * VOCAB)
    test_words_is_cross_entropy_of_mean_log_likelihoods(SEVERAL, 3)


def test_tokens_is_next_token_loss_of_the_right_label() -> None:
    """In training on rows of the right label alone, in evaluation on rows of all of them: the same number."""
    decoder, objective = model(), Classification(by="tokens")
    right = [SEVERAL[label] for label in LABELS]
    rows = pair_batch(PROMPTS, right, 3, SEQ, 0)
    every = batch(SEVERAL, 4, count_tokens=True)
    count = rows.targets_count()
    assert int(count) == int(every.targets_count()) == sum(map(len, right))
    ours = objective.loss(decoder, rows, count)
    assert ours.item() == pytest.approx(objective.loss(decoder, every, count).item(), rel=1e-6)
    assert_same(ours, CausalLM().loss(decoder, rows, count), decoder)
    lengths = torch.tensor([len(word) for word in SEVERAL])
    sums = reference_scores(decoder, SEVERAL) * lengths
    theirs = -sums.gather(1, torch.tensor(LABELS)[:, None]).sum() / count
    assert_same(objective.loss(decoder, every, count), theirs, decoder)


def test_head_is_cross_entropy_of_the_last_state() -> None:
    decoder = model(classes=3)
    ours = Classification(by="head").loss(decoder, batch([], 4), torch.tensor(3))
    states = [decoder.hidden(torch.tensor(prompt)[None])[0, -1] for prompt in PROMPTS]
    theirs = F.cross_entropy(decoder.classifier(torch.stack(states)), torch.tensor(LABELS))
    assert_same(ours, theirs, decoder)


def test_operations_of_the_head_are_not_counted_for_every_token() -> None:
    config = model().config
    whole, part = flops_per_token(config, SEQ), flops_per_token(config, SEQ, head=Classification.every_token)
    assert whole - part == 6 * VOCAB * config.hidden


@pytest.mark.parametrize("by", ["words", "tokens"])
@torch.no_grad()
def test_right_answers_are_counted_between_start_and_end(by: str) -> None:
    decoder, objective = model(), Classification(by=by)
    right = int((reference_scores(decoder, SEVERAL).argmax(-1) == torch.tensor(LABELS)).sum())
    filled = batch(SEVERAL, 5, count_tokens=by == "tokens")
    objective.loss(decoder, filled, torch.tensor(1))
    objective.start_counting(torch.device("cpu"))
    for _ in range(2):
        objective.loss(decoder, filled, torch.tensor(1))
    assert int(objective.counted()) == 2 * right
    answers = reference_scores(decoder, SEVERAL).argmax(-1).tolist()
    all_right = label_batch(PROMPTS, answers, SEVERAL, 5, SEQ, 0)
    objective.start_counting(torch.device("cpu"))
    objective.loss(decoder, all_right, torch.tensor(1))
    assert int(objective.counted()) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("by", ["words", "tokens", "head"])
@torch.no_grad()
def test_scores_that_are_not_finite_are_no_answers(by: str, value: float) -> None:
    """The likeliest of labels that are all NaN is the first one: its share is no accuracy."""
    decoder, objective = model(classes=3 if by == "head" else 0), Classification(by=by)
    filled = batch([] if by == "head" else SEVERAL, 4, count_tokens=by == "tokens")
    objective.start_counting(torch.device("cpu"))
    objective.loss(decoder, filled, torch.tensor(1))
    objective.counted()
    assert int(objective.unsound) == 0
    decoder.norm.weight[0] = value
    objective.start_counting(torch.device("cpu"))
    objective.loss(decoder, filled, torch.tensor(1))
    assert int(objective.counted()) == 0 and int(objective.unsound) == 3
