"""`base:` chains, merging and finding shipped recipes."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hlat.errors import UserError
from hlat.recipe import load
from hlat.recipe_io import find_recipe, merge, shipped_recipes

BASE = """
run: {steps: 50}
model: {preset: tiny, ffn: 512}
data: {sources: [{path: a}, {path: b}], micro_batch: 2}
optim: {name: adamw, lr: 1e-3, betas: [0.8, 0.9], eps: 1e-6, clip_norm: 0.5}
schedule: {name: wsd, decay_fraction: 0.5, floor: 0.25}
"""


def write(folder, **files):
    for name, text in files.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder / f"{name}.yaml"


def test_deep_merge_and_replaced_lists(tmp_path):
    recipe = load(
        write(tmp_path, base=BASE, top="base: base.yaml\ndata: {sources: [{path: c}]}\nrun: {seed: 3}\n")
    )
    assert [source.path for source in recipe.data.sources] == ["c"]
    assert (recipe.data.micro_batch, recipe.run.steps, recipe.run.seed) == (2, 50, 3)
    assert (recipe.run.name, recipe.model.ffn) == ("top", 512)
    assert recipe.optim.options == {"betas": (0.8, 0.9), "eps": 1e-6}


def test_another_optimizer_keeps_what_all_share_and_drops_the_rest(tmp_path):
    recipe = load(write(tmp_path, base=BASE, top="base: base.yaml\noptim: {name: sgd}\n"))
    assert (recipe.optim.lr, recipe.optim.clip_norm) == (1e-3, 0.5)
    assert recipe.optim.options == {"momentum": 0.9}


def test_the_same_rule_holds_on_the_command_line_in_any_order(tmp_path):
    file = write(tmp_path, base=BASE)
    for overrides in (["optim.name=sgd", "optim.momentum=0.5"], ["optim.momentum=0.5", "optim.name=sgd"]):
        assert load(file, overrides).optim.options == {"momentum": 0.5}
    assert load(file, ["optim.name=adamw"]).optim.options["eps"] == 1e-6
    assert load(file, ["schedule.name=cosine"]).schedule.floor == 0.25
    assert load(file, ["schedule.name=cosine"]).schedule.options == {}


def test_another_preset_starts_the_model_anew(tmp_path):
    file = write(tmp_path, base=BASE)
    assert load(file, ["model.preset=160m"]).model.ffn == 3072
    assert load(file, ["model.preset=tiny"]).model.ffn == 512
    write(tmp_path, resolved=load(file).to_yaml())
    assert load(tmp_path / "resolved.yaml", ["model.preset=160m"]).model.hidden == 768


def test_a_chain_and_relative_paths(tmp_path):
    write(tmp_path, base=BASE)
    write(tmp_path, **{"sub/mid": "base: ../base.yaml\nrun: {steps: 60}\n"})
    recipe = load(write(tmp_path, top="base: sub/mid.yaml\nlog: {every: 3}\n"))
    assert (recipe.run.steps, recipe.log.every) == (60, 3)


def test_a_shipped_recipe_as_base(tmp_path):
    recipe = load(write(tmp_path, top="base: hlat-7b\ndata: {document_mask: true}\n"))
    assert recipe.model.preset == "hlat-7b"
    assert (recipe.run.name, recipe.run.dir) == ("top", "runs/top")  # not the base's own folder
    assert recipe.run.seed == 12349
    assert recipe.data.document_mask


def test_errors_name_the_file_that_wrote_the_value(tmp_path):
    file = write(tmp_path, base=BASE.replace("micro_batch: 2", "micro_batch: two"), top="base: base.yaml\n")
    with pytest.raises(UserError, match=r"base\.yaml:4: data\.micro_batch: expected a whole number"):
        load(file)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "base: a.yaml\n"}, r"a\.yaml:1: base: base leads back to itself \(a\.yaml -> a\.yaml\)"),
        ({"b": "base: a\n", "a": "base: b.yaml\n"}, r"no such recipe|leads back"),
        ({"b": "base: a.yaml\n", "a": "x: 1\nbase: b.yaml\n"}, r"b\.yaml:1: base: base leads back to itself"),
        ({"a": "base: none.yaml\n"}, r"a\.yaml:1: base: no such recipe: .*none\.yaml"),
        ({"a": "base: hlat-7\n"}, r"did you mean 'hlat-7b'"),
        ({"a": "base: [tiny, 1b]\n"}, r"a\.yaml:1: base: base is not a file name"),
        ({"a": "base: .\n"}, r"is a folder"),
    ],
)
def test_bad_bases(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        load(write(tmp_path, **files))


def test_names_of_shipped_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list(shipped_recipes())[0] == "tiny"
    expected = shipped_recipes()["pretrain/hlat-7b"]
    for name in ("hlat-7b", "hlat-7b.yaml", "pretrain/hlat-7b", "recipes/pretrain/hlat-7b.yaml"):
        assert find_recipe(name) == expected
    (tmp_path / "hlat-7b").write_text("mine")
    assert find_recipe("hlat-7b").read_text() == "mine"  # a file of that name comes first
    for name in ("a\0b", "x" * 5000):
        with pytest.raises(UserError):
            find_recipe(name)


KEYS = st.sampled_from(["run", "data", "eval", "name", "a", "b"])
TREES = st.recursive(
    st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
MAPPINGS = st.dictionaries(KEYS, TREES, max_size=4)


def leaves(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


@settings(deadline=None, derandomize=True)
@given(MAPPINGS, MAPPINGS)
def test_merge_laws(base, over):
    before = copy.deepcopy((base, over))
    merged = merge(base, over)
    assert (base, over) == before
    found = dict(leaves(merged))
    assert all(found[path] == value for path, value in leaves(over))
    for path, value in leaves(base):  # what `over` does not touch stays
        prefixes = [path[:n] for n in range(1, len(path) + 1)]
        touched = dict(leaves(over)).keys() & set(prefixes) or any(
            p[: len(path)] == path for p, _ in leaves(over)
        )
        assert touched or found.get(path) == value or _replaced(over, path)
    assert merge(base, {}) == base
    assert merge({}, over) == over
    assert merge(merged, over) == merged


def _replaced(over, path):
    for key in path:
        if not isinstance(over, dict) or key not in over:
            return False
        over = over[key]
    return True
