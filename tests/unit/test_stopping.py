"""Requests to stop: signals, the end of the job's time, and EC2's notices, from a server on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hlat.errors import UserError
from hlat.observe.failures import Terminated
from hlat.observe.spot import BASE, DISABLED, ENDPOINT, SpotWatch, base_url
from hlat.observe.stopping import (
    REBALANCE,
    SPOT,
    WALLTIME,
    Asked,
    Deadline,
    Signals,
    end_of_time,
    exit_status,
    name_of,
    text_of,
)

LIFE, ACTION = "/latest/meta-data/instance-life-cycle", "/latest/meta-data/spot/instance-action"
ADVICE = "/latest/meta-data/events/recommendations/rebalance"


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_before_there_is_a_state_a_signal_ends_the_process() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with Signals().watch():
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            with pytest.raises(Terminated) as caught:
                send(number)
            assert caught.value.number == number
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert signal.getsignal(signal.SIGUSR1) is before


def test_later_the_first_one_stands_and_no_second_one_interrupts() -> None:
    with Signals().watch() as signals:
        signals.hold()
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGUSR1):
            send(number)
        assert signals.received == signal.SIGUSR1
        with pytest.raises(Asked):
            signals.check()


def test_a_second_ctrl_c_interrupts() -> None:
    with Signals().watch() as signals:
        signals.hold()
        send(signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_advice_to_save_gives_way_to_a_stop_and_is_fulfilled_once() -> None:
    signals = Signals()
    signals.note(REBALANCE)
    signals.check()
    signals.note(SPOT)
    signals.done(REBALANCE)
    assert signals.received == SPOT
    again = Signals()
    again.note(REBALANCE)
    again.done(REBALANCE)
    assert again.received is None


def test_names_and_statuses() -> None:
    table = [
        (cause, name_of(cause), text_of(cause), exit_status(cause)) for cause in (10, 15, WALLTIME, SPOT)
    ]
    assert table == [
        (10, "SIGUSR1", "signal 10", 138),
        (15, "SIGTERM", "signal 15", 143),
        (WALLTIME, "the end of its time", "the end of its time", 138),
        (SPOT, "a spot interruption notice", "a spot interruption notice", 143),
    ]
    assert max(REBALANCE, signal.SIGTERM) == signal.SIGTERM < WALLTIME < SPOT


def test_the_deadline_leaves_room_for_the_next_steps_and_a_save() -> None:
    now = 1000.0
    deadline = Deadline(1100.0, save_seconds=30, clock=lambda: now)
    assert not Deadline(None, 1e9).due([True])
    assert not deadline.due([False, False])
    for seconds in (4.0, 10.0, 6.0):
        deadline.step(seconds, False)
    deadline.step(40.0, True)
    # 1.2 * (10 + 30) + 5 = 53 seconds with a plain step, 1.2 * (40 + 30) + 5 = 89 with an evaluation.
    now = 1046.9
    assert not deadline.due([False]) and deadline.due([False, False])
    assert deadline.due([True])
    now = 1047.0
    assert deadline.due([False])
    deadline.save(5)
    assert not deadline.due([False])


def test_when_the_time_ends() -> None:
    assert end_of_time({}, None, 1000.0) is None
    assert end_of_time({}, 0.5, 1000.0) == 2800.0
    assert end_of_time({"SLURM_JOB_END_TIME": "2000"}, 0.5, 1000.0) == 2000.0
    assert end_of_time({"SLURM_JOB_END_TIME": "9000"}, 0.5, 1000.0) == 2800.0
    for nonsense in ("", "soon", "0", "999"):
        assert end_of_time({"SLURM_JOB_END_TIME": nonsense}, None, 1000.0) is None


class Metadata:
    """An instance's metadata service, version 2: without a valid token it answers 401."""

    def __init__(self) -> None:
        self.answers: dict[str, str] = {LIFE: "spot"}
        self.asked: list[str] = []
        self.token, self.broken = "first", False
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                ok = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
                self.reply(200 if ok else 400, service.token)

            def do_GET(self) -> None:
                service.asked.append(self.path)
                if service.broken:
                    self.reply(503, "")
                elif self.headers["X-aws-ec2-metadata-token"] != service.token:
                    self.reply(401, "")
                elif self.path in service.answers:
                    self.reply(200, service.answers[self.path])
                else:
                    self.reply(404, "")

            def reply(self, status: int, text: str) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def service() -> Iterator[Metadata]:
    made = Metadata()
    yield made
    made.server.shutdown()
    made.server.server_close()


def until(true: object, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.01)


def test_each_notice_is_told_once(service: Metadata) -> None:
    told: list[int] = []
    SpotWatch(service.url, told.append, interval=0.01).start()
    until(lambda: service.asked.count(ACTION) > 2)
    assert told == []
    service.answers[ADVICE] = '{"noticeTime": "2026-01-01T00:00:00Z"}'
    until(lambda: told == [REBALANCE])
    service.token = "second"  # the first one has expired
    service.broken = True
    time.sleep(0.05)
    service.broken = False
    service.answers[ACTION] = '{"action": "terminate", "time": "2026-01-01T00:02:00Z"}'
    until(lambda: told == [REBALANCE, SPOT])
    count = len(service.asked)
    time.sleep(0.05)
    assert len(service.asked) == count, "after the interruption notice nothing more is asked"


def test_an_instance_that_is_no_spot_instance_is_left_alone(service: Metadata) -> None:
    service.answers = {LIFE: "on-demand", ACTION: "{}"}
    told: list[int] = []
    SpotWatch(service.url, told.append, interval=0.01).start()
    until(lambda: service.asked == [LIFE])
    time.sleep(0.05)
    assert service.asked == [LIFE] and told == []
    SpotWatch(service.url, told.append, always=True, interval=0.01).start()
    until(lambda: told == [SPOT])


def test_where_to_ask(tmp_path: Path) -> None:
    vendor = tmp_path / "sys_vendor"
    assert base_url({}, "auto", vendor) is None
    vendor.write_text("Amazon EC2\n")
    assert base_url({}, "auto", vendor) == BASE and base_url({}, False, vendor) is None
    assert base_url({DISABLED: "true"}, True, vendor) is None
    vendor.write_text("LENOVO\n")
    assert base_url({}, "auto", vendor) is None and base_url({}, True, vendor) == BASE
    assert base_url({ENDPOINT: "http://[fd00:ec2::254]/"}, "auto", vendor) == "http://[fd00:ec2::254]"
    with pytest.raises(UserError, match="is not a URL"):
        base_url({ENDPOINT: "file:///etc"}, "auto", vendor)


def test_under_nohup_a_hangup_stays_ignored() -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals().watch() as signals:
            signals.hold()
            send(signal.SIGHUP)
            assert signals.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def test_a_terminal_that_is_gone_costs_no_save() -> None:
    """A process whose terminal is closed goes on printing, into nothing, and ends as it wants."""
    main, terminal = os.openpty()
    script = (
        "import signal, sys, time\n"
        "from hlat.observe.stopping import Signals, exit_status\n"
        "with Signals().watch() as signals:\n"
        "    signals.hold()\n"
        "    print('ready', flush=True)\n"
        "    while signals.received is None: time.sleep(0.01)\n"
        "    print('saving', flush=True)\n"
        "sys.exit(exit_status(signals.received))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=terminal, stderr=terminal)
    os.close(terminal)
    assert os.read(main, 5) == b"ready"
    os.close(main)  # from now on what it prints there fails
    child.send_signal(signal.SIGHUP)
    assert child.wait(60) == 128 + signal.SIGHUP
