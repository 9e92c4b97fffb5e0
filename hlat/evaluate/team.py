"""All ranks of an evaluation: the first one asks, every one works.

Only the first rank knows tasks and texts. What it wants computed goes to all ranks as JSON; each replica
takes its share of the batches, and the sums of what they found are on every rank. The others `serve` until
they are dismissed. With one rank nothing is sent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hlat.evaluate.batches import Batch, Request, plan, shape_bucket, share_beginnings
from hlat.evaluate.rules import Rules, Step
from hlat.evaluate.sampling import NOT_FINITE, Sampling, drawable, going_on

if TYPE_CHECKING:
    from hlat.evaluate.chat import ChatTemplates
    from hlat.evaluate.live import LiveModel
    from hlat.evaluate.text import TextCodec

Score = tuple[float, bool]
"""Log-probability of a continuation in nats, and whether each of its tokens is the most likely one. The first
is NaN where the model's logits are not finite."""

STOPPED, LIMIT, BROKEN = "stop", "limit", "not finite"
_ENDS = (LIMIT, STOPPED, BROKEN)  # by number, for the way from rank to rank


class Continuation(list[int]):
    """Ids that continue a prompt. end: what ended them: `stop` (an end-of-text id or a stop string), `limit`
    (so many were asked for), or `not finite` (logits).
    """

    def __init__(self, ids: Iterable[int] = (), end: str = LIMIT) -> None:
        super().__init__(ids)
        self.end = end


class Team:
    """The ranks that evaluate a model together.

    Args:
        live: this rank's model.
        codec: decodes what is generated, to find stop strings.
        beat: called now and then while work goes on.
        chat: the chat templates of the model's tokenizer.
        generation: the model's generation_config.json.
        held_out: share of the standard library's documents that the model was not trained on; None: it is
            not known.
    """

    def __init__(
        self,
        live: LiveModel,
        codec: TextCodec,
        beat: Callable[[], None] = lambda: None,
        chat: ChatTemplates | None = None,
        generation: Mapping[str, Any] | None = None,
        held_out: float | None = None,
    ) -> None:
        self.live, self.codec, self.beat, self.held_out = live, codec, beat, held_out
        self.chat, self.generation = chat, generation or {}
        backend = live.backend
        self._world, self._device = backend.groups.world, backend.device
        self._replica, self._replicas = backend.place.dp, backend.layout.dp
        # One rank of a replica reports: of its last stage, the first that shares it.
        self._reports = live.has_head and backend.place.tp == 0

    @property
    def first(self) -> bool:
        """Whether this rank asks."""
        return self._world.rank == 0

    def serve(self) -> None:
        """Work until dismissed. Every rank but the first calls it."""
        while (job := self._message(None)) is not None:
            self._work(job)

    def dismiss(self) -> None:
        """Let the others return from `serve`."""
        self._message("null")

    def score(self, requests: Sequence[Request], batch_size: int) -> list[Score]:
        """Scores in the order of the requests. Only the first rank calls it."""
        if not requests:
            return []
        rows = share_beginnings(list(enumerate(requests)), max(len(r.tokens) for r in requests))
        graphs = self._device.type not in ("cpu", "cuda")
        batches = sorted(
            plan(rows, batch_size, 8 * self.live.split, few_shapes=graphs), key=lambda batch: -batch.cost
        )
        job = {
            "kind": "score",
            "batches": [batch.to_json() for batch in batches],
            "count": len(requests),
        }
        scores: list[Score] = self._ask(job)
        return scores

    def generate(
        self, prompts: Sequence[Sequence[int]], batch_size: int, options: dict[str, Any]
    ) -> list[Continuation]:
        """Ids that continue each prompt, without the end-of-text id. Only the first rank calls it.

        Args:
            options: `max_new_tokens`; `min_new_tokens`, before which no end-of-text id is made;
                `stop_texts`; `temperature`, `top_k`, `top_p`, `min_p`, `typical_p`, `seed`; `rules`, as
                `Rules` takes them.
        """
        if not prompts:
            return []
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        job = {
            "kind": "generate",
            "prompts": [list(prompt) for prompt in prompts],
            "batches": batches,
            "options": options,
        }
        made: list[Continuation] = self._ask(job)
        return made

    def _ask(self, job: dict[str, Any]) -> Any:
        if self._world.size == 1:
            return self._work(job)
        return self._work(self._message(json.dumps(job)))

    def _message(self, text: str | None) -> Any:
        """The first rank's text on every rank, parsed."""
        if self._world.size == 1:
            return json.loads(text or "null")
        raw = torch.frombuffer(bytearray((text or " ").encode()), dtype=torch.uint8).to(self._device)
        size = self._world.broadcast(torch.tensor([raw.numel()], device=self._device))
        if text is None:
            raw = torch.empty(int(size), dtype=torch.uint8, device=self._device)
        return json.loads(bytes(self._world.broadcast(raw).cpu().numpy()))

    def _work(self, job: dict[str, Any]) -> Any:
        with self.live.evaluating():
            if job["kind"] == "score":
                return self._score(job)
            return self._generate(job)

    def _score(self, job: dict[str, Any]) -> list[Score]:
        nats = torch.zeros(job["count"], dtype=torch.float64)
        misses = torch.zeros(job["count"], dtype=torch.float64)
        found = []
        for number, fields in enumerate(job["batches"]):
            if number % self._replicas == self._replica:
                self.beat()
                found.append((fields["owners"], *self.live.score(Batch(**fields))))
        for owners, logp, greedy in found if self._reports else []:
            index = torch.tensor(owners)
            real = index >= 0
            nats.index_add_(0, index[real], logp.cpu().double()[real])
            misses.index_add_(0, index[real], (~greedy.cpu()[real]).double())
        # A sum of infinities of two signs, or of shares of ranks, may be anything: what is not finite is NaN.
        nats, misses = self._sum(torch.where(nats.isfinite(), nats, torch.nan)), self._sum(misses)
        return [(total, missed == 0) for total, missed in zip(nats.tolist(), misses.tolist(), strict=True)]

    def _generate(self, job: dict[str, Any]) -> list[Continuation]:
        prompts, options = job["prompts"], job["options"]
        # What ended it, then one more than each id: 0 is no token, and ranks with nothing add nothing.
        made = torch.zeros(len(prompts), 1 + options["max_new_tokens"], dtype=torch.float64)
        for number, members in enumerate(job["batches"]):
            if number % self._replicas != self._replica:
                continue
            rows = continue_prompts(
                self.live, self.codec, [prompts[m] for m in members], {**options, "number": number}, self.beat
            )
            for member, ids in zip(members, rows, strict=True):
                made[member, 0] = _ENDS.index(ids.end)
                made[member, 1 : 1 + len(ids)] = torch.tensor(ids, dtype=torch.float64) + 1
        if not self._reports:
            made.zero_()
        return [
            Continuation((int(value) - 1 for value in ids if value > 0), _ENDS[int(end)])
            for end, *ids in self._sum(made).tolist()
        ]

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        wide = torch.float64 if self._device.type in ("cpu", "cuda") else torch.float32
        return self._world.all_reduce(values.to(self._device, wide)).cpu()


def continue_prompts(
    live: LiveModel,
    codec: TextCodec,
    prompts: Sequence[Sequence[int]],
    options: dict[str, Any],
    beat: Callable[[], None] = lambda: None,
) -> list[Continuation]:
    """Ids that continue each prompt, together in one batch of static shape; ends a row at an end-of-text id,
    once its text holds a stop string, or after `max_new_tokens`. Only ids that the tokenizer knows are made.
    Arguments as in `Team.generate`; `number` of the batch goes into the seed.
    """
    device, count = live.backend.device, options["max_new_tokens"]
    longest = max(len(prompt) for prompt in prompts)
    if longest + count > live.config.max_seq_len:
        raise ValueError(f"{longest} tokens and {count} new ones are more than {live.config.max_seq_len}")
    width = shape_bucket(longest, 8 * live.split)
    starts = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    seed = options.get("seed", 0) * 1_000_003 + options.get("number", 0)
    generator = torch.Generator(device=device).manual_seed(seed % (1 << 63))
    names = ("top_k", "top_p", "min_p", "typical_p")
    drawing = {name: options.get(name) for name in names}
    sampling = Sampling(options.get("temperature", 0.0), generator=generator, **drawing)
    rules = Rules(options.get("rules") or {}, codec.stop_ids)
    allowed = drawable(live.config.vocab, codec.tokenizer.vocab_size, codec.stop_ids, device)
    early = going_on(live.config.vocab, allowed, codec.stop_ids, device)
    caches = live.cache(len(prompts), shape_bucket(width + count), starts)
    rows = [Continuation() for _ in prompts]
    running = set(range(len(prompts)))
    slot = 0
    for step in range(count):
        beat()
        choice = early if step < options.get("min_new_tokens", 0) else allowed
        change = _rule(rules, prompts, rows, step == count - 1) if rules else None
        chosen = live.feed(ids, slot, caches, sampling, choice, change)
        slot += ids.shape[1]
        for row, token in zip(sorted(running), chosen[sorted(running)].tolist(), strict=True):
            if _ends(codec, rows[row], token, options.get("stop_texts", ())):
                running.discard(row)
        if not running or step == count - 1:
            break
        ids = chosen.clamp(min=0)[:, None]  # a row without a next token is fed something
    return rows


def _rule(
    rules: Rules, prompts: Sequence[Sequence[int]], rows: Sequence[Continuation], last: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the rules do to the logits of the next tokens of all rows."""
    steps = [Step([*prompt, *row], len(prompt), last) for prompt, row in zip(prompts, rows, strict=True)]
    return lambda logits_BV: rules.apply(logits_BV, steps)


def _ends(codec: TextCodec, row: Continuation, token: int, stops: Sequence[str]) -> bool:
    """Add a token to a row; whether it is the last."""
    if token == NOT_FINITE:
        row.end = BROKEN
    elif token in codec.stop_ids:
        row.end = STOPPED
    else:
        row.append(token)
        if codec.stopped(row, stops):
            row.end = STOPPED
    return row.end != LIMIT
