"""The recipe: everything a run does, in one validated, frozen object.

`load` reads a YAML file, its `base:` chain and `key=value` overrides, and touches nothing else: no data, no
device. What is wrong is reported as one `UserError` line that names the file, the key and the fix.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError, model_validator

from hlat.errors import UserError
from hlat.mesh import Layout, check_layout, micro_batches
from hlat.model.config import ModelConfig
from hlat.recipe_precision import PrecisionSection
from hlat.recipe_sections import (
    CheckpointSection,
    DataSection,
    EvalSection,
    GuardSection,
    InitSection,
    LogSection,
    MethodSection,
    ObjectiveSection,
    OptimSection,
    ParallelSection,
    ReduceSection,
    RunSection,
    ScheduleSection,
)
from hlat.section import PathText, PluginSection, Section, Text, problem
from hlat.storage.urls import FORMS, check_url

# What may change across a resume. schedule.horizon_steps may not, and counts as run.steps when it is unset.
# data.skip may change where the data is not reached yet (`hlat.train.state.check_same_run`).
# Data and tokenizer may move: their content has a fingerprint of its own (`Data.fingerprint`).
_FREE = (
    "run.name",
    "run.dir",
    "run.steps",
    "run.stop_at_step",
    "run.max_hours",
    "run.spot_notice",
    "run.resume",
    "model.preset",
    "data.micro_batch",
    "data.skip",
    "data.tokenizer",
    "data.sources.*.path",
    "data.sources.*.dataset",
    "data.sources.*.allow_dropped",
    "data.examples.path",
    "data.examples.dataset",
    "data.examples.eval_path",
    "data.examples.eval_dataset",
    "data.examples.allow_dropped",
    "init",
    "parallel",
    "checkpoint",
    "eval",
    "log",
    "compile",
    "compile_cache",
    "backend",
)


class Recipe(Section):
    """One run, completely described. Sections are attributes; `load` is the usual way to make one."""

    run: RunSection = RunSection()
    """What this run is called, how long it lasts and where it writes."""
    model: ModelConfig
    """The decoder: a preset, its fields, or both."""
    data: DataSection
    """What is read, how it becomes tokens, and how many of them make a step."""
    init: InitSection = InitSection()
    """Which weights training starts from."""
    parallel: ParallelSection = ParallelSection()
    """How many ranks share the model and the batch."""
    precision: PrecisionSection = PrecisionSection()
    """Which number format each part of a step uses."""
    optim: OptimSection = OptimSection()
    """The optimizer and its options."""
    schedule: ScheduleSection = ScheduleSection()
    """The learning rate over the run."""
    reduce: ReduceSection = ReduceSection()
    """How ranks agree on the gradient."""
    method: MethodSection = MethodSection()
    """Where the update comes from."""
    objective: ObjectiveSection = ObjectiveSection()
    """What is minimised."""
    guard: GuardSection = GuardSection()
    """Which updates are skipped."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When state is saved and how much of it is kept."""
    eval: EvalSection = EvalSection()
    """Evaluation on the held-out documents."""
    log: LogSection = LogSection()
    """Metrics and console."""
    train_only: tuple[Text, ...] = ()
    """Patterns (* and ?) of the only parameters that are trained; empty: all."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the model with torch.compile; auto: where it pays."""
    backend: Literal["native", "nxd"] = "native"
    """native: torch.distributed on a GPU, else on the CPU. nxd: NeuronX Distributed on trn1."""
    compile_cache: PathText | None = None
    """backend nxd: a store to fetch compiled graphs from, and to push to after `hlat train --precompile`:
    s3://bucket/folder (extra s3), or gs://, abfs:// or file:// as for checkpoint.remote.
    """

    @model_validator(mode="before")
    @classmethod
    def _what_follows(cls, data: Any) -> Any:
        """The tokenizer comes with the weights; a linear head has as many classes as there are labels."""
        if not isinstance(data, dict):
            return data
        init, section, objective, model = (_mapping(data, k) for k in ("init", "data", "objective", "model"))
        update: dict[str, Any] = {}
        if init.get("from") and section and "tokenizer" not in section:
            update["data"] = {**section, "tokenizer": "init"}
        if objective.get("name") == "classification" and objective.get("by") == "head" and model:
            labels = _mapping(_mapping(section, "examples"), "labels")
            update["model"] = {"classes": len(labels), **model}
        return {**data, **update}

    @model_validator(mode="before")
    @classmethod
    def _rows_as_long_as_the_model(cls, data: Any) -> Any:
        section = data.get("data") if isinstance(data, dict) else None
        if not isinstance(section, dict) or "seq_len" in section:
            return data
        try:
            model = ModelConfig.model_validate(data.get("model"))
        except ValidationError:
            return data  # reported when the model itself is validated
        return {**data, "data": {**section, "seq_len": model.max_seq_len}}

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        seq_len, longest = self.data.seq_len, self.model.max_seq_len
        if seq_len > longest:
            fix = f"take seq_len {longest}, or raise model.max_seq_len"
            what = "seq_len {a} exceeds the model's max_seq_len {b}"
            raise problem(what, "data.seq_len", fix, a=seq_len, b=longest)
        check_layout(self.model, seq_len, self.parallel)
        if self.data.tokenizer == "init" and self.init.from_ is None:
            fix = "give init.from, or another tokenizer"
            raise problem("init is the tokenizer of init.from, which is not given", "data.tokenizer", fix)
        if self.compile_cache is not None and (wrong := check_url(self.compile_cache)):
            raise problem(wrong, "compile_cache", FORMS)
        if self.compile_cache is not None and self.backend != "nxd":
            raise problem("only backend nxd has graphs to share", "compile_cache", "leave it out")
        self._check_labels()
        self._check_patience()
        if isinstance(self.parallel.dp, int):
            self._accumulate(self.parallel.dp)
        warmup, horizon = self.schedule.warmup_steps, self.horizon_steps
        if warmup > horizon:
            own = self.schedule.horizon_steps is not None
            what = "warmup_steps {a} exceeds " + ("horizon_steps {b}" if own else "the schedule's {b} steps")
            higher = "schedule.horizon_steps" if own else "run.steps"
            fix = f"take warmup_steps {max(1, horizon // 20)}, or raise {higher}"
            raise problem(what, "schedule.warmup_steps", fix, a=warmup, b=horizon)
        if self.checkpoint.format == "nxd" and self.backend != "nxd":
            what = f"backend {self.backend} cannot write NxD's files"
            raise problem(what, "checkpoint.format", "write format: hlat, or backend: nxd")
        precision = self.precision
        wide = precision.compute == precision.states == precision.accumulate == "fp32"
        if precision.rounding == "stochastic" and wide:
            fix = "set precision.compute to bf16, or rounding to nearest"
            raise problem("stochastic rounding has nothing to round: all is fp32", "precision.rounding", fix)
        return self

    def _check_patience(self) -> None:
        """The other ranks wait for the first one while it waits for the store."""
        patience, limit = self.checkpoint.patience, self.parallel.first_timeout
        if patience > limit and self.checkpoint.remote is not None:
            what = "patience {a} s exceeds parallel.first_timeout, {b} s, after which other ranks give up"
            fix = f"take patience {limit:g}, or raise parallel.first_timeout"
            raise problem(what, "checkpoint.patience", fix, a=f"{patience:g}", b=f"{limit:g}")

    def _check_labels(self) -> None:
        """Objective, labels and the model's classes must belong together."""
        examples, objective = self.data.examples, self.objective
        labelled = objective.name == "classification"
        if labelled and (examples is None or examples.label_field is None):
            fix = "give data.examples with label_field and labels, or objective.name=causal_lm"
            raise problem("classification needs labelled examples", "objective.name", fix)
        by_head = labelled and objective.options.get("by") == "head"
        wanted = len(examples.labels) if by_head and examples else 0
        if self.model.classes != wanted:
            what = "the model has {a} classes, the objective needs {b}"
            fix = "leave model.classes out: objective.by=head sets it to the number of labels"
            raise problem(what, "model.classes", fix, a=self.model.classes, b=wanted)

    def _accumulate(self, dp: int) -> int:
        data = self.data
        return micro_batches(self.parallel, data.global_batch, data.micro_batch, dp)

    @property
    def horizon_steps(self) -> int:
        """The step at which the learning-rate schedule ends."""
        return self.schedule.horizon_steps or self.run.steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all ranks."""
        return self.data.global_batch * self.data.seq_len

    def dp(self, world: int = 1) -> int:
        """Data-parallel replicas on `world` ranks. Raises UserError when the layout does not fit them."""
        share, dp = self.parallel.tp * self.parallel.pp, self.parallel.dp
        if dp == "auto" and world % share == 0:
            return world // share
        if dp != "auto" and dp * share == world:
            return dp
        layout = f"tp {self.parallel.tp} x pp {self.parallel.pp}" + ("" if dp == "auto" else f" x dp {dp}")
        least = share if dp == "auto" else dp * share
        fix = f"start {'a multiple of ' * (dp == 'auto')}{least} processes"
        fix += f" (torchrun --nproc-per-node {least} -m hlat train ...)" * (world == 1)
        fix += ", or change the layout"
        processes = f"{world} process{'es' * (world != 1)}"
        raise UserError(f"{layout} does not fit {processes}", where="parallel", fix=fix)

    def layout(self, world: int = 1) -> Layout:
        """How `world` ranks are laid out. Raises UserError when the layout does not fit them."""
        section = self.parallel
        dp, tp = self.dp(world), section.tp
        sequence, zero1 = section.sequence and tp > 1, section.zero1 and dp > 1
        return Layout(dp, section.pp, tp, sequence, zero1, section.stages)

    def accumulate(self, world: int = 1) -> int:
        """Micro-batches of one step on each rank: global_batch / (micro_batch x dp).

        Raises UserError when that is not whole or the layout does not fit `world` ranks.
        """
        try:
            return self._accumulate(self.dp(world))
        except ValueError as error:
            context = getattr(error, "context", {})
            where = context.get("key", "data.micro_batch")
            raise UserError(str(error), where=where, fix=context.get("fix", "")) from None

    def to_dict(self) -> dict[str, Any]:
        """Every value, resolved, as plain JSON types; `Recipe.from_dict` gives an equal recipe."""
        plain: dict[str, Any] = self.model_dump(mode="json", by_alias=True)
        return plain

    def to_yaml(self) -> str:
        """The resolved recipe as a YAML file that loads again as an equal one."""
        from hlat.recipe_io import dump_yaml

        return dump_yaml(self.to_dict())

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "") -> Recipe:
        """A recipe from plain values, such as those a checkpoint holds. Raises UserError."""
        from hlat.recipe_check import build
        from hlat.recipe_errors import in_brackets

        return build(
            values, lambda key, about="": ": ".join(part for part in (where, in_brackets(key)) if part)
        )

    def fingerprint(self) -> str:
        """SHA-256 (hex) over what must not change across a resume: see `identity`."""
        text = json.dumps(identity(self.to_dict()), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def _mapping(values: dict[str, Any], key: str) -> dict[str, Any]:
    """The mapping under a key of values that are not validated yet; empty if it is none."""
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file, or the name of a recipe that ships with HLAT (`tiny`, `hlat-7b`).
        overrides: `a.b=value` texts, values in YAML; they win over the file, a later one over an earlier one.

    Returns:
        The frozen recipe, plug-in options checked and filled in.

    Raises:
        UserError: unreadable file, unknown key, wrong type or impossible combination.
    """
    from hlat.recipe_check import build
    from hlat.recipe_io import read_recipe

    values, where = read_recipe(path, overrides)
    return build(values, where)


def identity(values: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved recipe (`to_dict`) that a resume must not change, by dotted key."""
    schedule = values.get("schedule", {})
    horizon = schedule.get("horizon_steps") or values.get("run", {}).get("steps")
    flat = _flatten({**values, "schedule": {**schedule, "horizon_steps": horizon}})
    return {key: value for key, value in flat.items() if not any(_covers(pattern, key) for pattern in _FREE)}


def identity_diff(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, old, new) for each difference between resolved recipes (`to_dict`) that forbids a resume.

    A key that one side does not have yet (a recipe saved by an older version) counts as its default.
    """
    return _differences(identity(a), identity(b))


def diff(a: Recipe, b: Recipe) -> list[tuple[str, Any, Any]]:
    """(dotted key, value in a, value in b) for every resolved value in which two recipes differ."""
    return _differences(_flatten(a.to_dict()), _flatten(b.to_dict()))


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    pairs = ((key, _get(a, key), _get(b, key)) for key in dict.fromkeys([*a, *b]))
    return [(key, old, new) for key, old, new in pairs if old != new]


def _get(flat: dict[str, Any], key: str) -> Any:
    if key in flat:
        return flat[key]
    section, _, name = key.partition(".")
    kind = _section_of(Recipe.model_fields.get(section))
    if kind is None:
        return _default(Recipe.model_fields.get(section))
    if issubclass(kind, PluginSection) and name.partition(".")[0] not in kind.model_fields:
        from hlat.recipe_check import option_default

        plugin = flat.get(f"{section}.name", kind.model_fields["name"].default)
        return option_default(section, plugin, name)
    return _default_within(flat, kind, section, name)


def _default_within(flat: dict[str, Any], kind: type[Section], path: str, name: str) -> Any:
    """The default of a key below the section at `path`; of a section in it (an entry of a list, or one that
    may be left out) only where that section is there: another source is another run.
    """
    first, _, rest = name.partition(".")
    field = kind.model_fields.get(first)
    inner, place = _section_of(field), f"{path}.{first}"
    if inner is None or not rest:
        return _default(field)
    number, _, below = rest.partition(".")
    if number.isdecimal():
        place, rest = f"{place}.{number}", below
    there = any(known.startswith(f"{place}.") for known in flat)
    return _default_within(flat, inner, place, rest) if there else None


def _section_of(field: Any) -> type[Section] | None:
    """The kind of section that a field holds: one, one or none, or a list of them."""
    kinds = [] if field is None else [field.annotation]
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
        kinds += get_args(kind)
    return None


def _default(field: Any) -> Any:
    default = None if field is None or field.is_required() else field.get_default()
    return list(default) if isinstance(default, tuple) else default


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted key: leaf}; lists of mappings by index, other lists as they are."""
    return dict(_leaves(values, prefix))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{path}.{i}")
    else:
        yield path, value


def _covers(pattern: str, key: str) -> bool:
    parts, keys = pattern.split("."), key.split(".")
    return len(parts) <= len(keys) and all(p in ("*", k) for p, k in zip(parts, keys, strict=False))
