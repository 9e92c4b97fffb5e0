"""The mesh: coordinates, layouts that fit, and what is said of those that do not."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hlat.errors import UserError
from hlat.mesh import Layout, Place, split
from hlat.model.init import parameter_shapes
from hlat.parallel.plan import PLAN, part_of, role_of

SIZES = st.integers(1, 5)


@given(SIZES, SIZES, SIZES)
def test_every_rank_has_one_place(dp: int, pp: int, tp: int) -> None:
    layout = Layout(dp, pp, tp)
    places = [layout.place(rank) for rank in range(layout.world)]
    assert len(set(places)) == layout.world
    assert [layout.rank(place) for place in places] == list(range(layout.world))
    if tp > 1:
        assert layout.place(1) == Place(0, 0, 1)  # neighbours share layers


@given(st.integers(0, 100), st.integers(1, 12))
def test_parts_of_a_split_cover_it_in_order(total: int, parts: int) -> None:
    runs = [split(total, parts, i) for i in range(parts)]
    covered = [item for start, length in runs for item in range(start, start + length)]
    assert covered == list(range(total))
    assert all(length <= runs[0][1] for _, length in runs)


def test_layout_of_a_recipe(tiny_recipe) -> None:
    recipe = tiny_recipe(
        "parallel.tp=2", "parallel.sequence=true", "parallel.zero1=true", "data.micro_batch=2"
    )
    assert recipe.layout(8) == Layout(dp=4, pp=1, tp=2, sequence=True, zero1=True)
    assert str(recipe.layout(8)) == "dp 4 x pp 1 x tp 2, sequence, zero1"
    assert tiny_recipe("parallel.zero1=true", "parallel.sequence=true").layout(1) == Layout()


REFUSED = [
    ("parallel.tp=3", "tp", "tp 3 does not divide heads 4; take tp 2"),
    ("model.hidden=24 model.heads=12 model.kv_heads=6 parallel.tp=4", "tp", "kv_heads 6 nor is a multiple"),
    ("model.ffn=63 parallel.tp=2", "tp", "does not divide ffn 63; take model.ffn 6"),
    ("model.vocab=5 parallel.tp=4", "tp", "leaves one of tp 4 ranks empty; take model.vocab 8"),
    ("data.seq_len=31 parallel.tp=2 parallel.sequence=true", "sequence", "take data.seq_len 32"),
    ("parallel.pp=3", "pp", "3 pipeline stages for 2 layers; take pp x stages of 2 or less"),
    ("parallel.stages=2", "stages", "set parallel.schedule to interleaved"),
    ("parallel.stages=2 parallel.schedule=interleaved", "stages", "needs a pipeline"),
    ("parallel.pp=2 parallel.schedule=interleaved", "schedule", "set parallel.stages to 2"),
    ("parallel.pp=2 parallel.cuts=[layers.1,layers.1]", "cuts", "2 cuts for 2 stages; name 1"),
    ("parallel.pp=2 parallel.cuts=[layers.2]", "cuts", "from layers.1 to layers.1"),
    ("parallel.pp=2 parallel.cuts=[head]", "cuts", "not ascending layers"),
]


@pytest.mark.parametrize(("overrides", "key", "says"), REFUSED)
def test_a_layout_that_does_not_fit_the_model_is_refused(tiny_recipe, overrides, key, says) -> None:
    with pytest.raises(UserError) as caught:
        tiny_recipe(*overrides.split())
    assert caught.value.where.endswith(f"parallel.{key}") and says in caught.value.line()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("parallel.pp=2", "1f1b needs at least pp 2 micro-batches a step, not 1; take data.micro_batch"),
        (
            "model.layers=4 parallel.pp=2 parallel.stages=2 parallel.schedule=interleaved "
            "data.global_batch=9 data.micro_batch=3",
            "interleaved needs a multiple of pp 2 micro-batches a step, not 3",
        ),
    ],
)
def test_schedules_need_enough_micro_batches(tiny_recipe, overrides, says) -> None:
    recipe = tiny_recipe(*overrides.split())  # how many there are depends on the number of processes
    with pytest.raises(UserError) as caught:
        recipe.accumulate(2)
    assert caught.value.where == "data.micro_batch" and says in caught.value.line()
    with pytest.raises(UserError, match="data.micro_batch"):
        tiny_recipe(*overrides.split(), "parallel.dp=1")


def test_key_value_heads_may_be_shared_by_ranks(tiny_recipe) -> None:
    recipe = tiny_recipe("model.heads=16", "model.kv_heads=4", "model.vocab=112", "parallel.tp=16")
    assert recipe.layout(16).tp == 16


def test_a_world_that_does_not_fit_is_refused(tiny_recipe) -> None:
    with pytest.raises(
        UserError, match="tp 2 x pp 1 does not fit 3 processes; start a multiple of 2 processes, or"
    ):
        tiny_recipe("parallel.tp=2").layout(3)
    with pytest.raises(UserError, match="multiple of 2 processes .torchrun --nproc-per-node 2 -m hlat train"):
        tiny_recipe("parallel.tp=2").layout()


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2)])
def test_parts_cover_every_parameter_once(tiny_recipe, tp: int, pp: int, tie: bool) -> None:
    config = tiny_recipe("model.kv_heads=2", f"model.tie_embeddings={str(tie).lower()}").model
    layout = Layout(1, pp, tp, sequence=tp > 1)
    for name, shape in parameter_shapes(config).items():
        parts = [part_of(name, shape, config, layout, Place(0, 0, i)) for i in range(tp)]
        boxes = {part.offset: part.size for part in parts if part.primary}
        elements = sum(size[0] * (size[1] if len(size) > 1 else 1) for size in boxes.values())
        assert elements == shape[0] * (shape[1] if len(shape) > 1 else 1)
        assert len(boxes) == sum(part.primary for part in parts)
        on_two_stages = tie and pp > 1 and name == "embed.weight"
        for part in parts:
            alike = sum(other.offset == part.offset for other in parts)
            assert part.copies == (2 if on_two_stages else alike)


def test_who_sums_what() -> None:
    assert {role_of(name) for name, _ in PLAN if "*" not in name} == {"vocab", "replicate"}
    with pytest.raises(KeyError, match="no role"):
        role_of("layers.0.router.weight")


def test_the_page_names_every_role() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/parallelism.md").read_text()
    said = page.partition("parameter name to role:")[2].partition("From it follow")[0]
    assert {role for _, role in PLAN} == set(re.findall(r"`(\w+)`", said)) - {"sequence"}


def test_partial_gradients(tiny_recipe) -> None:
    config = tiny_recipe("model.kv_heads=2", "model.tie_embeddings=true").model
    shapes = parameter_shapes(config)
    norm, key = "layers.0.mlp_norm.weight", "layers.0.attention.k.weight"

    def sums(name: str, layout: Layout) -> str:
        return part_of(name, shapes[name], config, layout, Place()).sum_over

    assert sums(norm, Layout(tp=2)) == "" and sums(norm, Layout(tp=2, sequence=True)) == "tp"
    classifier = part_of("classifier.weight", (3, 32), config, Layout(tp=2, sequence=True), Place(tp=1))
    assert (classifier.sum_over, classifier.copies, classifier.primary) == ("", 2, False)
    assert sums(key, Layout(tp=2)) == "" and sums(key, Layout(tp=4)) == "kv"
    assert sums("embed.weight", Layout(tp=2)) == "" and sums("embed.weight", Layout(pp=2)) == "tie"
    tied = part_of(
        "embed.weight", shapes["embed.weight"], config, Layout(pp=2), Place(0, 1), path="head.weight"
    )
    assert not tied.primary and tied.sum_over == "tie"
