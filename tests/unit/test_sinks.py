"""Sinks of another package: found by its entry point, named by the recipe, opened, fed and closed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from hlat import registry
from hlat.errors import UserError
from hlat.observe import sinks
from hlat.observe.metrics import MetricBuffer
from hlat.recipe import Recipe, load
from tests.unit.test_train_command import make_place, rows, train

PAGE = Path(__file__).parents[2] / "docs/run-folder.md"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe, and the package of docs/run-folder.md as if it were installed."""
    text = PAGE.read_text(encoding="utf-8").partition("A package can add its own sink")[2]
    module, points = (re.search(rf"```{kind}\n(.*?)```", text, re.S)[1] for kind in ("python", "toml"))
    site = tmp_path / "site"
    info = site / "my_tracker-0.1.dist-info"
    info.mkdir(parents=True)
    (site / "my_tracker.py").write_text(module)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-tracker\nVersion: 0.1\n")
    entry = re.sub(r'^\[project\.entry-points\."(.*)"\]', r"[\1]", re.sub(r'"(my_tracker)".*', r"\1", points))
    (info / "entry_points.txt").write_text(entry)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, "my_tracker", raising=False)
    for kind in registry.KINDS:
        registry.names(kind)  # HLAT's own first
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.setattr(registry, "_plugins_loaded", False)
    return make_place(tmp_path, monkeypatch)


def test_a_run_gives_its_rows_to_a_sink_of_another_package(place: Path) -> None:
    quick = ("run.steps=4", "eval.every=0", "eval.rows=1", "data.holdout=0", "checkpoint.every=9")
    assert train("log.sinks=[{name: my-tracker, file: curve.txt}]", *quick) == 0
    found = [line.split() for line in Path("runs/small/curve.txt").read_text().splitlines()]
    assert [(int(step), float(loss)) for step, loss in found] == [
        (row["step"], row["loss"]) for row in rows("runs/small")
    ]
    assert load("runs/small/resolved.yaml").log.sinks[0].options == {"file": "curve.txt"}


def test_a_name_means_the_defaults_and_the_recipe_travels(place: Path) -> None:
    recipe = load("small.yaml", ["log.sinks=[my-tracker]"])
    assert recipe == load("small.yaml", ["log.sinks=[{name: my-tracker, file: loss.txt}]"])
    assert recipe.to_dict()["log"]["sinks"] == [{"name": "my-tracker", "file": "loss.txt"}]
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.fingerprint() == load("small.yaml").fingerprint(), "a run may go on with other sinks"


WRONG = {
    "[my-traker]": "log.sinks[0].name: unknown sink 'my-traker'; did you mean 'my-tracker'?",
    "[{name: my-tracker, fil: x}]": "log.sinks[0].fil: unknown key 'fil' for 'my-tracker'; did you mean",
    "[my-tracker, {name: my-tracker, file: 3}]": "log.sinks[1].file: expected a text, got 3",
    "[my-tracker, my-tracker]": "log.sinks[1]: my-tracker is asked for twice",
    "[jsonl]": "log.sinks[0]: metrics.jsonl is always written",
    "[{file: x}]": "log.sinks[0].name: this key is missing",
    "my-tracker": 'log.sinks: expected a list of names or mappings, got "my-tracker"; put it in [ ]',
    "[{name: tensorboard, a: 1}]": "log.sinks[0].a: unknown key 'a' for 'tensorboard'; it has no options",
}


@pytest.mark.parametrize("given", WRONG)
def test_what_does_not_exist_is_refused_in_one_line(
    place: Path, given: str, capsys: pytest.CaptureFixture
) -> None:
    assert train(f"log.sinks={given}") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert WRONG[given] in line
    assert not Path("runs").exists()


def test_tensorboard_is_a_sink_too(place: Path, capsys: pytest.CaptureFixture) -> None:
    assert train("log.sinks=[tensorboard]", "log.tensorboard=true") == 2
    assert "tensorboard is asked for twice" in capsys.readouterr().err
    recipe = load("small.yaml", ["log.sinks=[tensorboard]"])
    pytest.importorskip("tensorboard")
    wanted = [(sink.name, sink.options) for sink in recipe.log.sinks]
    for sink in sinks.open_sinks(wanted, place):
        sink.close()


class Away:
    """A tracker whose server answers nothing; `when` says which method finds that out."""

    def __init__(self, when: str) -> None:
        self.when, self.calls = when, []

    def _called(self, method: str) -> None:
        self.calls.append(method)
        if method == self.when:
            raise ConnectionError("server away")

    def row(self, row: object) -> None:
        self._called("row")

    def flush(self) -> None:
        self._called("flush")

    def rewind(self, step: int) -> None:
        self._called("rewind")

    def sync(self) -> None:
        self._called("sync")

    def close(self) -> None:
        self._called("close")


@pytest.mark.parametrize("when", ["row", "flush", "rewind", "sync", "close"])
def test_whatever_fails_in_a_tracker_ends_no_run(when: str) -> None:
    bad, good = Away(when), Away("")
    buffer = MetricBuffer([bad, good])
    with pytest.warns(UserWarning, match="Away failed.*server away"):
        buffer.add(1, {"loss": 1.0})
        assert buffer.trouble() is None
        buffer.rewind(0)
        buffer.close()
    assert good.calls == ["row", "flush", "sync", "rewind", "flush", "close"]
    assert bad.calls.count("close") == 1 == bad.calls.count(when)


def test_a_tracker_that_cannot_be_opened_is_left_out(place: Path) -> None:
    @registry.register("sink", "away")
    class Shut(Away):
        def __init__(self, folder: Path, after_step: int, *, refuse: bool = False) -> None:
            raise UserError("no account") if refuse else ConnectionError("server away")

    said: list[str] = []
    (only,) = sinks.open_sinks([("away", {})], place, warn=said.append)
    only.close()
    assert said == ["metric sink away cannot be opened (ConnectionError: server away); it gets no rows"]
    with pytest.raises(UserError, match="no account"):
        sinks.open_sinks([("away", {"refuse": True})], place)
