"""The fuzzers find what is planted, and nothing in the project's readers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from hlat.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))

from mutations import Files, changed_value, paths_of
from run import fuzz
from target import Target
from targets import TARGETS

SECONDS = 45


class Planted(Target):
    """A reader of one number that is wrong for large ones, in a way of its choice."""

    def __init__(self, fault: Callable[[int], None]) -> None:
        self.fault = fault

    def draw(self, draw: Callable[..., Any]) -> Files:
        return {"number.txt": str(draw(st.integers(0, 10**6))).encode()}

    def read(self, folder: Path) -> None:
        number = int((folder / "number.txt").read_text(encoding="utf-8"))
        if number > 1000:
            self.fault(number)


def refuse(number: int) -> None:
    raise UserError("the number is too large", where="number.txt", fix="write 1000 or less")


def refuse_badly(number: int) -> None:
    raise UserError("<class 'ValueError'>")


def crash(number: int) -> None:
    raise ValueError(number)


def answer_wrongly(number: int) -> None:
    assert number < 0, "another number"


@pytest.mark.parametrize("fault", [crash, answer_wrongly, refuse_badly])
def test_a_planted_fault_is_found_and_made_small(fault: Callable[[int], None], tmp_path: Path) -> None:
    counts, finding = fuzz(Planted(fault), tmp_path / "x", 60, 0)
    assert fault.__name__ in finding or "message for nobody" in finding
    assert (tmp_path / "x/number.txt").read_text(encoding="utf-8") == "1001", "the smallest that fails"


def test_refusals_are_no_findings(tmp_path: Path) -> None:
    counts, finding = fuzz(Planted(refuse), tmp_path / "x", 0.5, 0)
    assert finding == "" and 0 < counts["refused"] <= counts["examples"]


def test_each_place_of_a_value_can_change() -> None:
    value = {"a": [1, {"b": 2}]}
    assert paths_of(value) == [("a",), ("a", 0), ("a", 1), ("a", 1, "b")]
    draws = iter([("a", 1, "b"), "remove"])
    assert changed_value(lambda strategy: next(draws), value) == {"a": [1, {}]} and value == {
        "a": [1, {"b": 2}]
    }


@pytest.mark.slow
def test_no_reader_answers_damage_with_a_traceback_or_a_wrong_answer(tmp_path: Path) -> None:
    """A run of every target, two at a time. For longer: `python tests/fuzz/run.py TARGET --seconds 600`."""

    def one(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(Path(__file__).with_name("run.py")), name]
        limits = ["--seconds", str(SECONDS), "--dir", str(tmp_path)]
        return subprocess.run(
            [*command, *limits], capture_output=True, text=True, timeout=20 * SECONDS, check=False
        )

    with ThreadPoolExecutor(2) as pool:
        done = dict(zip(TARGETS, pool.map(one, TARGETS), strict=True))
    for name, result in done.items():
        assert result.returncode == 0, f"{name}: status {result.returncode}\n{result.stderr[-4000:]}"
        row = json.loads(result.stdout.splitlines()[-1])
        assert 0 < row["refused"] < row["examples"], f"{name} tries nothing: {row}"
