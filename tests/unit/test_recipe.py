"""The recipe: defaults, resolution, identity, and copies that load again."""

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
        UserError,
        match=r"data\.global_batch: global_batch 64 is not a multiple of dp 3: .*; start 8 processes, not 12",
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
    "eval.rows=3",
    "log.every=2",
    "compile=false",
    "backend=nxd",
    "data.sources=[{path:/moved}]",
    "data.sources=[{path:data,allow_dropped:0.9}]",
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


def test_a_field_added_later_to_a_section_in_a_list_or_one_left_out_counts_as_its_default(file):
    sources = ["data.sources=[{path: a}, {path: b}]", "optim.groups=[{match: norm, lr: 1e-3}]"]
    new, old = load(file, sources).to_dict(), load(file, sources).to_dict()
    for source in old["data"]["sources"]:
        del source["text_field"], source["allow_dropped"]
    del old["optim"]["groups"][0]["weight_decay"]
    assert identity_diff(old, new) == []
    new["data"]["sources"][1]["text_field"] = "body"
    assert identity_diff(old, new) == [("data.sources.1.text_field", "text", "body")]


def test_a_field_added_later_to_examples_counts_as_its_default(file):
    examples = ["data.sources=[]", "data.examples={path: a.jsonl}"]
    new, old = load(file, examples).to_dict(), load(file, examples).to_dict()
    del old["data"]["examples"]["format"], old["data"]["examples"]["allow_dropped"]
    assert identity_diff(old, new) == []
    new["data"]["examples"]["format"] = "messages"
    assert identity_diff(old, new) == [("data.examples.format", "auto", "messages")]


def test_a_source_more_is_another_run(file):
    one = load(file, ["data.sources=[{path: a}]"]).to_dict()
    two = load(file, ["data.sources=[{path: a}, {path: b}]"]).to_dict()
    assert ("data.sources.1.weight", None, 1.0) in identity_diff(one, two)
    assert ("data.sources.1.weight", 1.0, None) in identity_diff(two, one)


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


NAMES = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,12}\Z")
FLOATS = st.floats(min_value=1e-12, max_value=1e12)
RATES = st.floats(min_value=1e-12, max_value=1e3)
PATHS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "run.name": NAMES,
        "run.dir": PATHS,
        "run.seed": st.integers(0, 2**63 - 1),
        "run.steps": st.integers(1, 10**12),
        "model.init_std": RATES,
        "model.tie_embeddings": st.booleans(),
        "data.tokenizer": PATHS,
        "data.holdout": st.floats(0, 1, exclude_max=True),
        "data.sources": st.lists(
            st.fixed_dictionaries({"path": PATHS, "weight": FLOATS}),
            min_size=1,
            max_size=3,
        ),
        "optim.lr": RATES,
        "optim.eps": FLOATS,
        "optim.betas": st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2).map(list),
        "optim.clip_norm": st.none() | FLOATS,
        "optim.groups": st.lists(
            st.fixed_dictionaries({"match": st.text(min_size=1, max_size=9), "lr": st.none() | RATES}),
            max_size=2,
        ),
        "checkpoint.async": st.booleans(),
        "train_only": st.lists(st.text(min_size=1, max_size=9), max_size=3),
        "compile": st.sampled_from(["auto", True, False]),
        "parallel.dp": st.sampled_from(["auto", 1, 2, 4]),
    },
)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    deadline=None,
    derandomize=True,
    max_examples=60,
)
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
