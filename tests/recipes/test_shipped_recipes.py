"""The recipes that ship: they load, their schema is current, and HLAT's carry HLAT's numbers."""

import json
import os
import re

import pytest

from hlat.commands.recipes import description
from hlat.optim.schedule import make_schedule
from hlat.recipe import load
from hlat.recipe_io import recipes_folder, shipped_recipes
from hlat.recipe_schema import recipe_schema, schema_text

FOLDER = recipes_folder()
SHIPPED = shipped_recipes()
each = pytest.mark.parametrize("file", SHIPPED.values(), ids=SHIPPED)


def test_all_are_there():
    assert set(SHIPPED) >= {"tiny", "pretrain/160m", "pretrain/1b", "pretrain/hlat-7b", "pretrain/hlat-70b"}


@each
def test_loads_and_its_resolved_copy_is_the_same(file, tmp_path):
    recipe = load(file)
    assert recipe.run.name == file.stem
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    assert load(tmp_path / "resolved.yaml") == recipe


@each
def test_head_of_the_file(file):
    first = file.read_text().splitlines()[0]
    match = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert match
    assert os.path.samefile(file.parent / match[1], FOLDER / "schema.json")
    assert description(file).endswith(".")


def test_schema_is_current():
    current = json.loads((FOLDER / "schema.json").read_text())
    assert current == json.loads(schema_text()), "run: hlat recipes schema --out recipes/schema.json"


def test_every_key_is_described_and_options_are_offered():
    schema = recipe_schema()
    for name, section in [("recipe", schema), *schema["$defs"].items()]:
        section = section.get("anyOf", [section])[-1]  # a sink may be its name alone
        for key, field in section["properties"].items():
            assert field.get("description") or "$ref" in field, f"{name}.{key}"
        assert section["additionalProperties"] in (True, False), name
    assert (
        "adamw: default [0.9, 0.95]" in schema["$defs"]["OptimSection"]["properties"]["betas"]["description"]
    )
    checkpoint = schema["$defs"]["CheckpointSection"]["properties"]
    assert checkpoint["async"]["type"] == "boolean"
    assert checkpoint["every"]["minimum"] == 1
    assert "required" not in schema
    assert json.dumps(schema)


def test_tiny_trains_long_enough_and_on_what_every_python_has():
    tiny = load("tiny")
    assert tiny.run.steps >= 300
    assert [source.dataset for source in tiny.data.sources] == ["python-stdlib"]
    assert tiny.log.every == 1


@pytest.mark.parametrize(("name", "count"), [("hlat-7b", 6_738_415_616), ("hlat-70b", 68_976_648_192)])
def test_hlat_sizes(name, count):
    recipe = load(name)
    assert recipe.model.parameter_count() == count
    assert recipe.tokens_per_step == 4_194_304


def test_hlat_numbers():
    small, large = load("hlat-7b"), load("hlat-70b")
    for recipe in (small, large):
        assert recipe.optim.options == {"betas": (0.9, 0.95), "eps": 1e-8}
        assert (recipe.optim.weight_decay, recipe.optim.decay, recipe.optim.clip_norm) == (0.1, "all", 1.0)
        assert (recipe.schedule.name, recipe.schedule.warmup_steps) == ("clamped_cosine", 2000)
        assert recipe.horizon_steps == 500_000
        assert recipe.run.seed == 12349
        assert (recipe.data.global_batch, recipe.data.micro_batch, recipe.data.seq_len) == (1024, 1, 4096)
        assert recipe.parallel.sequence
        assert recipe.parallel.recompute == "selective"
        assert recipe.checkpoint.permanent_every_tokens == 100_000_000_000
        assert recipe.backend == "nxd"
        assert recipe.model.scaled_init
    assert (small.optim.lr, large.optim.lr) == (3e-4, 1.5e-4)
    assert (small.model.init_std, large.model.init_std) == (0.021, 0.02)
    assert (small.parallel.tp, small.parallel.pp, small.parallel.zero1) == (8, 1, False)
    assert (large.parallel.tp, large.parallel.pp, large.parallel.zero1) == (32, 8, True)
    assert (small.checkpoint.every, small.checkpoint.keep) == (1000, 5)
    assert (large.checkpoint.every, large.checkpoint.keep) == (300, 3)
    assert (small.precision.master, small.precision.rounding) == ("none", "stochastic")
    assert (large.precision.master, large.precision.rounding) == ("fp32", "nearest")
    # The layouts of the published clusters: 64 nodes of 32 cores.
    assert (small.dp(2048), small.accumulate(2048)) == (256, 4)
    assert (large.dp(2048), large.accumulate(2048)) == (8, 128)


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.0), (1, 1.5e-7), (2000, 3e-4), (200_000, 1.9743e-4), (397_994, 3e-5), (500_000, 3e-5)],
)
@pytest.mark.parametrize(("name", "scale"), [("hlat-7b", 1.0), ("hlat-70b", 0.5)])
def test_hlat_learning_rates(name, scale, step, rate):
    recipe = load(name)
    section = recipe.schedule
    schedule = make_schedule(
        section.name,
        warmup_steps=section.warmup_steps,
        horizon_steps=recipe.horizon_steps,
        floor=section.floor,
        **section.options,
    )
    assert recipe.optim.lr * schedule(step) == pytest.approx(scale * rate, rel=5e-5)
