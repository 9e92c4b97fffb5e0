"""Real failures of real ranks, and what the failure table makes of what they leave behind."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from hlat.supervise.classify import Evidence, classify, kernel_lines
from tests.parity.test_failures import NEVER, Place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mishap", "override", "world", "rule", "rank"),
    [
        (("raise", 1, 2), "log.every=1", 2, "exception", 1),
        (("kill", 1, 2), "log.every=1", 2, "gone", 1),
        (("sleep", 1, 2), "parallel.timeout=8", 2, "late", 1),
        (("flip", 2, 1), "parallel.verify_every=2", 4, "replica-differs", 2),
        (("nan", -1, 1), "guard.patience=1", 2, "guard", None),
        (NEVER, "optim.lr_rate=1", 2, "recipe", None),
    ],
)
def test_a_real_failure(
    place: Place, mishap: tuple, override: str, world: int, rule: str, rank: int | None
) -> None:
    began = time.time()
    ended = place.by_hand(world, mishap, override, special=None)
    codes = {number: code for number, code in enumerate(ended.codes) if code is not None}
    text = "\n".join(ended.texts)
    verdict = classify(Evidence(codes, text, kernel_lines(began)))
    assert (verdict.rule, verdict.rank) == (rule, rank), f"{verdict.reason}\n{codes}\n{text[-3000:]}"
