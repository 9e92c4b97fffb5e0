"""What is to be started, checked before anything is written."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hlat.errors import UserError
from hlat.host.python import module
from hlat.launch.template import word
from hlat.paths import expand
from hlat.recipe import Recipe

if TYPE_CHECKING:
    from hlat.backend.neuron.profile import Setting

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]*")
# glibc reads the first when a process starts; the others must hold for every process of a node, tests of the
# network too. The rest of the Neuron profile is set by `hlat train`.
_BEFORE_PYTHON = ("MALLOC_ARENA_MAX", "FI_PROVIDER", "FI_EFA_USE_DEVICE_RDMA", "FI_EFA_FORK_SAFE")


@dataclass(frozen=True)
class Plan:
    """A run on a cluster.

    Attributes:
        recipe: what `name` and `overrides` (as on the command line) say.
        nodes: machines. processes: on each of them.
        python: the interpreter on the nodes.
        interface: of the network between the nodes; empty: the one their names lead to.
        grace: seconds for saving between the request to stop and the end.
        job_name: what the cluster calls the job.
        max_requeues: how often the cluster may start the job again.
        work_dir: where relative paths of the recipe begin.
    """

    recipe: Recipe
    name: str
    overrides: tuple[str, ...]
    nodes: int
    processes: int
    python: str = sys.executable
    interface: str = ""
    grace: int = 300
    job_name: str = ""
    max_requeues: int = 50
    work_dir: Path = Path()

    @property
    def run_dir(self) -> Path:
        """The run folder, absolute."""
        return Path(os.path.abspath(self.work_dir / expand(self.recipe.run.dir)))

    @property
    def title(self) -> str:
        """One line for people; made of checked names only."""
        plural = "s" if self.nodes > 1 else ""
        return f"{self.job_name}: {self.nodes} node{plural} of {self.processes} processes"

    def command(self, verb: str, overrides: Sequence[str] | None = None) -> list[str]:
        """`hlat VERB RECIPE [key=value …]` as a list of words."""
        name = f"./{self.name}" if self.name.startswith("-") else self.name
        words = self.overrides if overrides is None else overrides
        return module("hlat", verb, name, *words, python=self.python)

    def before_python(self) -> list[Setting]:
        """Variables of the Neuron profile that must be there when Python starts; none on other machines."""
        if self.recipe.backend != "nxd":
            return []
        from hlat.backend.neuron.profile import profile

        settings = profile(self.recipe, nodes=self.nodes, cores=self.processes)
        return [item for item in settings if item.name in _BEFORE_PYTHON]

    def environment(self) -> str:
        """These variables as shell lines; a value that is set already stays."""
        lines = (f"export {i.name}=${{{i.name}:-{word(i.value)}}} # {i.why}" for i in self.before_python())
        return "\n".join(lines)

    def check(self, environ: Mapping[str, str] = os.environ) -> None:
        """Raise UserError for what could not work: numbers, names, layout, batch, variables."""
        for option, number in (("--nodes", self.nodes), ("--nproc-per-node", self.processes)):
            if not 1 <= number <= 65535:
                raise UserError(f"{number} is out of range", where=option, fix="write 1 or more")
        if not 1 <= self.grace <= 65000:
            raise UserError(f"{self.grace} is out of range", where="--grace", fix="write 1 to 65000 seconds")
        if self.max_requeues < 0:
            raise UserError(
                f"{self.max_requeues} is out of range", where="--max-requeues", fix="write 0 or more"
            )
        allowed("--job-name", self.job_name, NAME)
        allowed("--interface", self.interface, _INTERFACE)
        self.check_recipe(self.recipe, environ)

    def check_recipe(self, recipe: Recipe, environ: Mapping[str, str] = os.environ) -> None:
        """Raise UserError when a recipe cannot run on these nodes."""
        from hlat.train.runnable import check_runnable

        check_runnable(recipe, self.nodes, self.processes, environ)


def allowed(option: str, value: str, pattern: re.Pattern[str]) -> None:
    """Raise UserError unless an option's value is empty or matches."""
    if value and not pattern.fullmatch(value):
        fix = f"it must match {pattern.pattern}"
        raise UserError(f"{value!r} is not allowed here", where=option, fix=fix)
