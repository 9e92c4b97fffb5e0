"""A model where it lies: whole, or this rank's layers and parts of them. Scores tokens and continues prompts.

Every rank of a replica calls the same methods with the same arguments. Pipeline ranks hand each other the
residual stream; under tensor parallelism each rank has a part of the logits, and only maxima and sums of them
are exchanged. What is returned is right on every rank of the last stage, and after `share` on all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hlat.evaluate.batches import Batch, shape_bucket
from hlat.evaluate.sampling import NOT_FINITE, Sampling, draw, only
from hlat.model.attention import KVCache, branch_mask
from hlat.model.dtype import at_least_fp32
from hlat.model.products import linear
from hlat.parallel.pipeline import StagePart, stage_view

if TYPE_CHECKING:
    from hlat.backend.base import Backend
    from hlat.backend.collectives import VocabShard
    from hlat.model.decoder import Decoder

CHUNK_ELEMENTS = 1 << 25  # fp32 logits held at a time: 128 MiB


class LiveModel:
    """See the module.

    Args:
        model: this rank's layers, parallelised if it is more than one rank's.
        parts: its pipeline stages.
        backend: the rank's place, groups and device. Its layout's `sequence` says how the model was made.
    """

    def __init__(self, model: Decoder, parts: Sequence[StagePart], backend: Backend) -> None:
        self.model, self.backend, self.config = model, backend, model.config
        self.views = [(stage_view(model, part), part) for part in parts]
        self.has_head = any(part.last for part in parts)
        self.split = backend.layout.tp if backend.layout.sequence else 1
        self.dtype = next(model.parameters()).dtype

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients, evaluation mode, and compiled blocks run as they were written: new shapes would
        compile anew, and training's graphs stay as they are.
        """
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.model.train(training)

    def score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probability (nats, fp32) of each target of a batch, and whether it is the most likely token:
        (T,) each, zeros on ranks without the last stage. Where logits are not finite, nor is the former.

        Probabilities are over all rows of the embedding, padded ones too, as the harness's `hf` model has
        them and as the training loss has.
        """
        device = self.backend.device
        ids = torch.tensor(batch.ids, device=device)
        positions = torch.tensor(batch.positions, device=device)
        mask = branch_mask(torch.tensor(batch.branches, device=device)) if batch.branches else None
        hidden = self._through(ids, positions, mask=mask)
        targets = torch.tensor(batch.targets, device=device)
        if hidden is None:
            return torch.zeros(targets.shape, device=device), torch.zeros_like(targets, dtype=torch.bool)
        states_TD = hidden.flatten(0, 1)[torch.tensor(batch.places, device=device)]
        scored = [
            self._score_targets(self._logits(x), t)
            for x, t in zip(self._chunks(states_TD), self._chunks(targets), strict=True)
        ]
        self.backend.mark_step("eval")
        return torch.cat([p for p, _ in scored]), torch.cat([g for _, g in scored])

    def cache(self, rows: int, length: int, starts_B: Tensor) -> list[KVCache]:
        """An empty cache for each of this rank's stages."""
        return [view.new_cache(rows, length + self.split, starts_B) for view, _ in self.views]

    def feed(
        self,
        ids_BS: Tensor,
        first: int,
        caches: Sequence[KVCache],
        sampling: Sampling,
        allowed_V: Tensor | None = None,
        change: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Feed tokens in the slots from `first` on; returns what follows the last of them, int64 (B,), the
        same on every rank of the replica; NOT_FINITE for a row whose logits are not.

        Args:
            allowed_V: ids that may follow, bool (V,); None = all.
            change: what is done to whole logits (B, V) before one is chosen; None = nothing.
        """
        B, S = ids_BS.shape
        width = -(-S // self.split) * self.split  # what is fed too much is overwritten by the next call
        ids_BS = F.pad(ids_BS, (0, width - S))
        slots = torch.arange(first, first + width, device=ids_BS.device).expand(B, width)
        hidden = self._through(ids_BS, slots, caches=caches)
        chosen = torch.zeros(B, dtype=torch.int64, device=ids_BS.device)
        if hidden is not None:
            chosen = self._choose(self._logits(hidden[:, S - 1]), sampling, allowed_V, change)
        self.backend.mark_step("eval")
        # Tensor-parallel ranks agree; of the stages only the last one knows.
        return self.backend.groups.pp.all_reduce(chosen)

    def _through(
        self,
        ids_BS: Tensor,
        positions_BS: Tensor,
        mask: object = None,
        caches: Sequence[KVCache] | None = None,
    ) -> Tensor | None:
        """All stages. Final states (B, S, D) on ranks of the last stage, None on the others."""
        B, S = ids_BS.shape
        pp = self.backend.groups.pp
        last: Tensor | None = None
        for index, (view, part) in enumerate(self.views):
            x = ids_BS if part.first else self._receive(B, S)
            cache = caches[index] if caches is not None else None
            x = view.hidden(x, positions_BS, None, cache, mask)  # type: ignore[arg-type]
            if part.last:
                last = x
            else:
                dist.send(x.contiguous(), pp.ranks[(pp.rank + 1) % pp.size], group=pp.handle)
        if last is None or self._shard is None:
            return last
        return self._shard.region.enter(last)

    def _receive(self, rows: int, length: int) -> Tensor:
        pp, shape = self.backend.groups.pp, (rows, length // self.split, self.config.hidden)
        x_BSD = torch.empty(shape, dtype=self.dtype, device=self.backend.device)
        dist.recv(x_BSD, pp.ranks[pp.rank - 1], group=pp.handle)
        return x_BSD

    @property
    def _shard(self) -> VocabShard | None:
        return getattr(self.model.head, "shard", None)

    def _logits(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> this rank's columns of the logits, fp32 or wider (T, v)."""
        assert self.model.head is not None
        return at_least_fp32(linear(x_TD, self.model.head.weight))

    def _chunks(self, x: Tensor) -> tuple[Tensor, ...]:
        rows = shape_bucket(max(1, CHUNK_ELEMENTS // self.config.vocab))
        return x.split(rows)

    def _score_targets(self, logits_Tv: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
        if self._shard is None:
            greedy = logits_Tv.argmax(-1) == targets_T
            return logits_Tv.log_softmax(-1).gather(-1, targets_T[:, None])[:, 0], greedy
        group, start = self.backend.groups.tp, self._shard.start
        index = targets_T[:, None] - start
        held = (index >= 0) & (index < logits_Tv.shape[-1])
        target = logits_Tv.gather(-1, index.clamp(0, logits_Tv.shape[-1] - 1)) * held
        top = group.all_reduce(logits_Tv.amax(-1, keepdim=True), "max")
        sums = torch.stack([(logits_Tv - top).exp().sum(-1, keepdim=True), target])
        total, target = group.all_reduce(sums).unbind(0)
        return (target - top - total.log())[:, 0], self._argmax(logits_Tv) == targets_T

    def _argmax(self, logits_Tv: Tensor) -> Tensor:
        """Most likely token (T,), the first where several are; the same on all tensor-parallel ranks.
        NOT_FINITE where its logit is not finite.
        """
        top, index = logits_Tv.max(-1)  # NaN, if there is one
        if self._shard is None:
            return torch.where(top.isfinite(), index, NOT_FINITE)
        group = self.backend.groups.tp
        # Not every library's maximum over ranks lets NaN through. -inf is a part without any id allowed.
        unsound = top.isnan() | (top == float("inf"))
        top = top.masked_fill(unsound, float("-inf"))
        best, unsound = group.all_reduce(torch.stack([top, unsound.to(top.dtype)]), "max").unbind(0)
        nowhere = torch.full_like(index, -self.config.vocab)
        found = torch.where(top == best, -(index + self._shard.start), nowhere)
        found = -group.all_reduce(found, "max")
        return torch.where((unsound == 0) & best.isfinite(), found, NOT_FINITE)

    def _choose(
        self,
        logits_Bv: Tensor,
        sampling: Sampling,
        allowed_V: Tensor | None,
        change: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        if self._shard is None:
            logits_Bv = only(logits_Bv, allowed_V)
            if change is not None:
                return draw(change(logits_Bv), sampling)
            return self._argmax(logits_Bv) if sampling.greedy else draw(logits_Bv, sampling)
        start, columns = self._shard.start, logits_Bv.shape[-1]
        logits_Bv = only(logits_Bv, None if allowed_V is None else allowed_V[start : start + columns])
        if sampling.greedy and change is None:
            return self._argmax(logits_Bv)
        # Every rank draws the same tokens from the same whole logits.
        padded = F.pad(logits_Bv, (0, self._shard.rows - columns), value=float("-inf"))
        parts = self.backend.groups.tp.gather(padded)
        whole_BV = parts.transpose(0, 1).flatten(1)[:, : self.config.vocab]
        return draw(whole_BV if change is None else change(whole_BV), sampling)
