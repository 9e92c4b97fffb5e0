"""What docs/data.md says of calls, and of sources that cannot be split."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from hlat.data.examples import Examples
from hlat.data.loader import Data, open_data
from hlat.recipe import load
from tests.unit import test_train_command as small

place, train = small.place, small.train  # `place` is a fixture
PAGE = Path(__file__).parents[2] / "docs/data.md"


def test_calls_on_the_page_have_the_arguments_of_the_code() -> None:
    calls = re.findall(r"`Data\.(\w+)\(([^)`]*)\)`", PAGE.read_text(encoding="utf-8"))
    assert {"holdout_bytes", "holdout_text", "report", "report_lines"} <= {name for name, _ in calls}
    for name, arguments in calls:
        kinds: list[Any] = [Data, Examples] if name.startswith("holdout") else [Data]
        for kind in kinds:
            found = list(inspect.signature(getattr(kind, name)).parameters)[1:]
            assert found == [word.strip() for word in arguments.split(",") if word.strip()], (kind, name)


def test_a_source_of_one_document_is_trained_on_and_alone_refused(place: Path, capsys) -> None:
    """Whatever its hash: all shares up to the largest would have to hold it out."""
    Path("one").mkdir()
    Path("one/a.txt").write_text("the only words there are " * 20)
    alone = "data.sources=[{path: one}]"
    for share in ("0.2", "0.99"):
        assert train(alone, f"data.holdout={share}", "run.dir=alone") == 2
        error = capsys.readouterr().err
        assert error.count("hlat: error:") == 1 and "data.holdout" in error and "one document" in error
    assert not Path("alone").exists()
    assert train(alone, "data.holdout=0", "run.dir=none-held-out", "run.stop_at_step=1") == 0


@pytest.mark.parametrize("share", [0.2, 0.99])
def test_of_two_sources_the_one_document_is_in_training(place: Path, share: float) -> None:
    Path("one").mkdir()
    Path("one/a.txt").write_text("the only words there are " * 20)
    data = open_data(
        load("small.yaml", ["data.sources=[{path: one}, {path: text}]", f"data.holdout={share}"])
    )
    assert isinstance(data, Data)
    counts = [[folder.count(side, "documents") for side in ("train", "holdout")] for folder in data.folders]
    assert counts[0] == [1, 0] and sum(counts[1]) == 40 and min(counts[1]) > 0
