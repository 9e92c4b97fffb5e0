"""What is wrong with a recipe is one line that names the file, the key and the fix."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hlat.errors import UserError
from hlat.recipe import Recipe, load

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
        (
            "model.hidden=255",
            "model.hidden: hidden 255 is not a multiple of heads 4; take hidden 256",
        ),
        (
            "model.heads=3",
            "command line: model.heads: hidden 256 is not a multiple of heads 3; take hidden 258, or heads 2",
        ),
        ("data.skip=[[5, 3]]", "command line: data.skip[0]: the stretch ends at step 3"),
        ("model.kv_heads=3", "model.kv_heads: heads 4 is not a multiple of kv_heads 3; take kv_heads 2"),
        (
            "model.hidden=260",
            "head size 65 (hidden / heads) is odd, and rotary positions need pairs; take hidden 256",
        ),
        ("data.global_batch=30", "global_batch 30 is not a multiple of micro_batch 8; take micro_batch 6"),
        (
            "parallel.dp=3",
            "command line: parallel.dp: global_batch 32 is not a multiple of dp 3: no micro_batch fits;",
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


def test_the_place_is_the_value_that_the_command_line_has_changed(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(f"{SHORT}schedule: {{warmup_steps: 40}}\n")
    said = "warmup_steps 40 exceeds the schedule's 20 steps; take warmup_steps 1, or raise run.steps"
    assert line(file, "run.steps=20") == f"command line: run.steps: {said}"
    assert line(file, "schedule.horizon_steps=20").startswith("command line: schedule.horizon_steps: warmup")
    file.write_text(f"{SHORT}schedule: {{warmup_steps: 40}}\nrun: {{steps: 20}}\n")
    assert line(file, "model.vocab=300") == f"r.yaml:4: schedule.warmup_steps: {said}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "data: {sources: [{path: x}]}\n",
            "r.yaml: model: this section is missing; for example model: {preset: tiny}",
        ),
        (
            "model: {preset: tiny}\n",
            "r.yaml: data: this section is missing; give data.sources or data.examples",
        ),
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
ROUGH = st.fixed_dictionaries({}, optional=dict.fromkeys(Recipe.model_fields, ANYTHING))


@settings(deadline=None, derandomize=True)
@given(ROUGH)
def test_whatever_is_wrong_is_a_user_error(values):
    good = {"model": {"preset": "tiny"}, "data": {"sources": [{"path": "x"}]}}
    for candidate in (values, {**values, **good}, {**good, **values}):
        try:
            recipe = Recipe.from_dict(candidate)
        except UserError:
            continue
        assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_options_of_a_plug_in_name_their_choices(file) -> None:
    six = "beta1, beta2, beta3, rho, c or gamma"
    assert f'optim.learn: expected a list of some of {six}, got ["bta1"]' in line(
        file, "optim.name=mada", "optim.learn=[bta1]"
    )
    wanted = f'optim.hyper_lr: expected a number or a mapping of {six} to a number, got {{"bta1": 1}}'
    assert wanted in line(file, "optim.name=mada", "optim.hyper_lr={bta1: 1}")


def test_half_of_a_surrogate_pair_is_shown_spelt_out(file) -> None:
    """YAML spells with "\ud800" what UTF-8 cannot hold; a message that quotes it is a message still."""
    file.write_text(SHORT.replace("tiny", r'"\ud800"'))
    assert r"model.preset: unknown preset '\ud800'; known: " in line(file)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_what_is_no_finite_number_has_no_quotes_to_remove(text: str) -> None:
    with pytest.raises(UserError) as caught:
        load("tiny", [f"optim.lr={text}"])
    assert f'expected a number, got "{text}"' in caught.value.line() and "quotes" not in caught.value.line()
