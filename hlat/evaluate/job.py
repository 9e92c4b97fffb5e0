"""An evaluation from a command: alone, or in each of the processes that a launcher starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from hlat.backend.cluster import join
from hlat.backend.native import NativeBackend
from hlat.errors import UserError
from hlat.evaluate.running import Loaded, Selection, load_tasks, run_tasks
from hlat.evaluate.target import Target, choose_layout, load_team
from hlat.mesh import ONE_PROCESS

if TYPE_CHECKING:
    import torch

    from hlat.backend.base import Backend
    from hlat.backend.cluster import Cluster
    from hlat.evaluate.team import Team

FAREWELL_SECONDS = 10.0
SECONDS = 3600.0  # that ranks wait for each other: the first one may read questions meanwhile


class Evaluation:
    """The processes that evaluate together.

    Args:
        cluster: all of them.
        tp, pp: how a model is divided; the rest are replicas.
        dtype: to compute in.
        device: name of a device; None = this rank's GPU where there is one.
        tokenizer: another one than the checkpoints'.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        tp: int = 1,
        pp: int = 1,
        dtype: torch.dtype,
        device: torch.device | None = None,
        tokenizer: str | None = None,
    ) -> None:
        self.cluster, self.tp, self.pp = cluster, tp, pp
        self.dtype, self.device, self.tokenizer = dtype, device, tokenizer
        self._backends: dict[Any, Backend] = {}
        self._loaded: dict[Selection, Loaded] = {}

    @property
    def first(self) -> bool:
        """Whether this process prints."""
        return self.cluster.rank == 0

    def backend(self, target: Target) -> Backend:
        """This rank's view of the layout for a target's model."""
        layout = choose_layout(target.source, self.cluster.world, self.tp, self.pp)
        if layout not in self._backends:
            heads = target.source.meta["model"]["kv_heads"]
            alone = layout == ONE_PROCESS
            device = self.device if alone or self.device is not None else self.cluster.device
            self._backends[layout] = NativeBackend(layout, device=device, kv_heads=heads)
        return self._backends[layout]

    def run(self, target: Target, selection: Selection) -> dict[str, Any] | None:
        """The results of one target on the first rank, None on the others. Every rank calls it."""
        team = load_team(target, self.backend(target), self.dtype, self.tokenizer)
        return run_with(team, lambda: run_tasks(team, self._tasks(selection)))

    def _tasks(self, selection: Selection) -> Loaded:
        if selection not in self._loaded:
            self._loaded[selection] = load_tasks(selection)
        return self._loaded[selection]


def run_with(team: Team, ask: Callable[[], Any]) -> Any:
    """`ask` on the first rank of a team while the others serve; they return None, also when it fails."""
    if not team.first:
        team.serve()
        return None
    try:
        return ask()
    finally:
        team.dismiss()


@contextmanager
def gathered() -> Iterator[Cluster]:
    """The processes of this job, connected; at the end they part. A user's error reaches the ranks that
    have it; the others have been dismissed, or meet it themselves.
    """
    cluster = join()
    cluster.choose_device()
    cluster.connect(SECONDS)
    try:
        yield cluster
    except UserError:
        with suppress(UserError, RuntimeError):
            cluster.leave(FAREWELL_SECONDS)
        raise
    cluster.leave(SECONDS)
