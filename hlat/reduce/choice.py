"""From option values to compressors and error stores, and which pairs are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from hlat.errors import UserError
from hlat.reduce import compressors as kinds
from hlat.reduce.feedback import MakeCompressor, MakeStore
from hlat.reduce.stores import Exact, Nothing, Rounded, Sketch, sharing

CompressorName = Literal["block", "topk", "lowrank", "sign", "int8", "unbiased_block"]
ErrorName = Literal["sketch", "exact", "int8", "fp16", "none"]
_KINDS: dict[str, type[kinds.Compressor]] = {
    "block": kinds.Block,
    "topk": kinds.TopUnits,
    "lowrank": kinds.LowRank,
    "sign": kinds.Sign,
    "int8": kinds.Quantised,
    "unbiased_block": kinds.UnbiasedBlock,
}
_MOST_REPLICAS = 127  # a sum of int8 codes of at least one level each


@dataclass(frozen=True)
class Choice:
    """What is sent and what is remembered, as a recipe names it.

    compressor: block, topk, lowrank, sign, int8 or unbiased_block. ratio: share sent by the block and topk
    ones. rank: of lowrank. error: sketch, exact, int8, fp16 or none. size, beta: of the sketch; beta None is
    1 - size.
    """

    compressor: str = "block"
    ratio: float = 0.1
    rank: int = 4
    error: str = "sketch"
    size: float = 0.2
    beta: float | None = None

    def check(self, replicas: int) -> None:
        """Raise UserError for what cannot work, with the reason."""
        if not _KINDS[self.compressor].contractive and self.error != "none":
            raise UserError(
                f"{self.compressor} multiplies what it sends by {1 / self.ratio:g} to be right on average: "
                "what is left over is then larger than what went in, and feeding it back diverges",
                where="reduce.compressor",
                fix="take compressor block, or reduce.error=none",
            )
        if self.compressor in ("sign", "int8") and replicas > _MOST_REPLICAS:
            raise UserError(
                f"{self.compressor} codes of {replicas} replicas do not fit in an int8 sum",
                where="reduce.compressor",
                fix=f"take block, topk or lowrank, or at most {_MOST_REPLICAS} replicas",
            )
        if self.beta is None:
            return
        if self.error != "sketch":
            raise UserError(
                f"beta damps the noise of a sketch; error {self.error} is fed back whole",
                where="reduce.beta",
                fix="leave it out, or take reduce.error=sketch",
            )
        most = 1 / sharing(self.size)
        if 1 - self.beta > most + 1e-9:
            raise UserError(
                f"beta {self.beta:g} feeds back {1 - self.beta:.3g} of a sketch of size {self.size:g}: more "
                f"than {most:.3g} of it makes the error grow",
                where="reduce.beta",
                fix=f"write {1 - most:.3g} (the default) or more",
            )

    def compressor_maker(self) -> MakeCompressor:
        """A function that makes a bucket's compressor."""
        made: dict[str, MakeCompressor] = {
            "block": lambda grid, matrices, salt, device: kinds.Block(grid, self.ratio, salt),
            "unbiased_block": lambda grid, matrices, salt, device: kinds.UnbiasedBlock(
                grid, self.ratio, salt
            ),
            "topk": lambda grid, matrices, salt, device: kinds.TopUnits(grid, self.ratio),
            "lowrank": lambda grid, matrices, salt, device: kinds.LowRank(matrices, self.rank, salt, device),
            "sign": lambda grid, matrices, salt, device: kinds.Sign(),
            "int8": lambda grid, matrices, salt, device: kinds.Quantised(),
        }
        return made[self.compressor]

    def store_maker(self) -> MakeStore:
        """A function that makes a bucket's error store."""
        stores: dict[str, Callable[..., Nothing]] = {
            "sketch": lambda grid, device: Sketch(grid, device, self.size, self.beta),
            "exact": Exact,
            "int8": lambda grid, device: Rounded(grid, device, torch.int8),
            "fp16": lambda grid, device: Rounded(grid, device, torch.float16),
            "none": Nothing,
        }
        return stores[self.error]

    def __str__(self) -> str:
        """In a few words."""
        what = {"lowrank": f"lowrank {self.rank}", "sign": "sign", "int8": "int8"}.get(
            self.compressor, f"{self.compressor} {self.ratio:g}"
        )
        kept = f"sketch {self.size:g}" if self.error == "sketch" else self.error
        return f"{what}, error {kept}"
