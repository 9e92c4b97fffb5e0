"""The supervisor's parts that need no run: limits of phases, who is late, books of time, logs, decisions."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hlat.cli import main
from hlat.doctor.finding import Finding
from hlat.observe.heartbeat import FIRST_STEP, STEP, Heartbeat, Pace, Pulse, read_all
from hlat.observe.jsonl import read_rows
from hlat.recipe import load
from hlat.supervise import processes
from hlat.supervise.attempt import Outcome, Place
from hlat.supervise.goodput import Span, StepTimes, Timeline, goodput, table
from hlat.supervise.logs import LogMirror
from hlat.supervise.supervisor import Budget, Supervisor
from hlat.supervise.watch import Limits, name_the_late, overdue, sign

LIMITS = Limits(loading=300.0, compiling=500.0, stepping=30.0, checkpointing=60.0, evaluating=90.0)


def beat(phase: str = STEP, **values: Any) -> Heartbeat:
    return replace(Heartbeat(0, 1, 7, phase, began=100.0, stamp=100.0), **values)


def moving(**values: Any) -> Heartbeat:
    return beat(pace=1.0, **values)


def late(*beats: Heartbeat, now: float, compiles: bool = False, halted: bool = False) -> list[int]:
    table = {b.rank: b for b in beats}
    return [b.rank for b in overdue(table, now, LIMITS, lambda pid: compiles, lambda pid: halted)]


@pytest.mark.parametrize(
    ("heard", "limit"),
    [
        (beat("data"), 300.0),
        (beat(FIRST_STEP), 500.0),
        (beat(), 60.0),
        (beat(pace=0.0), 30.0),
        (beat(pace=4.0), 38.0),
        (beat("checkpoint"), 60.0),
        (beat("checkpoint", patient=True), 300.0),
        (beat("evaluation"), 90.0),
        (beat("comparison of replicas"), 90.0),
    ],
)
def test_each_phase_has_its_limit(heard: Heartbeat, limit: float) -> None:
    assert late(heard, now=100.0 + limit - 0.1) == []
    assert late(heard, now=100.0 + limit + 0.1) == [0]


def test_a_compiler_at_work_has_the_limit_of_compiling() -> None:
    assert late(moving(), now=160.1, compiles=True) == []
    assert late(moving(), now=600.1, compiles=True) == [0]


def test_those_that_wait_for_a_compiler_are_excused_too() -> None:
    a, b = moving(rank=0, pid=1), moving(rank=1, pid=2, waiting=True)

    def found(waiting: bool, elsewhere: bool, compiler: int) -> list[int]:
        table = {0: a, 1: replace(b, waiting=waiting)}
        late = overdue(
            table, 160.0, LIMITS, lambda pid: pid == compiler, lambda pid: False, lambda: elsewhere
        )
        return [heard.rank for heard in late]

    assert found(waiting=True, elsewhere=False, compiler=1) == []
    assert found(waiting=False, elsewhere=False, compiler=1) == [1]
    assert found(waiting=True, elsewhere=True, compiler=0) == [0]


def test_a_stopped_process_is_excused_by_no_phase() -> None:
    assert late(beat("data"), now=131.0, halted=True) == [0]
    assert late(beat("data", stamp=120.0), now=131.0, halted=True) == []


def test_limits_come_from_the_recipe() -> None:
    recipe = load("tiny", ["parallel.timeout=77", "parallel.first_timeout=777"])
    assert Limits.of(recipe, 12.0) == Limits(777.0, 777.0, 12.0, 77.0, 77.0, headroom=4.5)
    assert Limits.of(recipe, 6.0).headroom == 3.0


def test_the_search_ends_at_the_limit() -> None:
    limits = replace(LIMITS, headroom=4.0)
    heard = {0: beat(pace=2.0)}  # 34 s
    for now, found in ((129.9, 0), (130.1, 1)):
        assert len(overdue(heard, now, limits, lambda pid: False, lambda pid: False)) == found


def test_the_silent_rank_is_named_over_machines() -> None:
    a, b = beat(rank=0, pid=11, waiting=True), beat(rank=1, pid=22)
    later = replace(a, stamp=103.0)
    hosts = {
        "node-a": ([sign(a, 0.1)], [sign(later, 0.1)]),
        "node-b": ([sign(b, 9.0)], [sign(b, 12.0)]),
    }
    rank, text = name_the_late(hosts, 1e9)
    assert rank == 1 and "node-b, pid 22" in text and "no sign of life" in text


def test_pace_is_the_slowest_step_but_one_and_books_every_phase(monkeypatch: Any) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pace = Pace()
    pace.window(2)
    for step, (phase, seconds) in enumerate(
        [(FIRST_STEP, 9.0), (STEP, 1.0), (STEP, 60.0), (STEP, 3.0), (STEP, 2.0), ("checkpoint", 5.0)], 1
    ):
        pace.begin(step, phase)
        pace.begin(step, phase)  # said twice
        assert pace.slowest() == (3.0 if phase == "checkpoint" else -1.0)  # two windows of two steps
        now[0] += seconds
    look = pace.look(now[0])
    assert look["first"] == 1 and look["phase"] == "checkpoint"
    assert look["spent"] == {"start": 0.0, FIRST_STEP: 9.0, STEP: 66.0, "checkpoint": 5.0}


def test_a_pulse_is_read_back(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path, 3)
    pulse.pace.begin(5, STEP)
    deadline = time.monotonic() + 10
    while (found := read_all(tmp_path).get(3)) is None or found.step != 5:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (found.pid, found.step, found.phase) == (os.getpid(), 5, STEP)
    (tmp_path / "rank-00004.json").write_text('{"rank": 4')  # being written by somebody else
    assert list(read_all(tmp_path)) == [3]


def step_times(first: int, last: int) -> StepTimes:
    times = StepTimes()
    times.add(first, last, last + 1.0 - first)
    return times


def test_steps_trained_again_count_once() -> None:
    first = Span(0.0, 10.0, 1, step_times(2, 4), {"loading": 5.0, "down": 2.0})
    second = Span(12.0, 20.0, 3, step_times(4, 5), {"loading": 4.0, "compiling": 1.0, "down": 1.0})
    seconds = table([first, second])
    assert seconds["stepping"] == 3.0 and seconds["repeated"] == 2.0
    assert sum(seconds.values()) == 20.0
    assert goodput([first, second]) == 3.0 / 20.0


@given(st.lists(st.tuples(st.sampled_from([STEP, "data", "checkpoint"]), st.floats(0.01, 5)), max_size=30))
def test_the_books_add_up_to_the_wall_time(phases: list[tuple[str, float]]) -> None:
    timeline, now, spent, step = Timeline(), 50.0, {}, 0
    timeline.start(now)
    for phase, seconds in phases:
        now, step = now + seconds, step + (phase == STEP)
        spent[phase] = spent.get(phase, 0.0) + seconds
        timeline.look({0: Heartbeat(0, 1, step, phase, now, now, spent=dict(spent))})
    timeline.finish(now + 3.0)
    seconds_by_kind = table(timeline.spans)
    assert sum(seconds_by_kind.values()) == pytest.approx(now + 3.0 - 50.0)
    assert seconds_by_kind["stepping"] == pytest.approx(spent.get(STEP, 0.0))
    assert seconds_by_kind["down"] == pytest.approx(3.0)


def test_a_run_that_went_back_by_itself_repeats() -> None:
    timeline = Timeline()
    timeline.start(0.0)
    for stamp, step, rewinds in ((1.0, 1, 0), (2.0, 2, 0), (3.0, 3, 0), (5.0, 3, 1)):  # 2 and 3 again
        back = {"rewinds": rewinds, "back_to": 2 * rewinds}
        timeline.look({0: Heartbeat(0, 1, step, STEP, stamp, stamp, spent={STEP: stamp}, **back)})
    timeline.finish(5.0)
    assert table(timeline.spans) == {"stepping": 3.0, "repeated": 2.0, "down": 0.0}


def test_pace_knows_where_it_went_back_to() -> None:
    pace = Pace()
    for step in (1, 2, 3, 2, 3, 4):
        pace.begin(step, STEP)
    look = pace.look(time.monotonic())
    assert (look["rewinds"], look["back_to"]) == (1, 2)


def test_logs_are_copied_as_they_grow_and_nothing_is_lost_while_the_disk_is_full(tmp_path: Path) -> None:
    source, target = tmp_path / "scratch" / "a" / "attempt_0" / "1", tmp_path / "run" / "logs"
    source.mkdir(parents=True)
    mirror = LogMirror(tmp_path / "scratch", target, first=8)
    (source / "stderr.log").write_text("one\n")
    target.parent.write_text("")  # a file where the folder should be: nothing can be written
    mirror.sync()
    target.parent.unlink()
    with (source / "stderr.log").open("a") as file:
        file.write("two\n")
    mirror.sync()
    mirror.sync()
    assert (target / "rank-00009-stderr.log").read_text() == "one\ntwo\n"
    assert "two" in mirror.tail()


def test_descendants_are_found_and_ended() -> None:
    code = "import subprocess, sys; subprocess.run(['sleep', '60'])"
    script = (
        "import subprocess, sys, time; from hlat.supervise import processes as p; p.adopt_orphans();"
        f"child = subprocess.Popen([sys.executable, '-c', {code!r}]); time.sleep(1.0);"
        "child.kill(); child.wait(); time.sleep(0.2); print([d.name for d in p.end_all()]);"
        "import os; print(p.descendants(os.getpid()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n")[:2] == ["['sleep']", "[]"], done


def test_a_compiler_is_known_by_its_script_too(tmp_path: Path) -> None:
    script = tmp_path / "neuronx-cc"
    script.write_text("#!/bin/sh\nsleep 30\n")
    script.chmod(0o755)
    child = subprocess.Popen([str(script)])
    try:
        deadline = time.monotonic() + 10
        while not processes.compiles(os.getpid()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert processes.compiles(os.getpid())
        assert not processes.halted(child.pid)
        child.send_signal(signal.SIGSTOP)
        while not processes.halted(child.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert processes.halted(child.pid)
    finally:
        for pid in [process.pid for process in processes.descendants(child.pid)] + [child.pid]:
            os.kill(pid, signal.SIGKILL)
        child.wait()


def supervisor(folder: Path, **values: Any) -> Supervisor:
    made = Supervisor(["hlat", "train", "x"], folder, Place(), limits=LIMITS, **values)
    made.timeline.start(0.0)
    return made


def decide(made: Supervisor, outcome: Outcome, reached: int = 5, number: int = 1) -> dict[str, Any]:
    report = asdict(outcome)
    report.pop("beats")
    shared = {0: {**report, "host": "node-a", "kernel": "", "reached": reached}}
    return made._decide(number, shared, made.logs)


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (Outcome(code=0), 0),
        (Outcome(codes={0: 2, 1: 2}, text="hlat: error: x.yaml: optim.lr: nonsense"), 2),
        (Outcome(codes={0: 3}, text="hlat: error: guard.patience: 100 steps in a row were skipped"), 3),
        (Outcome(codes={1: 1}, text="Traceback (most recent call last):\n  File x\nKeyError: 'a'"), 1),
        (Outcome(codes={1: -9}), None),
        (Outcome(codes={0: 74}), None),
        (Outcome(codes={0: 143, 1: 143}), None),
        (Outcome(codes={0: 138, 1: 138}), 75),
        (Outcome(codes={0: 143}, text="stopped by a spot interruption notice after step 7"), 75),
        (Outcome(codes={0: 143}, stopped=signal.SIGTERM), 75),
        (Outcome(codes={0: 143}, stopped=signal.SIGINT), 130),
        (Outcome(codes={0: 1}, text="nrt_execute status=1201 NRT_EXEC_HW_ERR_HBM_UE"), None),
        (Outcome(codes={0: 77, 1: 77}), 77),
        (Outcome(codes={0: 77, 1: -9}, text="nrt_execute status=1201 NRT_EXEC_HW_ERR_HBM_UE"), 77),
        (Outcome(codes={0: 77}, stopped=signal.SIGTERM), 77),
        (Outcome(codes={0: 77}, hang=True), 77),
    ],
)
def test_what_comes_next(tmp_path: Path, outcome: Outcome, status: int | None) -> None:
    made = supervisor(tmp_path)
    assert decide(made, outcome)["exit"] == status
    assert not (made.logs / "bad-nodes.txt").exists()


ACCUSATIONS = (
    "sample: uncorrectable ECC error encountered",
    "nrt_execute status=1201 NRT_EXEC_HW_ERR_HBM_UE",
    "NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus.",
    "NEURON_HW_ERR=HBM_UNCORRECTABLE_ERROR",
    "RuntimeError: nrt_execute status=6",
    "OSError: [Errno 30] Read-only file system: 'x'",
    "OFI plugin initNet() failed is EFA enabled?",
)


@pytest.mark.parametrize("line", ACCUSATIONS)
def test_a_rank_alone_makes_no_machine_bad(tmp_path: Path, line: str) -> None:
    """A sample that it prints may hold any text: the machine's kernel or checks must say so too."""
    ecc = Finding("devices.memory", "fail", "uncorrected memory errors")
    asked: list[int] = []

    def reported(findings: list[Finding], kernel: str = "", hang: bool = False) -> dict[str, Any]:
        made = supervisor(tmp_path / "run", checks=lambda: asked.append(1) or findings)
        made.judge.count = 2
        signs = ([sign(beat(), 0.1)], [sign(beat(), 2.6)]) if hang else None
        outcome = Outcome(codes={0: 1}, text=f"before\n{line}\nafter", hang=hang, why="late", signs=signs)
        shared = {0: {**made._report(outcome, kernel), "host": "node-a"}}
        shared[1] = {**made._report(Outcome(), ""), "host": "node-b"}
        for number in (1,) if hang else (1, 2):  # the second time is the machine's fault too
            made._decide(number, shared, made.logs)
        *_, end = read_rows(made.events.path)
        bad = made.logs / "bad-nodes.txt"
        return {"bad": bad.read_text() if bad.exists() else "", **end}

    disk = Finding("disk.run", "fail", "1 GB free")
    for hang in (False, True):
        doubted = reported([disk], hang=hang)
        assert doubted["bad"] == "" and doubted["kind"] != "node"
        assert hang or "neither the kernel's log nor the check of node-a confirms" in doubted["reason"]
    sure = reported([ecc])
    assert sure["bad"] == "node-a\n" and "the check of this machine: devices.memory" in sure["reason"]
    (tmp_path / "run/logs/supervisor/bad-nodes.txt").unlink()
    asked.clear()
    xid = "NVRM: Xid (PCI:0000:3b:00): 48, pid=4711, name=python, DBE (double bit error) detected"
    assert reported([], kernel=xid)["bad"] == "node-a\n" and not asked


def test_status_0_is_not_done(tmp_path: Path) -> None:
    """Neither before the last checkpoint nor when a rank had more to do, an upload for example."""
    made = supervisor(tmp_path, lacking=lambda: "there is no complete checkpoint; the last step is 9")
    for number in (1, 2, 3):
        assert decide(made, Outcome(code=0), number=number)["exit"] is None
    assert decide(made, Outcome(code=0), number=4)["exit"] == 1, "within the budget"
    made = supervisor(tmp_path)
    assert decide(made, Outcome(code=0, unfinished=[3]))["exit"] is None
    assert decide(made, Outcome(code=0, unfinished=[3], stopped=signal.SIGTERM), number=2)["exit"] == 75
    assert decide(made, Outcome(code=0, stopped=signal.SIGTERM), number=3)["exit"] == 0
    rows = [row for row in read_rows(made.events.path) if row["event"] == "end"]
    assert [row["kind"] for row in rows] == [*["unknown"] * 5, "preempted", "done"]
    assert rows[0]["rule"] == "clean" and rows[0]["reason"].endswith("checkpoint; the last step is 9")
    assert rows[4]["reason"].endswith(": rank 3 had more to do")
    assert "state saved" not in rows[5]["reason"]


def test_a_warning_is_not_why_a_rank_ended(tmp_path: Path) -> None:
    made = supervisor(tmp_path)
    full = "[rank 0] metrics.py:251: UserWarning: [Errno 28] No space left on device"
    report = {**asdict(Outcome(codes={1: -9}, text=full)), "kernel": ""}
    assert made.judge._classify(report).rule == made.judge._classify({**report, "text": ""}).rule
    assert (
        made.judge._classify({**report, "text": full.replace("UserWarning", "OSError")}).rule == "disk-full"
    )


def test_the_pause_grows_without_progress_and_the_budget_ends(tmp_path: Path) -> None:
    made = supervisor(tmp_path, budget=Budget(restarts=10, fruitless=3, pause=2.0))
    killed = Outcome(codes={1: -9})
    decisions = [decide(made, killed, reached=5, number=n) for n in (1, 2, 3)]
    assert [d.get("pause") for d in decisions] == [2.0, 4.0, 8.0]
    assert decide(made, killed, reached=9, number=4)["pause"] == 2.0
    ends = [decide(made, killed, reached=9, number=n) for n in (5, 6, 7)]
    assert [e["exit"] for e in ends] == [None, None, 1] and "no further than step 9" in ends[-1]["why"]
    spent = decide(supervisor(tmp_path, budget=Budget(restarts=4)), killed, number=5)
    assert spent["exit"] == 1 and "--max-restarts" in spent["why"]
    patient = supervisor(tmp_path, budget=Budget(10**6, 10**6))
    patient._best, patient._fruitless = (9, 0), 5000
    assert decide(patient, killed, number=5001)["pause"] == 300.0


def test_an_unfit_machine_is_not_started_on(tmp_path: Path, capsys: Any) -> None:
    faults = [Finding("devices.neuron", "fail", "15 of 16 devices"), Finding("disk.run", "fail", "1 GB free")]
    made = supervisor(tmp_path, checks=lambda: faults)
    assert made.run() == 76
    assert (made.logs / "bad-nodes.txt").read_text() == f"{socket.gethostname()}\n"
    assert "unfit to train: devices.neuron: 15 of 16 devices\n" in capsys.readouterr().err
    made.checks = lambda: faults[1:]  # another machine would have the same disk: told, and tried
    assert made._refuse_start(1) is None and "disk.run: 1 GB free" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["tiny", "optim.lrr=1"], "unknown key 'lrr'"),
        (["tiny", "--nproc-per-node", "0"], "--nproc-per-node: 0 is too small; write 1 or more"),
        (["tiny", "--nnodes", "2"], "--master-addr: several machines need it"),
        (["tiny", "--hang-seconds", "nan"], "--hang-seconds: expected a number, got 'nan'"),
        (["tiny", "--grace", "inf"], "--grace: expected a number, got 'inf'"),
        (["tiny", "--meet-seconds", "-1"], "--meet-seconds: -1 is no duration"),
        (["tiny", "--node-rank", "1"], "--node-rank: 1 is not below --nnodes 1"),
        (["tiny", "--nproc-per-node", "3", "parallel.tp=2"], "parallel"),
        (
            ["tiny", "run.dir=/dev/null/run"],
            "/dev/null/run: cannot use the run folder: '/dev/null/run' lies below a file",
        ),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], line: str, tmp_path: Path, capsys: Any) -> None:
    status = main(["supervise", "tiny", f"run.dir={tmp_path / 'run'}", *arguments[1:]])
    error = capsys.readouterr().err
    assert status == 2 and line in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
