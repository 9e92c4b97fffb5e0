"""A live model's scores and texts equal those of one plain forward pass for each request."""

from __future__ import annotations

import pytest
import torch

from hlat.backend.native import NativeBackend
from hlat.data.tokenizer import BytesTokenizer
from hlat.evaluate.batches import Request
from hlat.evaluate.generate import generate
from hlat.evaluate.live import LiveModel
from hlat.evaluate.team import Team
from hlat.evaluate.text import TextCodec
from hlat.model.config import ModelConfig
from hlat.model.decoder import Decoder
from hlat.parallel.pipeline import StagePart


@pytest.fixture(scope="module")
def team() -> Team:
    config = ModelConfig(
        layers=2, hidden=32, heads=4, kv_heads=2, ffn=48, vocab=260, max_seq_len=96, tie_embeddings=False
    )
    model = Decoder(config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.4)
    backend = NativeBackend(device=torch.device("cpu"))
    part = StagePart(0, 1, list(model.layers))
    return Team(LiveModel(model.eval(), [part], backend), TextCodec(BytesTokenizer()))


@torch.no_grad()
def alone(team: Team, request: Request) -> tuple[float, bool]:
    logits = team.live.model(torch.tensor([request.tokens]))[0, -len(request.continuation) :]
    target = torch.tensor(request.continuation)
    nats = logits.double().log_softmax(-1).gather(-1, target[:, None]).sum()
    return float(nats), bool((logits.argmax(-1) == target).all())


@pytest.mark.parametrize("size", [1, 3, 16])
def test_scores(team: Team, size: int) -> None:
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 257, (count,), generator=generator).tolist())

    shared = [ids(30), ids(50)]
    requests = [Request(context, ids(n)) for context in shared for n in (1, 4, 9, 1)]
    requests += [Request(shared[0][:20] + ids(8), ids(3)) for _ in range(3)]
    requests += [Request(ids(n), ids(1 + n % 5)) for n in range(1, 20)]
    with torch.no_grad():
        best = int(team.live.model(torch.tensor([shared[0]]))[0, -1].argmax())
    requests += [Request(shared[0], (best,))]
    found = team.score(requests, size)
    for request, (nats, greedy) in zip(requests, found, strict=True):
        expected, most_likely = alone(team, request)
        assert nats == pytest.approx(expected, abs=2e-4) and greedy == most_likely
    assert found[-1][1]


@pytest.mark.parametrize("size", [1, 4])
def test_greedy_texts(team: Team, size: int) -> None:
    prompts = [[1, 2, 3], [5] * 17, list(range(40, 80)), [200]]
    made = team.generate(prompts, size, {"max_new_tokens": 9})
    for prompt, ids in zip(prompts, made, strict=True):
        expected = list(generate(team.live.model, prompt, max_new_tokens=9, stop={256}))  # type: ignore[arg-type]
        assert ids == expected


def test_stop_strings_and_end_of_text(team: Team) -> None:
    (whole,) = team.generate([[1, 2, 3]], 1, {"max_new_tokens": 12})
    text = team.codec.decode(whole)
    stop = text[3:5]
    (cut,) = team.generate([[1, 2, 3]], 1, {"max_new_tokens": 12, "stop_texts": [stop]})
    assert len(cut) < len(whole) and cut == whole[: len(cut)] and stop in team.codec.decode(cut)
    team.codec.stop_ids = frozenset({whole[4]})
    try:
        (ended,) = team.generate([[1, 2, 3]], 1, {"max_new_tokens": 12})
    finally:
        team.codec.stop_ids = frozenset({256})
    assert ended == whole[: whole.index(whole[4])]


def test_sampling_is_seeded_and_differs_between_repeats(team: Team) -> None:
    options = {"max_new_tokens": 8, "temperature": 1.5, "top_k": 50}
    first, again = (team.generate([[1, 2, 3]] * 4, 2, options) for _ in range(2))
    assert first == again and len({tuple(ids) for ids in first}) > 2
    assert team.generate([[1, 2, 3]] * 4, 2, {**options, "seed": 1}) != first


def test_nothing_to_do(team: Team) -> None:
    assert team.score([], 4) == [] and team.generate([], 4, {"max_new_tokens": 3}) == []
