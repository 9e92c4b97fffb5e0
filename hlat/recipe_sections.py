"""The sections of a recipe: every key, its type, range, default and meaning.

The attribute docstrings are the descriptions in recipes/schema.json.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from hlat.recipe_examples import ExamplesSection
from hlat.section import (
    MOST_SECONDS,
    Fraction,
    NonNegativeFloat,
    PathText,
    PluginSection,
    Positive,
    PositiveFloat,
    Ranks,
    Rows,
    Seconds,
    Section,
    Seed,
    Steps,
    StepsOrNone,
    Text,
    Tokens,
    WholeSeconds,
    largest_divisor,
    problem,
)
from hlat.storage.urls import FORMS, check_url


class RunSection(Section):
    """What this run is called, how long it lasts and where it writes."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run: letters, digits, dot, dash, underscore. Default: the recipe's file name."""
    dir: PathText = "runs/run"
    """The run folder itself; it may be moved or copied and still resumes. Default: runs/<name>."""
    seed: Seed = 0
    """Seed of initialisation, data order and stochastic rounding."""
    steps: Steps = 1000
    """Optimizer steps in the whole run."""
    stop_at_step: Steps | None = None
    """Save and stop after this step; no schedule depends on it. Default: steps."""
    max_hours: Annotated[float, Field(gt=0, le=MOST_SECONDS / 3600)] | None = None
    """Save and stop before so many hours have passed since the process started; null: no limit but that of
    SLURM's job (SLURM_JOB_END_TIME).
    """
    spot_notice: Literal["auto"] | bool = "auto"
    """Ask EC2 whether the spot instance will be taken back, then save and stop. auto: on EC2."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the newest complete checkpoint in the run folder, if there is one."""

    @model_validator(mode="before")
    @classmethod
    def _default_dir(cls, data: Any) -> Any:
        return {"dir": f"runs/{data.get('name', 'run')}", **data} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _stop_in_range(self) -> RunSection:
        if self.stop_at_step is not None and self.stop_at_step > self.steps:
            what = "stop_at_step {stop} is beyond steps {steps}"
            fix = f"take stop_at_step {self.steps} or less, or raise run.steps"
            raise problem(what, "stop_at_step", fix, stop=self.stop_at_step, steps=self.steps)
        return self


class SourceSection(Section):
    """One source of text: a path or a data set."""

    path: PathText | None = None
    """File or folder of text, jsonl, parquet or arrow; relative to the working directory. Or a folder that
    `hlat data tokenize` has written, also in a store: s3://bucket/folder (extra s3).
    """
    dataset: Text | None = None
    """A Hugging Face data set, or python-stdlib: the standard library installed on this machine."""
    weight: PositiveFloat = 1.0
    """Share of this source in the training mixture, relative to the others."""
    text_field: Text = "text"
    """Field or column that holds the text (JSON, parquet, arrow, data sets); a.b is the field b of the
    object or struct a.
    """
    allow_dropped: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Largest share of the source, by documents or by bytes, that may turn out to be no text. More is an
    error.
    """

    @model_validator(mode="after")
    def _one_place(self) -> SourceSection:
        if (self.path is None) == (self.dataset is None):
            what = "neither path nor dataset" if self.path is None else "both path and dataset"
            raise problem(f"a source has {what}", "", "give exactly one of them")
        if self.path is not None and "://" in self.path and (wrong := check_url(self.path)):
            raise problem(wrong, "path", "write s3://bucket/folder, or a path")
        return self


class DataSection(Section):
    """What is read, how it becomes tokens, and how many of them make a step."""

    sources: tuple[SourceSection, ...] = ()
    """Where the text comes from; needed unless there are examples."""
    examples: ExamplesSection | None = None
    """Finetuning data in place of sources: see the keys below."""
    chat_template: PathText | None = None
    """A Jinja file that makes one text of the messages of examples, in the sandbox and with the names that
    `transformers` gives such templates; it goes with the checkpoints. plain: one that needs no special token
    but end of document. null: the one of the tokenizer.
    """
    tokenizer: PathText = "bytes"
    """A SentencePiece .model, a tokenizer.json or a folder with one of them; `bytes`; `train:bpe-4096` to
    train a byte-pair encoding of that size on the sources; or `init`, the one that comes with init.from.
    Default: init where there is init.from, else bytes.
    """
    seq_len: Tokens = 1024
    """Tokens a row. Default: model.max_seq_len."""
    micro_batch: Rows = 8
    """Rows of one forward and backward pass on one data-parallel rank."""
    global_batch: Rows = 32
    """Rows of one optimizer step over all ranks: a multiple of micro_batch x dp."""
    document_mask: bool = False
    """Attend only within a document, positions counted from its start. false: one stream, as HLAT trained."""
    skip: tuple[tuple[Steps, Steps], ...] = ()
    """Stretches of the data that are left out, as [first step, last step]: what these steps would read,
    counted from 1 (`hlat data locate` shows it). Those not reached yet may be added on a resume.
    """
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Fraction of the documents held out for evaluation, always the same ones; 0: none."""

    @model_validator(mode="after")
    def _one_kind(self) -> DataSection:
        if self.examples is None and not self.sources:
            given = "sources" in self.model_fields_set
            what = "must be a list with at least 1 entry, got []" if given else "this key is missing"
            raise problem(what, "sources", "give at least one source, or data.examples to finetune")
        if self.examples is not None and self.sources:
            raise problem("both sources and examples are given", "examples", "give exactly one of them")
        if self.chat_template is not None and (self.examples is None or self.examples.format == "template"):
            fix = "leave it out" if self.examples is None else "write data.examples.format: messages"
            raise problem("a chat template is for examples that are messages", "chat_template", fix)
        if self.chat_template is not None and self.examples and self.examples.own_templates():
            fix = f"leave out one of data.examples.{self.examples.own_templates()[0]} and data.chat_template"
            raise problem("examples are either messages or have templates of their own", "chat_template", fix)
        if self.examples is not None and self.document_mask:
            fix = "write document_mask: false"
            raise problem("each example has a row of its own: nothing to mask", "document_mask", fix)
        if self.examples is not None and self.tokenizer.startswith("train:"):
            fix = "take the tokenizer of the pretrained model: tokenizer: init"
            raise problem("a tokenizer is not trained on examples", "tokenizer", fix)
        return self

    @model_validator(mode="after")
    def _skips_forward(self) -> DataSection:
        for number, (first, last) in enumerate(self.skip):
            if first > last:
                what = "the stretch ends at step {b}, before it begins at {a}"
                raise problem(what, f"skip.{number}", "write [first, last]", a=first, b=last)
        return self

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> DataSection:
        if self.global_batch % self.micro_batch:
            what = "global_batch {a} is not a multiple of micro_batch {b}"
            fix = f"take micro_batch {largest_divisor(self.global_batch, self.micro_batch)}"
            raise problem(what, "micro_batch", fix, a=self.global_batch, b=self.micro_batch)
        return self


class InitSection(Section):
    """Which weights training starts from."""

    from_: Annotated[PathText | None, Field(alias="from")] = None
    """Start from these weights: an HLAT run folder, a step folder, or a Hugging Face folder. Only weights are
    taken; the optimizer starts anew. The model section may be left out then. null: start from run.seed.
    """


class ParallelSection(Section):
    """How many ranks share the model and the batch."""

    tp: Ranks = 1
    """Tensor parallelism: ranks that share every layer."""
    pp: Ranks = 1
    """Pipeline parallelism: ranks that hold a slice of the layers each."""
    dp: Literal["auto"] | Ranks = "auto"
    """Data parallelism: replicas of the model. auto: all ranks / (tp x pp)."""
    sequence: bool = False
    """Split norms and residual stream along the sequence over the tensor-parallel ranks."""
    zero1: bool = False
    """Shard optimizer state and master weights over the data-parallel ranks."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Recompute in backward: nothing, core attention and the SwiGLU product, or whole layers."""
    schedule: Literal["1f1b", "interleaved", "gpipe"] = "1f1b"
    """Order of forward and backward passes in the pipeline."""
    stages: Ranks = 1
    """Slices of the model on each pipeline rank; 2 and more for the interleaved schedule."""
    cuts: tuple[Text, ...] = ()
    """First layer of each pipeline stage but the first, as layers.8; empty: stages of equal work."""
    timeout: WholeSeconds = 600
    """Seconds that ranks wait for each other after the first step before the run ends with a report."""
    first_timeout: WholeSeconds = 3600
    """The same until the first step is done: reading data and compiling take longer."""
    verify_every: StepsOrNone = 0
    """Compare the weights of the replicas every so many steps, and stop if they differ; 0: never."""


class GroupSection(Section):
    """Own learning rate or weight decay for some parameters."""

    match: Text
    """Pattern of parameter names with the wildcards * and ?; the first group that matches wins."""
    lr: NonNegativeFloat | None = None
    """Peak learning rate of these parameters. Default: optim.lr."""
    weight_decay: NonNegativeFloat | None = None
    """Weight decay of these parameters. Default: what optim.weight_decay and optim.decay give them."""


class OptimSection(PluginSection):
    """The optimizer. Keys not listed here are options of the one named, such as betas and eps of adamw."""

    name: Text = "adamw"
    """Optimizer."""
    lr: NonNegativeFloat = 3e-4
    """Peak learning rate; the schedule multiplies it."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay, multiplied by the learning rate."""
    decay: Literal["matrices", "all"] = "matrices"
    """What is decayed: tensors of two and more dimensions, or all (norm gains too, as HLAT trained)."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest global gradient norm; null: no clipping."""
    groups: tuple[GroupSection, ...] = ()
    """Exceptions by parameter name."""


class ScheduleSection(PluginSection):
    """The learning rate over the run. Keys not listed here are options of the schedule named."""

    name: Text = "cosine"
    """constant, linear, cosine (ends on the floor), clamped_cosine (HLAT: on it from 79.5 % on), or wsd."""
    warmup_steps: StepsOrNone = 0
    """Steps of linear warm-up from 0."""
    horizon_steps: Steps | None = None
    """Step the schedule ends at. Default: run.steps."""
    floor: Fraction = 0.1
    """Lowest learning rate after warm-up, as a fraction of the peak."""


class ReduceSection(PluginSection):
    """How ranks agree on the gradient. Other keys are options of the reducer named."""

    name: Text = "dense"
    """Reducer."""


class MethodSection(PluginSection):
    """Where the update comes from. Other keys are options of the method named."""

    name: Text = "backprop"
    """Method."""


class ObjectiveSection(PluginSection):
    """What is minimised. Other keys are options of the objective named."""

    name: Text = "causal_lm"
    """Objective."""


class GuardSection(PluginSection):
    """Which updates are skipped. Other keys are options of the guard named."""

    name: Text = "skip"
    """Guard."""


class CheckpointSection(Section):
    """When state is saved and how much of it is kept."""

    every: Steps = 1000
    """Save every so many steps (and at the end)."""
    keep: Rows = 3
    """Newest checkpoints kept."""
    permanent_every_tokens: Positive | None = None
    """Also keep for ever one checkpoint every so many tokens; null: none."""
    async_: Annotated[bool, Field(alias="async")] = True
    """Write while training goes on."""
    remote: PathText | None = None
    """Also keep the checkpoints in a store, in the folder <remote>/<run.name>: s3://bucket/folder (extra s3),
    gs://bucket/folder (gcs), abfs://container@account/folder (azure) or file:///folder. Credentials come from
    the environment.
    """
    patience: Annotated[float, Field(ge=0, le=MOST_SECONDS)] = 600.0
    """Seconds to go on trying to save the last state when the disk or the store fails; then exit code 74."""
    grace: Seconds = 30.0
    """Seconds from a signal to stop to the end of the processes: a step and a save must fit, else there is a
    warning.
    """
    format: Literal["hlat", "nxd"] = "hlat"
    """hlat: loads in any layout, on any backend. nxd: NxD's own files while training, for this layout alone;
    the last step is saved as hlat. `hlat convert from-nxd` turns them into the former.
    """

    @model_validator(mode="after")
    def _what_nxd_keeps(self) -> CheckpointSection:
        if self.format == "nxd" and self.permanent_every_tokens is not None:
            what = "NxD deletes all but the newest checkpoints: permanent_every_tokens has no effect"
            raise problem(what, "permanent_every_tokens", "leave it out, or write format: hlat")
        return self

    @model_validator(mode="after")
    def _where_copies_go(self) -> CheckpointSection:
        if self.remote is not None and (wrong := check_url(self.remote)):
            raise problem(wrong, "remote", FORMS)
        if self.remote is not None and self.format == "nxd":
            what = "NxD's own files are not uploaded"
            raise problem(what, "remote", "leave it out, or write format: hlat")
        return self


class EvalSection(Section):
    """Evaluation on the held-out documents, and of tasks, during a run."""

    every: StepsOrNone = 0
    """Evaluate every so many steps; 0: only at the end."""
    rows: Rows | None = 256
    """Rows of data.seq_len tokens, or examples, an evaluation reads at most; null: all there are."""
    tasks: tuple[Text, ...] = ()
    """Tasks of the evaluation harness to run each time too (extra eval), such as hlat-offline."""
    limit: Rows | None = None
    """Questions of each task at most; null: all."""


class SinkSection(PluginSection):
    """A receiver of metrics: its name, or a mapping of its name and its options."""

    by_name: ClassVar[bool] = True  # a text in its place is its name

    name: Text
    """As its package registered it."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        mapping = handler.resolve_ref_schema(handler(core))
        text = {"type": "string", "minLength": 1}
        return {"anyOf": [text, mapping], "description": mapping.pop("description")}


class LogSection(Section):
    """Metrics and console."""

    every: Steps = 10
    """Fetch metrics from the device every so many steps; metrics.jsonl still has a row for each step."""
    tensorboard: bool = False
    """Also write TensorBoard files (extra track)."""
    sinks: tuple[SinkSection, ...] = ()
    """Also give every row of metrics.jsonl to these plug-ins of the kind sink, each a name or a mapping of a
    name and its options: [my-tracker, {name: other, project: x}].
    """

    @model_validator(mode="after")
    def _each_once(self) -> LogSection:
        for number, sink in enumerate(self.sinks):
            key, fix = f"sinks.{number}", "leave it out"
            if sink.name == "jsonl":
                raise problem("metrics.jsonl is always written", key, fix)
            if sink in self.sinks[:number] or (sink.name == "tensorboard" and self.tensorboard):
                raise problem("{a} is asked for twice", key, fix, a=sink.name)
        return self
