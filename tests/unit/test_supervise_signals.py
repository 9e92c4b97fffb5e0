"""What the supervisor says and returns when a signal ends it: "state saved" only where a state was."""

from __future__ import annotations

import os
import signal
from dataclasses import asdict
from pathlib import Path

import pytest

from hlat.observe.jsonl import read_rows
from hlat.supervise.attempt import Outcome, Place
from hlat.supervise.supervisor import Supervisor
from hlat.supervise.watch import Limits

SAVED = "stopped by signal 15 after step 3; state saved, the same command continues"


@pytest.mark.parametrize(
    ("codes", "text", "stepping", "said"),
    [
        ({0: 143}, SAVED, True, "stopped by a signal; state saved"),
        ({0: 143}, SAVED, False, "stopped by a signal; state saved"),  # by a quick first step, too
        ({}, "", False, "no step was done, and nothing is saved that was not before"),  # torchrun was at work
        ({0: 143}, "hlat: stopped by SIGTERM before a first step was done", False, "no step was done"),
        ({0: 143}, "", True, "not all ranks saved: the newest checkpoint stands"),
        ({0: 143, 1: -9}, SAVED, True, "not all ranks saved: the newest checkpoint stands"),
    ],
)
def test_state_saved_is_said_where_it_was(
    tmp_path: Path, codes: dict[int, int], text: str, stepping: bool, said: str
) -> None:
    made = Supervisor(["hlat", "train", "x"], tmp_path, Place(), limits=Limits())
    made.judge.stepped = stepping
    outcome = Outcome(codes=codes, text=text, stopped=signal.SIGINT)
    report = {"host": "node-a", "kernel": "", "reached": 5, **asdict(outcome)}
    assert made._decide(1, {0: report}, made.logs)["exit"] == 130
    (end,) = [row for row in read_rows(made.events.path) if row["event"] == "end"]
    assert said in end["reason"] and ("state saved" in end["reason"]) == ("state saved" in said)


def test_a_second_ctrl_c_waits_for_nothing(tmp_path: Path) -> None:
    made = Supervisor(["hlat", "train", "x"], tmp_path, Place(), limits=Limits())
    with made._signals():
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT):
            made.received = None
            os.kill(os.getpid(), number)
            assert made.received == number
        os.kill(os.getpid(), signal.SIGTERM)  # a second one of the others changes nothing
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_between_two_attempts_has_the_status_of_ctrl_c(tmp_path: Path, monkeypatch) -> None:
    made = Supervisor(["hlat", "train", "x"], tmp_path, Place(), limits=Limits())
    monkeypatch.setattr(made, "_refuse_start", lambda number: None)
    monkeypatch.setattr(made, "_one", lambda number: {"exit": None, "pause": 0.0})
    monkeypatch.setattr(made, "_finish", lambda decision: None)
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 75)):
        monkeypatch.setattr(made, "_pause", lambda seconds, number=number: setattr(made, "received", number))
        assert made.run() == status
