"""The recipe: defaults, resolution, errors in one line, identity."""

import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hlat.errors import UserError
from hlat.model.config import ModelConfig
from hlat.recipe import Recipe, diff, identity_diff, load
from hlat.recipe_yaml import dump_yaml

SHORT = "model: {preset: tiny}\ndata:\n  sources: [{dataset: python-stdlib}]\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text(SHORT)
    return path


def line(file, *overrides):
    """The error line of a recipe, without the folder."""
    with pytest.raises(UserError) as error:
        load(file, overrides)
    text = str(error.value)
    assert "\n" not in text
    return text.replace(f"{file.parent}/", "")


def test_a_short_recipe_is_complete(file):
    recipe = load(file)
    assert recipe.model == ModelConfig(preset="tiny")
    assert recipe.run.name == "short"
    assert recipe.run.dir == "runs/short"
    assert recipe.data.seq_len == recipe.model.max_seq_len == 256
    assert recipe.horizon_steps == recipe.run.steps
    assert recipe.optim.options == {"betas": (0.9, 0.95), "eps": 1e-8}
    assert recipe.tokens_per_step == recipe.data.global_batch * 256


def test_overrides_win_and_later_ones_most(file):
    recipe = load(
        file, ["optim.lr=1e-3", "run.name=a", "run.name=b", "model.ffn=512", "data.global_batch=64"]
    )
    assert recipe.optim.lr == 1e-3
    assert (recipe.run.name, recipe.run.dir) == ("b", "runs/b")
    assert recipe.model.ffn == 512
    assert recipe.model.hidden == 256


def test_frozen(file):
    recipe = load(file)
    with pytest.raises(ValidationError):
        recipe.run.steps = 3
    recipe.optim.options["eps"] = 1.0
    assert recipe.optim.options["eps"] == 1e-8
    assert isinstance(load(file, ["train_only=[a]"]).train_only, tuple)


def test_import_needs_no_torch():
    code = "import sys, hlat.recipe, hlat.model.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optim.lr_rate=1",
            "command line: optim.lr_rate: unknown key 'lr_rate' for 'adamw'; did you mean 'lr'?",
        ),
        ("run.stepss=1", "command line: run.stepss: unknown key 'stepss'; did you mean 'steps'?"),
        ("lr=1", "command line: lr: unknown key 'lr'; did you mean 'optim.lr'?"),
        ("modle.preset=tiny", "command line: modle: unknown key 'modle'; did you mean 'model'?"),
        ("checkpoint.async_=false", "unknown key 'async_'; did you mean 'async'?"),
        ("data.sources=[{pth: x}]", "data.sources[0].pth: unknown key 'pth'; did you mean 'path'?"),
        ("optim.groups=[{mach: x}]", "optim.groups[0].mach: unknown key 'mach'; did you mean 'match'?"),
        ("zoo=3", "zoo: unknown key 'zoo'; known: run, model, data"),
        ("model.layer=3", "model.layer: unknown key 'layer'; did you mean 'layers'?"),
        ("compile=yes", 'compile: expected auto or true or false, got "yes"; write true'),
        ("compile=1", "compile: expected auto or true or false, got 1"),
        ("parallel.dp=x", 'parallel.dp: expected auto or a whole number, got "x"'),
        ("parallel.dp=0", "parallel.dp: must be at least 1, got 0"),
        ("parallel=3", "parallel: expected a mapping of keys to values, got 3"),
        ("run.steps='4'", 'run.steps: expected a whole number, got "4"; remove the quotes'),
        ("run.steps=4.5", "run.steps: expected a whole number, got 4.5"),
        ("run.steps=true", "run.steps: expected a whole number, got true"),
        ("run.steps=0", "run.steps: must be at least 1, got 0"),
        ("run.seed=-1", "run.seed: must be at least 0, got -1"),
        ("run.name=a b", "run.name: must be letters, digits, dot, dash and underscore"),
        ("run.name=../x", "run.name: must be letters"),
        ("run.name=4", "run.name: expected a text, got 4; put it in quotes: '4'"),
        ("run.dir=", "run.dir: expected a text, got null"),
        (
            "precision.compute=fp16",
            "precision.compute: expected fp32 or bf16, got \"fp16\"; did you mean 'bf16'?",
        ),
        ("precision.master=null", "precision.master: expected fp32 or none, got null; write none"),
        ("optim.clip_norm=none", 'expected a number or null, got "none"; write null'),
        ("optim.lr=.nan", "optim.lr: must be a finite number"),
        ("optim.lr=1e999", "optim.lr: must be a finite number"),
        ("optim.lr=-1", "optim.lr: must be at least 0, got -1"),
        ("data.holdout=1", "data.holdout: must be less than 1, got 1"),
        ("data.sources=[]", "data.sources: must be a list with at least 1 entry, got []"),
        ("data.sources=abc", 'data.sources: expected a list of mappings, got "abc"; put it in [ ]'),
        (
            "data.sources=[{path: a, dataset: b}]",
            "data.sources[0]: a source has both path and dataset; give exactly one",
        ),
        (
            "data.sources=[{weight: 2}]",
            "data.sources[0]: a source has neither path nor dataset; give exactly one",
        ),
        ("data.sources=[{path: a, weight: 0}]", "data.sources[0].weight: must be greater than 0, got 0"),
        ("data.sources.0.weight=3", "data.sources: one item of a list cannot be overridden; give it whole"),
        ("train_only=[a, 3]", "train_only[1]: expected a text, got 3"),
        ("train_only=abc", 'train_only: expected a list of texts, got "abc"; put it in [ ]'),
        ("checkpoint.every=0", "checkpoint.every: must be at least 1, got 0"),
        ("model.preset=tny", "model.preset: unknown preset 'tny'; did you mean 'tiny'?"),
        ("model.preset=3", "model.preset: expected the name of a preset, got 3"),
        ("model.hidden=255", "model.hidden: hidden 255 is not a multiple of heads 4; take hidden 256"),
        ("model.kv_heads=3", "model.kv_heads: heads 4 is not a multiple of kv_heads 3; take kv_heads 2"),
        (
            "model.hidden=260",
            "head size 65 (hidden / heads) is odd, and rotary positions need pairs; take hidden 256",
        ),
        ("data.global_batch=30", "global_batch 30 is not a multiple of micro_batch 8; take global_batch 32"),
        (
            "parallel.dp=3",
            "short.yaml:2: data.global_batch: global_batch 32 is not a multiple of micro_batch 8 x dp 3;",
        ),
        ("data.seq_len=512", "seq_len 512 exceeds the model's max_seq_len 256; take seq_len 256, or raise"),
        ("run.stop_at_step=2000", "stop_at_step 2000 is beyond steps 1000; take stop_at_step 1000 or less"),
        (
            "schedule.warmup_steps=2000",
            "warmup_steps 2000 exceeds the schedule's 1000 steps; take warmup_steps 50",
        ),
        (
            "precision={compute: fp32, rounding: stochastic}",
            "precision.rounding: stochastic rounding has nothing",
        ),
        ("foo", "command line: 'foo' is not key=value; write for example optim.lr=1e-3"),
        ("a..b=1", "command line: 'a..b=1' is not key=value"),
        ("base=tiny", "command line: base cannot be overridden"),
        ("train_only=[*.norm]", "put a value that starts with * or & in quotes"),
        ("run={steps: 5, step: 3, nme: 1}", "unknown key 'step' (and 1 more error); did you mean 'steps'?"),
        ("backend=cuda", 'backend: expected native or nxd, got "cuda"'),
    ],
)
def test_one_clear_line(file, override, message):
    assert message in line(file, override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "data: {sources: [{path: x}]}\n",
            "r.yaml: model: this section is missing; for example model: {preset: tiny}",
        ),
        ("model: {preset: tiny}\n", "r.yaml: data: this section is missing; give at least data.sources"),
        ("model: {preset: tiny}\ndata: {}\n", "r.yaml:2: data.sources: this key is missing"),
        (
            "model:\n  layers: 2\ndata: {sources: [{path: x}]}\n",
            "r.yaml:1: model: the model has no hidden, heads, ffn",
        ),
        ("model:\ndata: {sources: [{path: x}]}\n", "r.yaml:1: model: the model has no layers, hidden"),
        (f"{SHORT}optim:\n  lr_rate: 1\n", "r.yaml:5: optim.lr_rate: unknown key 'lr_rate'"),
        (f"{SHORT}optim.lr: 1\n", "unknown key 'optim.lr'; dotted keys are for the command line"),
        (f"{SHORT}run:\n  steps: 5\nlog:\n", None),
    ],
)
def test_files(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    if message is None:
        assert load(tmp_path / "r.yaml").run.steps == 5
    else:
        assert message in line(tmp_path / "r.yaml")


def test_without_a_preset_kv_heads_are_heads():
    shape = {"layers": 2, "hidden": 64, "heads": 4, "ffn": 96, "vocab": 50, "max_seq_len": 32}
    config = ModelConfig(**shape)
    assert (config.kv_heads, config.head_dim) == (4, 16)
    assert config.parameter_count() == 2 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 2 * 50 * 64 + 64
    assert ModelConfig(**shape, tie_embeddings=True).parameter_count() == config.parameter_count() - 50 * 64
    assert ModelConfig(**shape, kv_heads=1).parameter_count() == config.parameter_count() - 2 * 2 * 64 * 48


def test_accumulation_and_layout(file):
    recipe = load(file, ["data.global_batch=64", "parallel.tp=2", "parallel.pp=2"])
    assert (recipe.dp(8), recipe.accumulate(8)) == (2, 4)
    with pytest.raises(UserError, match=r"tp 2 x pp 2 does not fit 6 processes; start a multiple of 4"):
        recipe.accumulate(6)
    with pytest.raises(
        UserError, match=r"data\.global_batch: global_batch 64 .* x dp 3; take global_batch 72"
    ):
        recipe.accumulate(12)
    assert load(file, ["parallel.dp=4"]).accumulate(4) == 1
    with pytest.raises(UserError, match="start 4 processes"):
        load(file, ["parallel.dp=4"]).accumulate(1)


FREE = [
    "run.name=other",
    "run.dir=/elsewhere",
    "run.stop_at_step=5",
    "run.resume=never",
    "data.micro_batch=4",
    "data.tokenizer=/moved",
    "parallel.tp=2",
    "parallel.zero1=true",
    "checkpoint.every=7",
    "checkpoint.async=false",
    "eval.batches=3",
    "log.every=2",
    "compile=false",
    "backend=nxd",
    "data.sources=[{path:/moved}]",
]
BOUND = [
    "run.seed=5",
    "run.steps=7",
    "model.layers=3",
    "model.init_std=0.01",
    "data.seq_len=128",
    "data.global_batch=64",
    "data.document_mask=true",
    "data.holdout=0.2",
    "data.sources=[{path:/x,weight:2}]",
    "precision.compute=fp32",
    "optim.lr=1e-3",
    "optim.eps=1e-6",
    "optim.name=sgd",
    "optim.decay=all",
    "optim.groups=[{match:x}]",
    "schedule.floor=0.2",
    "schedule.horizon_steps=9",
    "guard.sigma=3",
    "train_only=[x]",
]


@pytest.mark.parametrize("override", FREE)
def test_what_a_resume_may_change(file, override):
    a, b = load(file), load(file, [override.replace(":", ": ")])
    assert a != b
    assert a.fingerprint() == b.fingerprint()
    assert identity_diff(a.to_dict(), b.to_dict()) == []


@pytest.mark.parametrize("override", BOUND)
def test_what_a_resume_may_not_change(file, override):
    a, b = load(file), load(file, [override.replace(":", ": ")])
    assert a.fingerprint() != b.fingerprint()
    changed = [key for key, _, _ in identity_diff(a.to_dict(), b.to_dict())]
    key = override.partition("=")[0]
    assert any(c.startswith("schedule.horizon_steps" if key == "run.steps" else key) for c in changed)


def test_horizon_counts_resolved(file):
    explicit = load(file, ["schedule.horizon_steps=1000", "run.steps=3000"])
    assert explicit.fingerprint() == load(file).fingerprint()
    assert (
        load(file).fingerprint()
        == load(file, ["model.preset=null", *map("model.{}".format, SHAPE)]).fingerprint()
    )


SHAPE = ["layers=4", "hidden=256", "heads=4", "kv_heads=4", "ffn=688", "vocab=4096", "max_seq_len=256"]


def test_a_field_added_later_counts_as_its_default(file):
    new = load(file).to_dict()
    old = load(file).to_dict()
    del old["data"]["holdout"], old["train_only"], old["optim"]["eps"], old["guard"]
    assert identity_diff(old, new) == []
    new["data"]["holdout"], new["optim"]["eps"] = 0.5, 1e-4
    assert sorted(identity_diff(old, new)) == [("data.holdout", 0.01, 0.5), ("optim.eps", 1e-8, 1e-4)]


def test_diff_names_values(file):
    rows = diff(load(file), load(file, ["optim.lr=1e-3", "data.sources=[{path: x}]"]))
    assert rows == [
        ("data.sources.0.path", None, "x"),
        ("data.sources.0.dataset", "python-stdlib", None),
        ("optim.lr", 3e-4, 1e-3),
    ]


def test_from_dict_reports_where(file):
    values = load(file).to_dict()
    assert Recipe.from_dict(values) == load(file)
    values["run"]["steps"] = "many"
    with pytest.raises(UserError, match=r'^checkpoint 7: run\.steps: expected a whole number, got "many"'):
        Recipe.from_dict(values, where="checkpoint 7")


KEYS = st.sampled_from(
    [
        "base",
        "run",
        "model",
        "data",
        "optim",
        "schedule",
        "guard",
        "steps",
        "preset",
        "sources",
        "groups",
        "name",
        "path",
        "lr",
        "betas",
        "dp",
        "seq_len",
        "x",
    ]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("tiny"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=10,
)
ROUGH = st.fixed_dictionaries({}, optional={name: ANYTHING for name in Recipe.model_fields})


@settings(deadline=None)
@given(ROUGH)
def test_whatever_is_wrong_is_a_user_error(values):
    good = {"model": {"preset": "tiny"}, "data": {"sources": [{"path": "x"}]}}
    for candidate in (values, {**values, **good}, {**good, **values}):
        try:
            recipe = Recipe.from_dict(candidate)
        except UserError:
            continue
        assert Recipe.from_dict(recipe.to_dict()) == recipe


NAMES = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,12}\Z")
FLOATS = st.floats(min_value=1e-12, max_value=1e12)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "run.name": NAMES,
        "run.dir": st.text(min_size=1, max_size=20),
        "run.seed": st.integers(0, 2**63 - 1),
        "run.steps": st.integers(1, 10**12),
        "model.init_std": FLOATS,
        "model.tie_embeddings": st.booleans(),
        "data.tokenizer": st.text(min_size=1, max_size=20),
        "data.holdout": st.floats(0, 1, exclude_max=True),
        "data.sources": st.lists(
            st.fixed_dictionaries({"path": st.text(min_size=1, max_size=9), "weight": FLOATS}),
            min_size=1,
            max_size=3,
        ),
        "optim.lr": FLOATS,
        "optim.eps": FLOATS,
        "optim.betas": st.tuples(FLOATS, FLOATS).map(list),
        "optim.clip_norm": st.none() | FLOATS,
        "optim.groups": st.lists(
            st.fixed_dictionaries({"match": st.text(min_size=1, max_size=9), "lr": st.none() | FLOATS}),
            max_size=2,
        ),
        "checkpoint.async": st.booleans(),
        "train_only": st.lists(st.text(min_size=1, max_size=9), max_size=3),
        "compile": st.sampled_from(["auto", True, False]),
        "parallel.dp": st.sampled_from(["auto", 1, 2, 4]),
    },
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(values=FIELDS)
def test_override_and_resolved_copy_round_trip(file, values):
    overrides = [f"{key}={dump_yaml({'v': value}).removeprefix('v:')}" for key, value in values.items()]
    recipe = load(file, overrides)
    plain = recipe.to_dict()
    for key, value in values.items():
        section, _, name = key.partition(".")
        got = plain[section][name] if name else plain[section]
        if isinstance(value, list) and value and isinstance(value[0], dict):
            assert [{k: item[k] for k in wanted} for item, wanted in zip(got, value, strict=True)] == value
        else:
            assert got == value
    copy = file.parent / "resolved.yaml"
    copy.write_text(recipe.to_yaml(), encoding="utf-8")
    again = load(copy)
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()
    assert again.to_yaml() == recipe.to_yaml()
    assert Recipe.from_dict(plain) == recipe
