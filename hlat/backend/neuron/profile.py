"""The Neuron environment of one run: what the table gives for a recipe, what the user set, what contradicts.

    settings = profile(recipe, nodes=16)
    report = apply(settings)          # before torch_xla is imported
    conflicts(recipe, os.environ, nodes=16)

A variable that is set already is the user's and stays. NEURON_CC_FLAGS is merged flag by flag.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hlat.backend.neuron.limits import check_cores, check_nodes, flash_unfit
from hlat.backend.neuron.release import PRIMARY, installed
from hlat.backend.neuron.table import CACHE, FLAGS, VARIABLES, Facts, Row
from hlat.errors import UserError

if TYPE_CHECKING:
    from hlat.recipe import Recipe

CC_FLAGS = "NEURON_CC_FLAGS"
CORES = 32  # of a trn1.32xlarge; one process each
DEPRECATED = ("XLA_USE_BF16", "XLA_DOWNCAST_BF16")
_M_ARENA_MAX = -8  # malloc.h


@dataclass(frozen=True)
class Setting:
    """A variable or compiler flag with the value HLAT chose, the reason and the source."""

    name: str
    value: str
    why: str
    source: str
    kind: str = "variable"

    @property
    def text(self) -> str:
        """A flag as it stands in NEURON_CC_FLAGS: --model-type=transformer."""
        return f"{self.name}={self.value}" if self.value else self.name


@dataclass(frozen=True)
class Applied:
    """A setting as the run has it. origin: 'hlat', or 'user' where another value was set already."""

    name: str
    value: str
    origin: str
    hlat: str
    why: str
    source: str
    kind: str = "variable"

    def to_dict(self) -> dict[str, Any]:
        """As environment.json holds it."""
        return asdict(self)


def flash_attention(recipe: Recipe) -> bool:
    """Whether attention runs in NxD's flash kernel: by the recipe, or where it fits."""
    if recipe.model.attention != "auto":
        return recipe.model.attention == "flash"
    return not flash_unfit(recipe.data.seq_len, recipe.data.document_mask)


def facts_of(recipe: Recipe, nodes: int = 1, cores: int = CORES) -> Facts:
    """What of a recipe and a cluster decides the profile."""
    parallel = recipe.parallel
    return Facts(
        tp=parallel.tp,
        pp=parallel.pp,
        zero1=parallel.zero1,
        flash=flash_attention(recipe),
        stochastic=recipe.precision.rounding == "stochastic",
        seed=recipe.run.seed,
        wait=max(parallel.timeout, parallel.first_timeout),
        nodes=nodes,
        cores=cores,
    )


def profile(
    recipe: Recipe, platform: str = "trn1", nodes: int = 1, *, cores: int = CORES, sdk: str = PRIMARY.name
) -> list[Setting]:
    """Flags and variables for a run, in the table's order; NEURON_CC_FLAGS, made of the flags, is the last.

    Args:
        recipe: the run.
        platform: 'trn1' (NxD on torch_xla) or 'trn2' (native PyTorch; also for trn3).
        nodes: instances.
        cores: NeuronCores used on each.
        sdk: release of the Neuron SDK.
    """
    facts = facts_of(recipe, nodes, cores)
    flags = _settings(FLAGS, facts, platform, sdk)
    variables = _settings(VARIABLES, facts, platform, sdk)
    if flags:
        text = " ".join(flag.text for flag in flags)
        variables.append(Setting(CC_FLAGS, text, "the flags above", "see each flag"))
    return [*flags, *variables]


def _settings(rows: Iterable[Row], facts: Facts, platform: str, sdk: str) -> list[Setting]:
    found = []
    for row in rows:
        value = row.value(facts) if platform in row.platforms and row.covers(sdk) else None
        if value is not None:
            found.append(Setting(row.name, value, row.why, row.source, row.kind))
    return found


def merged(settings: Iterable[Setting], environ: Mapping[str, str]) -> list[Applied]:
    """What the run has when the user's variables win; changes nothing."""
    settings = list(settings)
    given = parse_flags(environ.get(CC_FLAGS, ""))
    report = []
    for setting in settings:
        if setting.name == CC_FLAGS:
            kept = [Setting(name, value, "", "").text for name, value in given.items()]
            added = [item.text for item in settings if item.kind == "flag" and item.name not in given]
            value = " ".join([*kept, *added])
            own = any(given.get(item.name, item.value) != item.value for item in settings)
            own = own or bool(given.keys() - {item.name for item in settings})
        else:
            source = given if setting.kind == "flag" else environ
            value = source.get(setting.name, setting.value)
            own = value != setting.value
        origin = "user" if own else "hlat"
        report.append(
            Applied(setting.name, value, origin, setting.value, setting.why, setting.source, setting.kind)
        )
    return report


def apply(settings: Iterable[Setting], environ: MutableMapping[str, str] | None = None) -> list[Applied]:
    """Set what the user has not set. Returns every setting as the run has it, and whose value it is.

    Raises RuntimeError when something would have to change after torch_xla was imported, which is too late.
    """
    environ = os.environ if environ is None else environ
    report = merged(settings, environ)
    new = {item.name: item.value for item in report if item.kind == "variable"}
    new = {name: value for name, value in new.items() if environ.get(name) != value}
    if environ is os.environ and new:
        if "torch_xla" in sys.modules:
            raise RuntimeError(f"torch_xla was imported before {', '.join(sorted(new))} could be set")
        if "MALLOC_ARENA_MAX" in new:  # glibc read the variable when the process started
            with suppress(OSError, AttributeError):
                ctypes.CDLL(None).mallopt(_M_ARENA_MAX, int(new["MALLOC_ARENA_MAX"]))
    environ.update(new)
    return report


def parse_flags(text: str) -> dict[str, str]:
    """NEURON_CC_FLAGS as {flag: value}. `--a=b` and `--a b` are the same, and so are -O1 and --optlevel=1.

    Raises UserError for text that a shell could not split.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"cannot be read ({error})", where=CC_FLAGS, fix="close the quotation") from None
    flags: dict[str, str] = {}
    last = ""
    for word in words:
        if word.startswith("-"):
            last, _, value = word.partition("=")
            if last[:2] == "-O":
                last, value = "--optlevel", last[2:]
            flags[last] = value
        elif last:
            flags[last] = f"{flags[last]} {word}".strip()
    return flags


def compile_cache(environ: Mapping[str, str]) -> str:
    """Where compiled graphs are kept: a folder, or an s3:// address."""
    chosen = parse_flags(environ.get(CC_FLAGS, "")).get("--cache_dir")
    return chosen or environ.get("NEURON_COMPILE_CACHE_URL") or CACHE


def conflicts(
    recipe: Recipe,
    environ: Mapping[str, str],
    platform: str = "trn1",
    nodes: int = 1,
    *,
    cores: int = CORES,
    efa_devices: int | None = None,
) -> None:
    """Refuse an environment that contradicts the recipe or the machine.

    Args:
        environ: variables as the run will have them, so after `apply` (or `preview`).
        efa_devices: EFA devices of this machine; None: not known, not checked.

    Raises:
        UserError: the first contradiction, with what to change.
    """
    several = nodes > 1
    if several:
        _check_efa(environ)
    if efa_devices == 0 and (several or (platform == "trn1" and cores > 8)):
        what = f"no EFA device, which {'several nodes' if several else f'{cores} cores'} need"
        raise UserError(
            what, fix="launch the instance with EFA interfaces; hlat doctor --for trn1 checks them"
        )
    if platform != "trn1":
        return
    check_variables(environ)
    check_cores(recipe, cores)
    flags = parse_flags(environ.get(CC_FLAGS, ""))
    strategies = [
        f"{name}={value}" for name, value in flags.items() if value.lower() in ("llm-training", "nemo")
    ]
    if strategies and flash_attention(recipe):
        fix = f"take it out of {CC_FLAGS}, or set model.attention to plain"
        raise UserError(f"{strategies[0]} does not go with flash attention", where=CC_FLAGS, fix=fix)
    wanted = "1" if recipe.precision.rounding == "stochastic" else "0"
    rounding = environ.get("NEURON_RT_STOCHASTIC_ROUNDING_EN", wanted)
    if rounding != wanted:
        what = f"{rounding} contradicts precision.rounding {recipe.precision.rounding}"
        fix = "unset it, or change the recipe"
        raise UserError(what, where="NEURON_RT_STOCHASTIC_ROUNDING_EN", fix=fix)


def check_variables(environ: Mapping[str, str]) -> None:
    """Refuse variables that no recipe goes with on trn1. Raises UserError."""
    for name in DEPRECATED:
        if name in environ:
            what = "is deprecated and changes dtypes behind the recipe's back, even when it is 0"
            raise UserError(what, where=name, fix=f"unset {name}; precision in the recipe says what is bf16")
    cast = parse_flags(environ.get(CC_FLAGS, "")).get("--auto-cast", "none")
    if cast != "none":
        what = f"--auto-cast={cast} changes dtypes behind the recipe's back"
        raise UserError(what, where=CC_FLAGS, fix="take it out; precision in the recipe says what is bf16")


def _check_efa(environ: Mapping[str, str]) -> None:
    for name, wanted in (("FI_PROVIDER", "efa"), ("FI_EFA_USE_DEVICE_RDMA", "1")):
        value = environ.get(name)
        if value != wanted:
            what = f"is {value}" if value is not None else "is not set"
            raise UserError(
                f"{what}, and several nodes need {wanted}", where=name, fix=f"export {name}={wanted}"
            )


def preview(settings: Iterable[Setting], environ: Mapping[str, str]) -> dict[str, str]:
    """The variables as they would be after `apply`; changes nothing."""
    after = dict(environ)
    after.update({item.name: item.value for item in merged(settings, environ) if item.kind == "variable"})
    return after


def prepare(
    recipe: Recipe,
    environ: MutableMapping[str, str] | None = None,
    platform: str = "trn1",
    nodes: int = 1,
    *,
    cores: int = CORES,
    sdk: str | None = None,
    efa_devices: int | None = None,
) -> list[Applied]:
    """Refuse contradictions, then set what the user has not set: the call a run makes before torch_xla.

    sdk: None stands for the tested release that is installed. Raises UserError as `conflicts` does, before
    anything is set, and RuntimeError as `apply` does.
    """
    environ = os.environ if environ is None else environ
    settings = profile(recipe, platform, nodes, cores=cores, sdk=sdk or installed(platform).name)
    after = preview(settings, environ)
    conflicts(recipe, after, platform, nodes, cores=cores, efa_devices=efa_devices)
    if platform == "trn1":
        check_nodes(recipe, nodes, cores)
    return apply(settings, environ)


def cluster(environ: Mapping[str, str]) -> tuple[int, int]:
    """(nodes, processes on each) as torchrun tells its processes, else SLURM; default: 1, one a core."""
    nodes = environ.get("GROUP_WORLD_SIZE") or environ.get("SLURM_NNODES") or "1"
    return int(nodes), int(environ.get("LOCAL_WORLD_SIZE") or CORES)
