"""Classification with a decoder: by the likelihood of each label's word, or by a linear head.

The score of a label is the mean log-likelihood of its tokens after the prompt, and the likeliest label is the
answer, as MeZO scores candidates (Malladi et al. 2023, arXiv 2305.17333, appendix E.2); the mean keeps long
words from losing for their length. The loss is
    words   cross-entropy of the right label in a softmax over the labels' scores (MeZO's classification loss)
    tokens  next-token loss of the right label's tokens (MeZO's loss for autoregressive models)
    head    cross-entropy of a linear classifier of the last prompt token's state (as MeZO-SVRG, arXiv
            2404.08080, finetunes without prompts)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hlat.backend.collectives import VocabShard, all_reduce
from hlat.data.batch import IGNORE, LabelledBatch
from hlat.model.products import linear, matmul
from hlat.objective.causal_lm import CausalLM, Decoder, chunk_size
from hlat.registry import register

if TYPE_CHECKING:
    from hlat.backend.groups import Group
    from hlat.data.batch import Batch


class Classifier(Decoder, Protocol):
    """What the objective needs of a model: a decoder, and `classifier` (classes, D) for a linear head."""

    classifier: nn.Linear | None


@register("objective", "classification")
class Classification:
    """Right label among a few, by each label's word or by a linear head; evaluation reports accuracy."""

    every_token = False  # logits are made where a label is predicted only

    def __init__(self, *, by: Literal["words", "tokens", "head"] = "words") -> None:
        self.by, self._tokens = by, CausalLM()
        self._correct: Tensor | None = None
        self.unsound = torch.zeros((), dtype=torch.int64)

    def start_counting(self, device: torch.device) -> None:
        """From now on count the examples whose likeliest label is the right one."""
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self.unsound = torch.zeros_like(self._correct)

    def counted(self) -> Tensor:
        """How many there were since `start_counting`, int64 (); stops counting. `unsound`, int64 (), is the
        number of examples with scores that are not finite: none of their labels is the likeliest, and with
        any of them the count says nothing.
        """
        assert self._correct is not None
        count, self._correct = self._correct, None
        return count

    def loss(self, model: Classifier, batch: Batch, denominator: Tensor) -> Tensor:
        """fp32 () summed loss over `denominator` (), of the examples (`words`, `head`) or of the tokens of
        their labels (`tokens`); differentiable. On tensor-parallel ranks every one gets the whole loss.
        """
        if not isinstance(batch, LabelledBatch):
            return self._tokens.loss(model, batch, denominator)
        scale = 1.0 / denominator.to(torch.float32)
        x_ND, head = self._states(model, batch)
        if self.by == "head":
            scores_BC = linear(x_ND, head).float()
            loss = F.cross_entropy(scores_BC, batch.labels, ignore_index=IGNORE, reduction="sum")
        else:
            assert batch.tokens is not None
            log_p_NL = self._log_p(model, x_ND, batch.tokens)
            counted_NL = batch.tokens != IGNORE
            sums_BC = log_p_NL.sum(-1).view(len(batch.labels), -1)
            scores_BC = sums_BC / counted_NL.sum(-1).view_as(sums_BC)
            if self.by == "words":
                loss = F.cross_entropy(scores_BC, batch.labels, ignore_index=IGNORE, reduction="sum")
            else:
                right = sums_BC.gather(1, batch.labels.clamp(min=0)[:, None])[:, 0]
                loss = -(right * (batch.labels != IGNORE)).sum()
        if self._correct is not None:
            sound_B = scores_BC.isfinite().all(-1)
            self._correct += (sound_B & (scores_BC.argmax(-1) == batch.labels)).sum()
            self.unsound += (~sound_B & (batch.labels != IGNORE)).sum()
        return loss * scale

    def _states(self, model: Classifier, batch: LabelledBatch) -> tuple[Tensor, Tensor]:
        """States where labels are predicted, (N L, D), and the matrix that they meet."""
        x_BSD = model.hidden(batch.ids, batch.positions, batch.documents)
        shard: VocabShard | None = getattr(model.head, "shard", None)
        if shard is not None:
            x_BSD = shard.region.enter(x_BSD)
            if self.by == "head":  # each rank makes the whole gradient, and leaving backward sums them
                x_BSD = _scale_gradient(x_BSD, 1 / shard.region.size)
        rows, length, width = x_BSD.shape
        per_row = batch.places.shape[0] // rows
        row_N = torch.arange(batch.places.shape[0], device=x_BSD.device) // per_row
        index = (row_N[:, None] * length + batch.places).reshape(-1)
        matrix = model.classifier if self.by == "head" else model.head
        assert matrix is not None
        return x_BSD.reshape(-1, width).index_select(0, index), matrix.weight

    def _log_p(self, model: Classifier, x_TD: Tensor, tokens_NL: Tensor) -> Tensor:
        """log p of each token of each label, fp32 (N, L); 0 where there is none."""
        shard: VocabShard | None = getattr(model.head, "shard", None)
        weight = model.head.weight
        rows = weight.shape[0] if shard is None else shard.rows
        start, group = (0, None) if shard is None else (shard.start, shard.region.group)
        size = chunk_size(x_TD.shape[0], rows)
        log_p = TokenLogProbability.apply(x_TD, weight, tokens_NL.reshape(-1), start, group, size)
        return log_p.view_as(tokens_NL)  # type: ignore[no-any-return]


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, whose gradient is multiplied by `factor`."""
    return x.detach() + (x - x.detach()) * factor if x.requires_grad else x


class TokenLogProbability(torch.autograd.Function):
    """log softmax(x W^T) at one token for each row of x, over chunks of rows: of the logits only one chunk
    exists at a time, in fp32, and backward makes it once more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_VD: Tensor,
        tokens_T: Tensor,
        start: int,
        group: str | Group | None,
        size: int,
    ) -> Tensor:
        """Log-probabilities, fp32 (T); 0 for token -100.

        Args:
            x_TD, weight_VD: of one dtype. With a group, the rank's columns `start` and on of the logits.
            tokens_T: int64.
            start: first row of the head that `weight_VD` holds.
            group: the ranks over which the head is spread, or None.
            size: rows of x in a chunk.
        """
        log_p, totals = [], []
        for first in range(0, x_TD.shape[0], size):
            z = matmul(x_TD[first : first + size], weight_VD.T).float()
            held, index, counted = _columns(tokens_T[first : first + size], start, z.shape[-1])
            top = z.amax(-1)
            top = top if group is None else all_reduce(top, group, "max")
            total = (z - top[:, None]).exp().sum(-1)
            target = z.gather(-1, index[:, None])[:, 0] * held
            if group is not None:
                total, target = all_reduce(torch.stack([total, target]), group).unbind(0)
            totals.append(top + total.log())
            log_p.append((target - totals[-1]) * counted)
        ctx.save_for_backward(x_TD, weight_VD, tokens_T, torch.cat(totals))
        ctx.start, ctx.size = start, size
        return torch.cat(log_p)

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:  # type: ignore[override]
        """With respect to x (this rank's columns only) and weight."""
        x_TD, weight_VD, tokens_T, totals_T = ctx.saved_tensors
        dx, dw = torch.empty_like(x_TD), torch.zeros_like(weight_VD, dtype=torch.float32)
        for first in range(0, x_TD.shape[0], ctx.size):
            part = slice(first, first + ctx.size)
            z = matmul(x_TD[part], weight_VD.T).float()
            held, index, counted = _columns(tokens_T[part], ctx.start, z.shape[-1])
            one_hot = (torch.arange(z.shape[-1], device=z.device)[None, :] == index[:, None]) & held[:, None]
            dz = one_hot.float() - (z - totals_T[part, None]).exp()
            dz = (dz * (grad_T[part] * counted)[:, None]).to(x_TD.dtype)
            dx[part] = matmul(dz, weight_VD)
            dw += matmul(dz.T, x_TD[part])
        return dx, dw.to(weight_VD.dtype), None, None, None, None


def _columns(tokens_T: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whether this rank's columns hold each token, which one (some column if not), and whether it counts."""
    index = tokens_T - start
    held = (index >= 0) & (index < columns)
    return held, index.clamp(0, columns - 1), tokens_T != IGNORE
