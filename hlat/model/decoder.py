"""The LLaMA-family decoder: embedding, blocks of attention and SwiGLU with pre-RMSNorm and RoPE, norm, head.

A plain `nn.Module`. Parallelism is applied from outside, by parameter name: on a pipeline stage layers may be
deleted from `layers`, and `embed`, `norm` or `head` set to None; names stay global in checkpoints.

Parameters, V = vocabulary, D = hidden size:
`embed.weight (V, D)`
`layers.{i}.attention_norm.weight (D)`, `layers.{i}.attention.{q,k,v,o}.weight`
`layers.{i}.mlp_norm.weight (D)`, `layers.{i}.mlp.{gate,up,down}.weight`
`norm.weight (D)`
`head.weight (V, D)`, the same parameter as `embed.weight` when embeddings are tied.
`classifier.weight (classes, D)`, only if the configuration has classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hlat.model.attention import Attention, KVCache, LayerCache, Mask, document_mask
from hlat.model.init import init_tensor
from hlat.model.mlp import MLP
from hlat.model.norm import RMSNorm
from hlat.model.products import Linear
from hlat.model.rope import Rope

if TYPE_CHECKING:
    from hlat.model.config import ModelConfig


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden, config.norm_eps)
        self.attention = Attention(
            config.hidden, config.heads, config.kv_heads, config.head_dim, config.attention
        )
        self.mlp_norm = RMSNorm(config.hidden, config.norm_eps)
        self.mlp = MLP(config.hidden, config.ffn)

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Mask | None = None,
        cache: LayerCache | None = None,
        slots_S: Tensor | None = None,
    ) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        # Positional calls: tensor-parallel input layouts are matched by position.
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rope, mask, cache, slots_S)
        return x_BSD + self.mlp(self.mlp_norm(x_BSD))


class Decoder(nn.Module):
    """The model. Build it under `torch.device("meta")`, then `to_empty(device=…)` and `init_weights(seed)` or
    load a checkpoint."""

    embed: nn.Embedding | None
    norm: RMSNorm | None
    head: nn.Linear | None
    classifier: nn.Linear | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.hidden)
        self.rope = Rope(config.head_dim, config.max_seq_len, config.rope_theta)
        self.layers = nn.ModuleDict({str(i): Block(config) for i in range(config.layers)})
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.head = Linear(config.hidden, config.vocab)
        self.classifier = Linear(config.hidden, config.classes) if config.classes else None
        self.tie()

    def tie(self) -> None:
        """Makes head.weight the same parameter as embed.weight if the configuration says so and this stage
        holds both.

        Call it after anything that replaced parameters one by one (`parallelize_module` does)."""
        if self.config.tie_embeddings and self.embed is not None and self.head is not None:
            self.head.weight = self.embed.weight

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Decoder:
        super()._apply(fn, recurse)
        self.tie()  # to_empty gives each module its own new tensor
        return self

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fills every parameter this model holds with `init_tensor` of its name, rounded to the parameter's
        dtype."""
        for name, parameter in self.named_parameters():
            parameter.copy_(init_tensor(self.config, name, parameter.shape, seed))

    def hidden(
        self,
        ids_BS: Tensor,
        positions_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
        cache: KVCache | None = None,
        mask: Mask | None = None,
    ) -> Tensor:
        """States after the final norm, (B, S, D) in the weights' dtype.

        Args:
            ids_BS: int64 token ids (B, S); on a stage without embedding, the states (B, S, D) of the stage
                before.
            positions_BS: int64 positions for RoPE, each below max_seq_len; None = 0, 1, 2, …
            documents_BS: int32 numbers; attention stays causal within equal numbers. None = plain causal.
            cache: keys and values of earlier calls. Then positions_BS are slots of the cache and required,
                shared by all rows, and documents_BS must be None.
            mask: another mask than these; neither documents_BS nor cache may be given then.
        """
        slots_S: Tensor | None = None
        if mask is None:
            mask, slots_S = self._mask(positions_BS, documents_BS, cache)
        elif cache is not None or documents_BS is not None:
            raise ValueError("a mask does not go with a cache or with documents_BS")
        if cache is not None and positions_BS is not None:
            positions_BS = cache.positions(positions_BS)
        rope = self.rope(positions_BS)
        x_BSD = self.embed(ids_BS) if self.embed is not None else ids_BS
        for name, block in self.layers.items():
            layer_cache = cache.layers[name] if cache is not None else None
            x_BSD = block(x_BSD, rope, mask, layer_cache, slots_S)
        return self.norm(x_BSD) if self.norm is not None else x_BSD

    def forward(
        self,
        ids_BS: Tensor,
        positions_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (B, S, V) in the weights' dtype; on a stage without head, the states (B, S, D).

        Arguments as for `hidden`.
        """
        x_BSD = self.hidden(ids_BS, positions_BS, documents_BS, cache)
        return self.head(x_BSD) if self.head is not None else x_BSD

    def _mask(
        self, positions_BS: Tensor | None, documents_BS: Tensor | None, cache: KVCache | None
    ) -> tuple[Mask | None, Tensor | None]:
        if cache is not None:
            if positions_BS is None or documents_BS is not None:
                raise ValueError("a cache needs positions_BS and does not go with documents_BS")
            return cache.mask(positions_BS), positions_BS[0]
        return (document_mask(documents_BS) if documents_BS is not None else None), None

    def new_cache(self, batch: int, length: int, starts_B: Tensor | None = None) -> KVCache:
        """An empty cache of the layers and heads this model holds, in the weights' dtype and device.

        Args:
            batch: rows.
            length: slots of each, at most.
            starts_B: as in `KVCache`.
        """
        weight, size = next(self.parameters()), self.config.head_dim
        first: Any = next(iter(self.layers.values()))
        heads = first.attention.k.weight.shape[0] // size
        longest = self.config.max_seq_len
        return KVCache(
            self.layers, batch, length, heads, size, weight.dtype, weight.device, starts_B, longest
        )
