"""Joining a job, comparing its ranks, and finding out which of them failed, in one process."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import hlat
from hlat.backend.cluster import Cluster, Member, join
from hlat.backend.rendezvous import Address, read_address
from hlat.errors import TrainingStopped, UserError
from hlat.observe.failures import Board, Ending, PeerFailed, Record, Terminated, is_echo
from hlat.observe.watchdog import Sign, Watchdog, who_is_late
from hlat.train import same
from hlat.train.replicas import checksum, verify
from hlat.train.same import code_hash, refuse_differences

GOOD = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node-a", "MASTER_PORT": "29500"}
NAMES = [f"rank {rank} (node-{'aabb'[rank]})" for rank in range(4)]


@pytest.fixture
def port() -> Iterator[int]:
    """A port that is taken as long as the test runs."""
    with socket.create_server(("", 0)) as taken:
        yield taken.getsockname()[1]


@pytest.fixture
def store() -> dist.Store:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=5))
    return store


def test_the_environment_of_a_launcher() -> None:
    assert read_address({}) is None
    assert read_address({"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert read_address({"WORLD_SIZE": "1"}) is None, "any task of a step, as the user wants it"
    assert read_address(GOOD) == Address(1, 4, 1, "node-a", 29500, False, "0")
    first = read_address({**GOOD, "RANK": "0"})
    under_torchrun = read_address({**GOOD, "RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert first is not None and first.serves
    assert under_torchrun is not None and not under_torchrun.serves


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"WORLD_SIZE": ""}, "RANK is set and WORLD_SIZE is not"),
        ({"RANK": "4"}, "RANK 4 is not below WORLD_SIZE 4"),
        ({"RANK": "one"}, "RANK is 'one', not a number"),
        ({"RANK": ""}, "RANK is not set"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is '0'"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is not set"),
    ],
)
def test_an_environment_that_makes_no_sense(change: dict[str, str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        read_address({**GOOD, **change})
    assert words in caught.value.line() and caught.value.fix


def test_one_process_is_a_job_too() -> None:
    cluster = join(environ={})
    assert (cluster.rank, cluster.world, len(cluster.members)) == (0, 1, 1)
    assert cluster.gather("x", 5, 1) == [5] and cluster.from_first("y", 6, 1) == 6
    assert cluster.in_turn("z", lambda: 7, 1) == 7 and cluster.exchange(8) == [8]
    assert cluster.me.exists() is True
    cluster.connect(1)
    cluster.shorten_timeouts(1)
    cluster.leave(1)


def test_a_port_that_is_taken(port: int) -> None:
    environ = {**GOOD, "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with pytest.raises(UserError, match="cannot listen.*choose another MASTER_PORT"):
        join(1, environ)


def test_nobody_answers(port: int) -> None:
    free = port + 1 if port < 65535 else port - 1
    started = time.monotonic()
    with pytest.raises(UserError, match=r"rank 1: no answer for \d s.*is rank 0 started"):
        join(1, {**GOOD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free)})
    assert time.monotonic() - started < 10


def free_port() -> str:
    with socket.create_server(("", 0)) as probe:
        return str(probe.getsockname()[1])


def test_processes_that_do_not_come_are_named() -> None:
    environ = {**GOOD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    errors = {}

    def one(rank: str) -> None:
        try:
            join(3, {**environ, "RANK": rank})
        except UserError as error:
            errors[rank] = error.line()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in "02"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(errors) == ["0", "2"]
    assert all("ranks 1, 3 of 4 did not come in time" in line for line in errors.values()), errors


def test_three_processes_speak_through_the_store() -> None:
    """Threads stand for processes here: the store does not care."""
    environ = {**GOOD, "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    found: dict[int, list[object]] = {}
    order: list[int] = []

    def one(rank: int) -> None:
        cluster = Cluster(read_address({**environ, "RANK": str(rank), "LOCAL_RANK": ""}), 20)
        answers = [cluster.gather("squares", rank * rank, 20), cluster.from_first("word", f"of {rank}", 20)]
        cluster.in_turn("turn", lambda: order.append(rank), 20)
        found[rank] = [*answers, cluster.local_rank, cluster.local_world]
        cluster.leave(20)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {rank: [[0, 1, 4], "of 0", rank, 3] for rank in range(3)}
    assert order[0] == 0 and sorted(order) == [0, 1, 2]


def test_a_rank_that_does_not_see_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 0 and 1 share a folder, rank 2 has one of its own under the same name."""

    class Two:
        world, rank = 3, 0
        members = tuple(NAMES)

        def __init__(self, seen: list[bool]) -> None:
            self.seen = seen

        def from_first(self, name: str, value: str, seconds: float) -> str:
            return value

        def gather(self, name: str, value: bool, seconds: float) -> list[bool]:
            return [value, *self.seen]

    monkeypatch.setattr(same, "SHARED_SECONDS", 0.3)
    (tmp_path / ".lock").write_text("rank 0's")
    same.check_shared(Two([True, True]), tmp_path, 1.0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"rank 2 \(node-b\) does not see the run folder that rank 0 writes"):
        same.check_shared(Two([True, False]), tmp_path, 1.0)  # type: ignore[arg-type]
    elsewhere = Two([True, True])
    monkeypatch.setattr(elsewhere, "from_first", lambda *args: "another run's")
    with pytest.raises(UserError, match="put run.dir on a file system that all nodes share"):
        same.check_shared(elsewhere, tmp_path, 1.0)  # type: ignore[arg-type]


def test_whether_a_process_exists() -> None:
    me = join(environ={}).me
    assert Member(1, me.host, me.pid, "0" + me.born, me.space).exists() is False, "the number was reused"
    assert Member(1, "elsewhere", me.pid, me.born, me.space).exists() is None
    child = os.fork()
    if child == 0:
        os._exit(0)
    while Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)
    try:
        assert Member(1, me.host, child, "", me.space).exists() is False, "dead, though nobody fetched it yet"
    finally:
        os.waitpid(child, 0)


def test_code_is_compared_byte_by_byte(tmp_path: Path) -> None:
    copy = tmp_path / "hlat"
    shutil.copytree(Path(hlat.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert code_hash(copy) == code_hash()
    with open(copy / "model" / "norm.py", "a") as file:
        file.write("# one more comment\n")
    assert code_hash(copy) != code_hash()


@pytest.mark.parametrize(
    ("key", "values", "line"),
    [
        ("code", "aaba", "rank 2 (node-b) runs other HLAT code than rank 0: sha256 b… instead of a…"),
        ("code", "baaa", "rank 0 (node-a) runs other HLAT code than rank 1"),
        ("code", "aabb", "rank 2 (node-b), rank 3 (node-b) runs other HLAT code than rank 0"),
        ("torch", "aaba", "rank 2 (node-b): runs torch b, but rank 0 a"),
        ("data", "abaa", "rank 1 (node-a) reads other data than rank 0"),
    ],
)
def test_ranks_that_differ_are_named(key: str, values: str, line: str) -> None:
    refuse_differences([{key: "a"}] * 4, NAMES)
    with pytest.raises(UserError) as caught:
        refuse_differences([{key: value} for value in values], NAMES)
    assert line in caught.value.line()


def test_which_errors_are_only_echoes() -> None:
    gloo = "[/pytorch/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5523"
    for echo in (RuntimeError(gloo), dist.DistNetworkError("x"), Terminated(), PeerFailed()):
        assert is_echo(echo), echo
    for cause in (RuntimeError("shape '[2, 3]' is invalid"), ValueError("gloo"), UserError("gloo")):
        assert not is_echo(cause), cause


def test_failures_are_read_in_order(store: dist.Store) -> None:
    one, two = Board(store, 1, NAMES), Board(store, 2, NAMES)
    assert one.cause() is None and not one.has_ended(2)
    two.post(Record("error", 2, "ValueError: x"))
    one.post(Record("error", 1, "RuntimeError: y"))
    assert [r.rank for r in one.read()] == [2, 1] == [r.rank for r in two.read()]
    assert one.cause() == Record("error", 2, "ValueError: x") and one.has_ended(2)
    assert two.cause() is not None and two.cause().rank == 1


def test_a_failure_that_is_still_being_written_hides_no_other(store: dist.Store, capsys) -> None:
    """Rank 3 has taken its number and not written yet; the mistake of rank 0 comes after it."""
    late = Board(store, 3, NAMES)
    number = late.store.add("failures/count", 1)
    Board(store, 0, NAMES).post(Record("user", 0, "error: x: bad", 2))
    board = Board(store, 1, NAMES)
    writing = threading.Timer(
        0.5, store.set, (f"failures/{number}", '{"kind": "error", "rank": 3, "text": ""}')
    )
    writing.start()
    ending = Ending(board, Watchdog(), serves_store=False)
    assert ending._report(UserError("bad", where="x")) == 2
    writing.join()
    assert capsys.readouterr().err == "", "rank 0 has said it already"


def members(world: int = 4) -> list[Member]:
    return [Member(rank, f"node-{'aabb'[rank]}", 100 + rank, "", "") for rank in range(world)]


def signs(**changes: dict[str, object]) -> dict[int, Sign]:
    usual = {"number": 9, "stamp": time.time(), "step": 17, "phase": "training", "since": 9.0}
    usual |= {"where": "train/run.py:agree", "waiting": True}
    return {rank: Sign(**{**usual, **changes.get(f"r{rank}", {})}) for rank in range(4)}


def test_who_holds_up_the_others() -> None:
    before = signs(**{f"r{rank}": {"number": 8} for rank in range(4)})
    rank, text = who_is_late(members(), before, signs() | {2: before[2]})
    assert rank == 2 and "rank 2 (node-b, pid 102) is late: no sign of life, last sign" in text
    rank, text = who_is_late(members(), before, signs(r1={"step": 16}))
    assert rank == 1 and "in step 16 (training)" in text and "the others in step 17" in text
    rank, text = who_is_late(members(), before, signs(r3={"waiting": False, "where": "data/loader.py:ids"}))
    assert rank == 3 and "at data/loader.py:ids, the others wait" in text
    other = {"waiting": False, "where": "train/run.py:update"}
    everywhere = {f"r{rank}": {"waiting": False} for rank in range(4)}
    rank, text = who_is_late(members(), before, signs(**{**everywhere, "r0": other}))
    assert rank == 0 and "at train/run.py:update, others in step 17" in text
    assert who_is_late(members(), before, signs())[1].startswith("all ranks wait in step 17: training")


def test_a_process_alone_keeps_to_its_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.get_num_threads()
    try:
        for usable, expected in ((64, 3), (2, 2)):  # never more threads than torch would take
            torch.set_num_threads(3)
            monkeypatch.setattr("hlat.backend.cluster.cores", lambda: usable)  # noqa: B023
            assert join(environ={}).choose_device() == "cpu" and torch.get_num_threads() == expected
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        torch.set_num_threads(3)
        assert join(environ={}).choose_device() == "cpu" and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_held_up_main_thread_is_reported_with_stacks(
    store: dist.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hlat.observe.watchdog.SILENT", 0.2)
    monkeypatch.setattr("hlat.observe.watchdog.INTERVAL", 0.1)
    watchdog = Watchdog(0, [join(environ={}).me], 0.5, tmp_path / "logs")
    board = Board(store, 0, NAMES)
    ended = threading.Event()
    watchdog._exit = lambda *reason: ended.set()  # type: ignore[method-assign]
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "stacks-rank-00000.txt").write_text("of an earlier job\n")
    watchdog.beat(5, "evaluation")
    threads = [threading.Thread(target=ended.wait, args=(30,)) for _ in range(110)]  # faulthandler shows 100
    for thread in threads:
        thread.start()
    watchdog.start(board, "this test")
    assert ended.wait(30)
    watchdog.stop()
    for thread in threads:
        thread.join()
    cause = board.cause()
    assert cause is not None and cause.kind == "late" and "step 5" in cause.text
    stacks = (tmp_path / "logs" / "stacks-rank-00000.txt").read_text()
    assert stacks.startswith("of an earlier job\n")
    assert "step 5 (evaluation)" in stacks and "test_a_held_up_main_thread" in stacks
    assert json.loads(store.get("sign/0"))[2:4] == [5, "evaluation"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checksum_sees_a_bit_and_a_swap(dtype: torch.dtype) -> None:
    flat = torch.randn(5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    usual = checksum(flat).tolist()
    assert checksum(flat.clone()).tolist() == usual
    bits = {2: torch.int16, 4: torch.int32}[flat.element_size()]
    for place in (0, 1023, 1024, 4999):
        changed = flat.clone()
        changed.view(bits)[place] ^= 1
        assert checksum(changed).tolist() != usual
    for a, b in ((0, 1), (7, 1031)):
        swapped = flat.clone()
        swapped[a], swapped[b] = flat[b], flat[a]
        assert checksum(swapped).tolist() != usual


def test_the_minority_of_replicas_is_named(tiny_run) -> None:
    run = tiny_run()
    right = [bucket.weights.clone() for bucket in run.buckets]

    def gather(damaged: set[int], world: int = 4):
        def all_ranks(table):
            first, changed = next(iter(table)), dict(table)
            changed[first] = [table[first][0] + 1, *table[first][1:]]
            return [changed if rank in damaged else table for rank in range(world)]

        return all_ranks

    verify(run, NAMES, gather(set()))
    with pytest.raises(TrainingStopped, match=r"rank 2 \(node-b\) holds other weights than ranks 0, 1, 3 in"):
        verify(run, NAMES, gather({2}))
    with pytest.raises(TrainingStopped, match=r"rank 0 \(node-a\) and rank 1 \(node-a\) hold different"):
        verify(run, NAMES, gather({1}, world=2))
    assert all(torch.equal(a, b.weights) for a, b in zip(right, run.buckets, strict=True))
