"""A live model's scores and texts equal those of one plain forward pass for each request."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hlat.backend.native import NativeBackend
from hlat.data.tokenizer import BytesTokenizer
from hlat.evaluate.batches import Request
from hlat.evaluate.generate import generate
from hlat.evaluate.live import LiveModel
from hlat.evaluate.rules import Rules, Step
from hlat.evaluate.sampling import NOT_FINITE, Sampling, drawable
from hlat.evaluate.team import BROKEN, LIMIT, STOPPED, Team
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
        expected = list(generate(team.live.model, prompt, max_new_tokens=9, stop={256}, known=257))  # type: ignore[arg-type]
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


@contextmanager
def weights(team: Team, **rows: dict[int, float]) -> Iterator[None]:
    """The model with some rows of its embedding or head filled with a value."""
    model = team.live.model
    former = {name: getattr(model, name).weight.detach().clone() for name in rows}
    try:
        for name, values in rows.items():
            for row, value in values.items():
                getattr(model, name).weight.data[row] = value
        yield
    finally:
        for name, value in former.items():
            getattr(model, name).weight.data.copy_(value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_question_that_is_not_finite_leaves_the_others_alone(team: Team, value: float) -> None:
    requests = [Request((1, 2, 3, 4), (5,)), Request((1, 2, 200), (5,)), Request((200, 7), (8, 9))]
    requests += [Request((9,) * n, (5, 6)) for n in range(1, 6)]
    expected = team.score(requests, 1)
    with weights(team, embed={200: value}):
        found = team.score(requests, 1)
        made = team.generate([[1, 2], [200, 3]], 2, {"max_new_tokens": 3})
        drawn = team.generate([[1, 2], [200, 3]], 2, {"max_new_tokens": 3, "temperature": 1.0})
    assert [math.isnan(nats) for nats, _ in found] == [False, True, True] + [False] * 5
    assert found[0] == expected[0] and found[3:] == expected[3:]
    assert [ids.end for ids in made] == [ids.end for ids in drawn] == [LIMIT, BROKEN]
    assert made[1] == [] and len(made[0]) == 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_is_not_finite_scores_nothing(team: Team, value: float) -> None:
    with weights(team, head={7: value}):
        found = team.score([Request((1, 2, 3), (n,)) for n in (5, 7)], 4)
        made = team.generate([[1, 2]], 2, {"max_new_tokens": 3})
    assert all(math.isnan(nats) for nats, _ in found) and made[0].end == BROKEN


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1e20}])
def test_ids_that_the_tokenizer_does_not_know_are_never_made(team: Team, options: dict[str, float]) -> None:
    """The model has 260 ids, the tokenizer 257: without care they are made, counted, and give no text."""
    with torch.no_grad():
        state = team.live.model.hidden(torch.tensor([[1, 2, 3]]))[0, -1]
    rows = dict.fromkeys((257, 258, 259), 0.0)
    with weights(team, head=rows):
        for row in rows:
            team.live.model.head.weight.data[row] = 50 * state / state.norm()
        made = team.generate([[1, 2, 3]] * 6, 6, {"max_new_tokens": 8, **options})
        alone = list(generate(team.live.model, [1, 2, 3], max_new_tokens=8, known=257, **options))  # type: ignore[arg-type]
        with torch.no_grad():
            logits = team.live.model(torch.tensor([[1, 2, 3]]))[0, -1].double()
        ((nats, _),) = team.score([Request((1, 2, 3), (5,))], 1)
    assert int(logits.argmax()) > 256 and all(ids and max(ids) < 257 for ids in (*made, alone))
    # A log-likelihood is that of the whole softmax, as in training and in the harness's own model.
    assert nats == pytest.approx(float(logits.log_softmax(-1)[5]), abs=1e-3)


def test_what_ends_a_generation(team: Team) -> None:
    (whole,) = team.generate([[1, 2, 3]], 1, {"max_new_tokens": 12})
    assert whole.end == LIMIT
    text = team.codec.decode(whole)[3:5]
    (cut,) = team.generate([[1, 2, 3]], 1, {"max_new_tokens": 12, "stop_texts": [text]})
    assert cut.end == STOPPED
    team.codec.stop_ids = frozenset({whole[1]})
    try:
        options = {"max_new_tokens": 12}
        assert team.generate([[1, 2, 3]], 1, options)[0].end == STOPPED
        (longer,) = team.generate([[1, 2, 3]], 1, {**options, "min_new_tokens": 5})
        assert len(longer) >= 5 and whole[1] not in longer[:5]
    finally:
        team.codec.stop_ids = frozenset({256})
    with pytest.raises(ValueError, match="90 tokens and 7 new ones are more than 96"):
        team.generate([[1] * 90], 1, {"max_new_tokens": 7})


@pytest.mark.parametrize("split", [2, 3, 8])
@pytest.mark.parametrize("count", [1, 5, 8])
def test_a_stream_split_along_the_sequence_goes_to_the_last_position(
    team: Team, split: int, count: int
) -> None:
    """What pads a row to a multiple of the ranks lies beyond the model's last position."""
    prompts = [list(range(40, 40 + 96 - count)), [7] * 30]
    expected = team.generate(prompts, 2, {"max_new_tokens": count})
    team.live.split = split
    try:
        assert team.generate(prompts, 2, {"max_new_tokens": count}) == expected
    finally:
        team.live.split = 1
    assert expected[0] == list(
        generate(team.live.model, prompts[0], max_new_tokens=count, stop={256}, known=257)  # type: ignore[arg-type]
    )


class Threads:
    """Ranks of a group that are threads. Its maximum passes over NaN, as some libraries' does."""

    def __init__(self, size: int) -> None:
        self._barrier, self._parts = threading.Barrier(size), [torch.empty(0)] * size

    def gather(self, rank: int, x: torch.Tensor) -> torch.Tensor:
        self._parts[rank] = x
        self._barrier.wait(60)
        found = torch.stack(self._parts)
        self._barrier.wait(60)
        return found

    def reduce(self, rank: int, x: torch.Tensor, op: str) -> torch.Tensor:
        found = self.gather(rank, x)
        least = found.nan_to_num(-math.inf, math.inf, -math.inf) if found.is_floating_point() else found
        return least.amax(0) if op == "max" else found.sum(0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("banned", [[], [2, 5]])
def test_every_rank_of_a_spread_vocabulary_chooses_alike(
    size: int, temperature: float, banned: list[int]
) -> None:
    """Ten ids, the last three of no token, so that one rank of three has nothing that may be chosen."""
    rows = torch.randn(7, 10, generator=torch.Generator().manual_seed(2))
    rows[1, 9] = rows[2, 8] = 40.0  # likeliest, and of no token
    rows[3, 0], rows[4, 6], rows[5, 3], rows[6, 8] = math.nan, math.nan, math.inf, math.nan
    width, group, found = -(-10 // size), Threads(size), [torch.empty(0)] * size
    rules, steps = Rules({"suppress_tokens": banned}), [Step([1], 1, last=False)] * 7

    def choose(rank: int) -> None:
        live: Any = LiveModel.__new__(LiveModel)
        live.config = SimpleNamespace(vocab=10)
        shard = SimpleNamespace(start=rank * width, rows=width) if size > 1 else None
        live.model = SimpleNamespace(head=SimpleNamespace(shard=shard))
        tp = SimpleNamespace(
            all_reduce=lambda x, op="sum": group.reduce(rank, x, op), gather=lambda x: group.gather(rank, x)
        )
        live.backend = SimpleNamespace(groups=SimpleNamespace(tp=tp))
        sampling = Sampling(temperature, generator=torch.Generator().manual_seed(0))
        allowed = drawable(10, 7, {3}, torch.device("cpu"))
        change = (lambda logits_BV: rules.apply(logits_BV, steps)) if banned else None
        part = rows[:, rank * width : (rank + 1) * width].clone()
        found[rank] = live._choose(part, sampling, allowed, change)

    threads = [threading.Thread(target=choose, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(part.tolist() == found[0].tolist() for part in found)
    assert found[0][3:6].tolist() == [NOT_FINITE] * 3
    sound = found[0][[0, 1, 2, 6]]
    assert int(sound.min()) >= 0 and int(sound.max()) < 7
    assert not set(banned) & set(sound.tolist())
    if not temperature:
        rows[:, banned] = -math.inf
        assert sound.tolist() == rows[[0, 1, 2, 6], :7].argmax(-1).tolist()


def asked(kind: str, text: str, **options: Any) -> SimpleNamespace:
    """A request as the harness makes it."""
    arguments = (text, options) if options else (text,)
    return SimpleNamespace(args=arguments, doc={}, doc_id=0, task_name=kind)


def test_texts_in_windows_and_prompts_beside_long_generations_are_counted(team: Team) -> None:
    """The context is 96 tokens: two of the texts need windows; a prompt keeps what new tokens leave of it."""
    pytest.importorskip("lm_eval")
    from hlat.evaluate.harness import lm_class, note_lines

    model = lm_class()(pretrained=team, collect=True)
    model.loglikelihood_rolling([asked("bits", "x" * size) for size in (96, 97, 300)])
    assert dict(model.notes) == {"windowed": 2}
    assert note_lines(model.said())[0].startswith("2 texts longer than the model's context were cut into win")
    for wanted, kept in ((95, 1), (96, 48), (10, 86)):
        model = lm_class()(pretrained=team, collect=True)
        model.generate_until([asked("text", "x" * 200, until=["\n"], max_gen_toks=wanted)])
        assert model.notes["dropped_tokens"] == 200 - kept and model.notes["truncated"] == 1
