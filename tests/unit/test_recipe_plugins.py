"""Open sections: options are the keyword arguments of the plug-in the section names."""

from __future__ import annotations

from typing import Annotated

import pytest
from pydantic import Field

from hlat import registry
from hlat.errors import UserError
from hlat.recipe import load

SHORT = "model: {preset: tiny}\ndata:\n  sources: [{dataset: python-stdlib}]\n"


class Probe:
    """An optimizer with one option of each sort; the last four are set elsewhere or shared."""

    def __init__(
        self,
        params: object,
        *,
        needed: int,
        pair: tuple[float, float] = (0.5, 0.5),
        share: Annotated[float, Field(gt=0, lt=1)] = 0.5,
        kind: str | None = None,
        names: list[str] = (),  # type: ignore[assignment]
        anything=object,  # no annotation, and a default that is not plain data
        lr: float = 1.0,
        weight_decay: float = 0.0,
        seed: int = 0,
        rounding: str = "nearest",
    ) -> None: ...


def hidden_types(step: int, *, floor: float, size: NotImported = 3) -> float:  # noqa: F821
    """A schedule whose annotations cannot be resolved."""
    return 1.0


@pytest.fixture
def file(tmp_path, monkeypatch):
    for kind in registry.KINDS:
        registry.names(kind)  # HLAT's own first
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    registry.register("optim", "probe")(Probe)
    registry.register("schedule", "hidden")(hidden_types)
    path = tmp_path / "r.yaml"
    path.write_text(SHORT)
    return path


def test_defaults_are_filled_in_and_types_kept(file):
    recipe = load(file, ["optim={name: probe, needed: 3, pair: [1, 0.25]}"])
    assert recipe.optim.options == {"needed": 3, "pair": (1.0, 0.25), "share": 0.5, "kind": None, "names": ()}
    assert recipe.to_dict()["optim"]["pair"] == [1.0, 0.25]
    assert recipe.optim.lr == 3e-4


def test_a_default_and_the_same_value_given_are_one_recipe(file):
    plain = load(file, ["optim={name: probe, needed: 3}"])
    assert plain == load(file, ["optim={needed: 3, share: 0.5, name: probe, pair: [0.5, 0.5]}"])
    assert plain.fingerprint() == load(file, ["optim={name: probe, needed: 3.0, share: 0.5}"]).fingerprint()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{name: probe}", "optim: optim 'probe' needs the option 'needed'; set optim.needed"),
        (
            "{name: probe, needed: 1, pairs: 2}",
            "optim.pairs: unknown key 'pairs' for 'probe'; did you mean 'pair'?",
        ),
        ("{name: probe, needed: x}", 'optim.needed: expected a whole number, got "x"'),
        ("{name: probe, needed: 1.5}", "optim.needed: expected a whole number, got 1.5"),
        ("{name: probe, needed: true}", "optim.needed: expected a whole number, got true"),
        ("{name: probe, needed: 1, pair: [1]}", "optim.pair: expected a list of 2 numbers, got [1]"),
        (
            "{name: probe, needed: 1, pair: 1}",
            "optim.pair: expected a list of 2 numbers, got 1; put it in [ ]",
        ),
        ("{name: probe, needed: 1, share: 1}", "optim.share: must be less than 1, got 1"),
        ("{name: probe, needed: 1, share: .inf}", "optim.share"),
        (
            "{name: probe, needed: 1, kind: 3}",
            "optim.kind: expected a text or null, got 3; put it in quotes: '3'",
        ),
        ("{name: probe, needed: 1, seed: 3}", "unknown key 'seed' for 'probe'; set run.seed instead"),
        ("{name: probe, needed: 1, rounding: up}", "set precision.rounding instead"),
        ("{name: prob, needed: 1}", "optim.name: unknown optim 'prob'; did you mean 'probe'?"),
        ("{name: adamw, momentum: 0.9}", "unknown key 'momentum' for 'adamw'"),
    ],
)
def test_wrong_options(file, section, message):
    with pytest.raises(UserError) as error:
        load(file, [f"optim={section}"])
    assert message in str(error.value)


def test_options_without_readable_types_pass(file):
    assert load(file, ["schedule={name: hidden, size: 7}"]).schedule.options == {"size": 7}
    options = load(file, ["optim={name: probe, needed: 1, names: [a], anything: [1]}"]).optim.options
    assert options["names"] == ("a",) or options["names"] == ["a"]
    assert options["anything"] == (1,)


def test_a_section_without_options_says_so(file):
    with pytest.raises(UserError, match="unknown key 'x' for 'causal_lm'; it has no options"):
        load(file, ["objective.x=1"])
