"""Several machines: whose account decides, what is asked before the table, and the first machine's end."""

from __future__ import annotations

import itertools
import re
import signal
import socket
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from hlat.errors import UserError
from hlat.observe.heartbeat import STEP, Heartbeat
from hlat.observe.jsonl import read_rows
from hlat.supervise.attempt import Outcome, Place
from hlat.supervise.failure_table import TABLE
from hlat.supervise.judge import Judge
from hlat.supervise.rendezvous import BoundRendezvous
from hlat.supervise.supervisor import Supervisor
from hlat.supervise.team import Machines, TeamLost
from hlat.supervise.watch import Limits, sign

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operations" / "node-checks.md"
ECC = "NVRM: Xid (PCI:0000:3b:00): 48, pid=4711, name=python, DBE (double bit error) detected"
TRACE = "Traceback (most recent call last):\n  File x\nKeyError: 'a'"


def report(host: str = "node-a", kernel: str = "", **values: Any) -> dict[str, Any]:
    """What a machine says of an attempt that failed there."""
    outcome = asdict(Outcome(**values))
    outcome.pop("beats")
    return {**outcome, "host": host, "kernel": kernel, "reached": 5, "fault": ""}


ONE_EACH = {  # in the order of the table
    "folder-lost": report(codes={0: 77}),
    "xid-hardware": report(codes={0: 1}, kernel=ECC),
    "replica-differs": report(
        codes={0: 3}, text="after step 4 rank 2 (b) holds other weights than rank 1 in x"
    ),
    "recipe": report(codes={0: 2}),
    "guard": report(codes={0: 3}),
    "store": report(codes={0: 74}),
    "disk-full": report(codes={0: 1}, text="OSError: [Errno 28] No space left on device"),
    "exception": report(codes={0: 1}, text=TRACE),
    "cuda-memory": report(codes={0: 1}, text="CUDA out of memory"),
    "host-memory-full": report(codes={0: -9}, kernel="Out of memory: Killed process 7 (python)"),
    "gone": report(codes={0: 1}, text="rank 2 (node-a, pid 4711) is gone: last sign 1.2 s ago"),
    "crash": report(codes={0: -11}),
    "killed": report(codes={0: -9}),
    "connection": report(codes={0: 1}, text="Connection reset by peer"),
    "unknown": report(codes={0: 1}),
    "signal": report(codes={0: 143}),  # its ranks were told to end
    "late-start": report(codes={0: 2}, text="hlat: error: ranks 1, 3 of 4 did not come in time"),
}


def test_of_several_machines_the_first_row_decides() -> None:
    names = [row.name for row in TABLE]
    assert [names.index(rule) for rule in ONE_EACH][:-2] == sorted(
        names.index(r) for r in list(ONE_EACH)[:-2]
    )
    for (first, one), (second, other) in itertools.combinations(ONE_EACH.items(), 2):
        if {first, second} == {"signal", "late-start"}:
            continue
        for order in (("a", one, "b", other), ("b", other, "a", one)):
            shared = {0: {**order[1], "host": order[0]}, 1: {**order[3], "host": order[2]}}
            verdict, host = Judge(2, Path("run"), str).judge(shared)
            assert (verdict.rule, host) == (first, "a"), (first, second)


def hung(**values: Any) -> dict[str, Any]:
    beat = Heartbeat(0, 7, 3, STEP, began=0.0, stamp=0.0)
    signs = ([sign(beat, 0.1)], [sign(beat, 2.6)])
    return report(hang=True, why="no progress for 40 s", signs=signs, **values)


DISK = {"codes": {}, "trouble": "/tmp: No space left on device"}
BEFORE_THE_TABLE = [  # each is found although all that come after it are there, too
    ("folder-lost", lambda: {0: report(codes={0: 77}, stopped=15), 1: hung()}),
    ("silent-node", lambda: {1: hung(stopped=15)}),
    ("", lambda: {0: report(code=0, stopped=15), 1: report(code=0)}),
    ("signal", lambda: {0: hung(stopped=15), 1: report(**DISK)}),
    ("xid-hardware", lambda: {0: hung(codes={0: 2}), 1: report(codes={1: 1}, kernel=ECC)}),
    ("hang", lambda: {0: hung(codes={0: 2}, text=TRACE), 1: report(**DISK)}),
    ("scratch-disk", lambda: {0: report(**DISK), 1: report("node-b", codes={1: 2})}),
]


@pytest.mark.parametrize(("rule", "shared"), BEFORE_THE_TABLE)
def test_what_is_asked_before_the_table(rule: str, shared: Any) -> None:
    assert Judge(2, Path("run"), str).judge(shared())[0].rule == rule


def test_the_page_has_the_same_order() -> None:
    text = PAGE.read_text().partition("Before the table")[2].partition("<!-- table")[0]
    named = re.findall(r"^\d\. .*: `([a-z-]+)`", text, re.MULTILINE)
    assert named == ["folder-lost", "silent-node", "signal", "hang", "clean", "scratch-disk"]
    early = Judge(1, Path("run"), lambda: "there is no checkpoint")
    assert early.judge({0: report(code=0, trouble="full")})[0].rule == "clean"
    assert [row for rule, row in ((r, r) for r, _ in BEFORE_THE_TABLE) if rule in named] == [
        rule for rule in named if rule != "clean"
    ]


def test_in_a_job_of_several_machines_the_second_hang_of_one_is_its_fault(tmp_path: Path) -> None:
    for count, ends in ((1, [None, None, None]), (2, [None, 76])):
        made = made_in(tmp_path / str(count), count)
        others = {1: report("node-b")} if count > 1 else {}
        decisions = [made._decide(n, {0: hung(), **others}, made.logs) for n in range(1, len(ends) + 1)]
        assert [decision["exit"] for decision in decisions][:2] == ends[:2]
        bad = made.logs / "bad-nodes.txt"
        assert bad.exists() == (count > 1) and (count == 1 or bad.read_text() == "node-a\n")


def made_in(folder: Path, nnodes: int = 1) -> Supervisor:
    made = Supervisor(["hlat", "train", "x"], folder, Place(nnodes=nnodes), limits=Limits())
    made.timeline.start(0.0)
    return made


@pytest.mark.parametrize(
    ("stopped", "status"),
    [((15, None), 75), ((None, 2), 130), ((15, 2), 130), ((2, 10), 130), ((1, 15), 75)],
)
def test_a_person_who_interrupts_one_machine_ends_the_job(tmp_path: Path, stopped: Any, status: int) -> None:
    made = made_in(tmp_path, 2)
    shared = {n: report(codes={n: 143}, stopped=number) for n, number in enumerate(stopped)}
    assert made._decide(1, shared, made.logs)["exit"] == status


def test_a_job_whose_time_is_over_is_not_started_again(tmp_path: Path) -> None:
    """Also when not all of its ranks have saved in time."""
    made = made_in(tmp_path, 2)
    shared = {0: report(codes={0: -9}), 1: report(codes={1: 138})}
    assert made._decide(1, shared, made.logs) == {"exit": 75}


def test_a_mistake_in_recipe_or_data_leaves_no_folder(tmp_path: Path) -> None:
    wrong = report(codes={0: 2}, text="hlat: error: data.tokenizer: no tokenizer at 'x'")
    run = tmp_path / "runs" / "mine"

    def end(before: str = "") -> dict[str, Any]:
        made = made_in(run)
        (made.logs / "attempt-1").mkdir(parents=True, exist_ok=True)
        if before:
            (run / before).touch()
        made._one = lambda number: made._decide(number, {0: wrong}, made.logs)  # type: ignore[method-assign]
        assert made.run() == 2
        return {"left": run.exists(), "events": made.events.path.exists()}

    assert end() == {"left": False, "events": False} and not (tmp_path / "runs").exists()
    assert end("recipe.yaml") == {"left": True, "events": True}  # the rank has begun
    (run / "recipe.yaml").unlink()
    assert end() == {"left": True, "events": True}  # it was there before
    assert [row["event"] for row in read_rows(run / "logs/supervisor/events.jsonl")][-2:] == ["end", "finish"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def test_the_end_of_the_first_machine_is_one_line_and_queues_again() -> None:
    port = free_port()
    first, second = Machines(0, 2, "127.0.0.1", port, 5), Machines(1, 2, "127.0.0.1", port, 5)
    assert second.compiling(1, True) is False
    del first._server, first._store  # as with its process
    for ask in (
        lambda: second.ready(2, "node-b", ""),
        lambda: second.ended_elsewhere(1),
        lambda: second.share(1, {}),
        lambda: second.decide(1, dict),
    ):
        with pytest.raises(TeamLost, match="node 1: the supervisor of the first machine is gone") as caught:
            ask()
        assert caught.value.exit_code == 75 and "\n" not in caught.value.line()


def test_a_first_machine_that_decides_nothing_is_lost() -> None:
    port = free_port()
    made = [Machines(node, 2, "127.0.0.1", port, 0.2) for node in (0, 1)]
    with pytest.raises(TeamLost, match="node 1: the first machine does not say what comes next"):
        made[1].decide(1, dict)


@pytest.mark.parametrize(("number", "status"), [(1, 1), (2, 75)])
def test_a_machine_that_was_there_and_is_gone_queues_the_job_again(
    tmp_path: Path, capsys: Any, number: int, status: int
) -> None:
    made = made_in(tmp_path, 2)
    made.team.count = 2
    assert made._refuse_start(number) == status
    assert "not all machines came to start; missing: node 1" in capsys.readouterr().err


def test_an_agent_that_finds_no_store_says_so_in_one_line(capfd: Any) -> None:
    with pytest.raises(UserError, match=r"^127.0.0.1:\d+: node 1: no answer for \d+ s") as caught:
        BoundRendezvous("127.0.0.1", free_port(), 1, 2, "run", 1).next_rendezvous()
    assert "\n" not in caught.value.line() and capfd.readouterr() == ("", "")


def test_agents_meet_when_the_first_comes_late() -> None:
    port, met = free_port(), []

    def join() -> None:
        met.append(BoundRendezvous("127.0.0.1", port, 1, 2, "run", 20).next_rendezvous().world_size)

    thread = threading.Thread(target=join)
    thread.start()
    time.sleep(0.5)
    info = BoundRendezvous("127.0.0.1", port, 0, 2, "run", 20).next_rendezvous()
    thread.join(20)
    assert met == [2] and info.rank == 0


assert signal.SIGINT == 2 and signal.SIGHUP == 1  # the numbers above
