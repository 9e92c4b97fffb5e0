"""The failure table: every row by a message from documentation or a bug report, precedence, and any input."""

from __future__ import annotations

import importlib.util
import itertools
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hlat.supervise import kernel
from hlat.supervise.classify import _ECHO, Evidence, classify, kernel_lines
from hlat.supervise.failure_table import BENIGN, TABLE
from hlat.supervise.patterns import GAP, Patterns, compiled

TRACE = 'Traceback (most recent call last):\n  File "/opt/hlat/train/loop.py", line 7, in step\n    go()\n'
ECC = "NVRM: Xid (PCI:0000:3b:00): 48, pid=4711, name=python, DBE (double bit error) detected"
FILE = Path(__file__).with_name("failure_messages.txt")


def read_messages() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in FILE.read_text().splitlines():
        if line.startswith("[") and line.endswith("]") and " " not in line:
            messages = found.setdefault(line[1:-1], [])
        elif line and not line.startswith("#"):
            messages.append(line)
    return found


MESSAGES = read_messages()
BENIGN_LINES = MESSAGES.pop("benign")
STATUSES = {
    "signal": [{0: 143, 1: 143}, {0: 138, 1: 0}, {0: 130}, {0: 143, 1: -15}],
    "recipe": [{0: 2, 1: 2}, {0: 2, 1: -15}],
    "guard": [{0: 3, 1: 3}],
    "store": [{0: 74, 1: 74}],
    "crash": [{0: 1, 1: -11}],
    "bus-error": [{0: 1, 1: -7}],
    "killed": [{0: 1, 1: -9}, {1: 137}],
    "aborted": [{1: -6}],
    "clean": [{0: 0, 1: 0}],
    "folder-lost": [{0: 77, 1: 77}, {0: 77, 1: -9}, {0: 143, 1: 77}],
    "unknown": [{0: 1}, {}, {0: 99}],
}
WITHOUT_MESSAGES = {"exception", "hang"}


def evidence(message: str, codes: dict[int, int] | None = None) -> Evidence:
    kernel_line, found = message.removeprefix("kernel: "), message.startswith("kernel: ")
    return Evidence(codes or {}, "" if found else f"before\n{message}\nafter\n", kernel_line if found else "")


@pytest.mark.parametrize(("rule", "message"), [(r, m) for r, ms in MESSAGES.items() for m in ms])
def test_every_row_has_a_real_message(rule: str, message: str) -> None:
    verdict = classify(evidence(message))
    row = next(row for row in TABLE if row.name == rule)
    assert (verdict.rule, verdict.kind, verdict.action) == (rule, row.kind, row.action)
    assert " ".join(message.removeprefix("kernel: ").split())[:60] in verdict.reason
    traceback = f"[rank3]: {TRACE.rstrip()}".replace("\n", "\n[rank3]: ")
    if re.match(r"[\w.]+(?:Error|Exception): ", message):  # raised in Python, it is still not a defect
        assert classify(Evidence({3: 1, 0: 1}, f"{traceback}\n[rank3]: {message}")).rule == rule


NUMBERED = [  # the runtime's numbers, as the page names them
    (row.name, int(number))
    for row in TABLE
    if (numbers := re.match(r"NRT ([\d, ]+):", row.meaning))
    for number in numbers[1].split(", ")
]


@pytest.mark.parametrize("form", ["RuntimeError: nrt_execute status=%d", "Inference completed with err: %d"])
@pytest.mark.parametrize(("rule", "number"), NUMBERED)
def test_every_number_of_the_runtime(rule: str, number: int, form: str) -> None:
    assert classify(evidence(form % number)).rule == rule
    assert classify(evidence(form % (10 * number + 7))).rule != rule


def test_every_expression_of_the_table_has_a_message() -> None:
    """What documentation or a bug report shows: an expression that no line matches would not be missed."""
    numbered = {name: tuple(nrt_line(number) for n, number in NUMBERED if n == name) for name, _ in NUMBERED}
    bare = [
        (row.name, pattern)
        for row in TABLE
        for pattern in row.patterns
        if not any(
            compiled((pattern,)).search(line)
            for line in (*MESSAGES[row.name], *itertools.chain(*numbered.get(row.name, ())))
        )
    ]
    assert bare == []


def nrt_line(number: int) -> tuple[str, str]:
    return f"nrt_execute status={number}", f"completed with err: {number}"


@pytest.mark.parametrize(("rule", "codes"), [(r, c) for r, many in STATUSES.items() for c in many])
def test_every_row_of_statuses(rule: str, codes: dict[int, int]) -> None:
    assert classify(Evidence(codes)).rule == rule


def test_the_table_is_covered_and_its_names_are_unique() -> None:
    names = [row.name for row in TABLE]
    assert len(set(names)) == len(names)
    assert set(names) == set(MESSAGES) | set(STATUSES) | WITHOUT_MESSAGES
    for row in TABLE:
        assert row.meaning and (row.source or row.name == "unknown")
        assert bool(row.patterns) == (row.where in ("kernel", "text", "both") and row.name != "exception")
        assert bool(row.codes) == (row.where == "status")


@pytest.mark.parametrize("line", BENIGN_LINES)
def test_benign_lines_match_nothing(line: str) -> None:
    assert classify(Evidence(text=line, kernel=line)).rule == "unknown"
    assert classify(Evidence({0: 1, 1: -9}, line, line)).rule == "killed"


def test_every_benign_row_is_needed() -> None:
    assert len(BENIGN) == 4 and all(re.compile(pattern) and why for pattern, why in BENIGN)


GONE = "hlat: rank 0 stopped because rank 1 (node-b, pid 7) is gone: last sign 1.2 s ago in step 3 (training)"
RESET = "[W socket.cpp:464] [c10d] recvValue failed on SocketImpl(fd=3): Connection reset by peer"
DEFECT = f"hlat: rank 1 (node-b) failed:\n{TRACE}ValueError: boom"


@pytest.mark.parametrize(
    ("rule", "rank", "given_"),
    [
        ("xid-hardware", None, Evidence({0: 2}, DEFECT, ECC)),  # hardware before the recipe and a defect
        ("xid-hardware", None, Evidence({0: 143, 1: 143}, "", ECC)),  # even when the state was saved
        ("nrt-hbm", None, Evidence({0: 1, 1: 1}, f"{RESET}\nRuntimeError: nrt_execute status=1201", "")),
        ("recipe", 0, Evidence({0: 2, 1: 1}, RESET)),
        ("exception", 1, Evidence({0: 1, 1: 1}, f"{RESET}\n{DEFECT}")),  # the defect before its echo
        ("gone", 1, Evidence({0: 1, 1: -9}, f"{GONE}\n{RESET}")),
        ("host-memory-full", 1, Evidence({0: 1, 1: -9}, GONE, "Out of memory: Killed process 7 (python)")),
        ("killed", 1, Evidence({0: 1, 1: -9, 2: -15}, RESET)),  # the cause before its echo
        ("hang", 2, Evidence({0: -15, 1: -15, 2: -9}, RESET, hang=True)),
        ("hang", None, Evidence({}, "Timeout waiting for RX (waited 120 sec) - retrying", hang=True)),
        ("connection", None, Evidence({0: 1, 1: 1}, f"[rank0]: {RESET}")),  # who noticed is not to blame
        ("disk-full", 1, Evidence({0: -15, 1: 1}, f"{TRACE}OSError: [Errno 28] No space left on device")),
        ("neuron-setup", None, Evidence({0: 1, 1: 1}, "OFI plugin initNet() failed is EFA enabled?")),
        ("exception", 1, Evidence({1: 1}, f"OFI plugin initNet() failed is EFA enabled?\n{DEFECT}")),
        ("replica-differs", 2, Evidence({0: 3}, MESSAGES["replica-differs"][0])),
        ("late-start", None, Evidence({0: 2, 1: 2}, MESSAGES["late-start"][0].replace("ranks 1, 3", "some"))),
        ("aborted", 1, Evidence({0: 0, 1: -6}, "terminate called after throwing an instance of 'int'")),
    ],
)
def test_precedence(rule: str, rank: int | None, given_: Evidence) -> None:
    verdict = classify(given_)
    assert (verdict.rule, verdict.rank) == (rule, rank), verdict.reason
    if rank is not None:
        assert f"rank {rank}" in verdict.reason


@pytest.mark.parametrize("rule", [row.name for row in TABLE if row.name in _ECHO and row.patterns])
def test_no_rank_is_named_for_an_echo_in_its_output(rule: str) -> None:
    verdict = classify(Evidence({0: 1, 1: 1}, f"[rank1]: rank 1 {MESSAGES[rule][0]}"))
    assert (verdict.rule, verdict.rank) == (rule, None)


def test_the_line_of_a_wrong_recipe_is_in_the_reason() -> None:
    line = "hlat: error: tiny.yaml: optim.lr_rate: unknown key; did you mean 'lr'?"
    verdict = classify(Evidence({0: 2, 1: 2}, f"{line}\n"))
    assert (verdict.kind, verdict.action, verdict.rank) == ("recipe", "stop", None)
    assert line in verdict.reason and "ranks 0, 1" in verdict.reason


def test_a_chain_of_exceptions_counts_once_and_the_launcher_never() -> None:
    chain = f"{TRACE}KeyError: 'a'\n\nDuring handling of the above exception, another exception occurred:\n\n"
    lost = f"{chain}{TRACE}RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:1"
    assert classify(Evidence({0: 1, 1: 1}, lost)).rule == "connection"
    launcher = f"{TRACE}torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    assert classify(Evidence({0: 1}, launcher)).rule == "unknown"
    assert classify(Evidence({0: -9}, DEFECT)).rule == "killed"  # a traceback that ended nobody


def test_a_reason_has_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted-secret-value")
    text = f"{TRACE}ValueError: https://me:pass-word@host/x refuses planted-secret-value"
    reason = classify(Evidence({0: 1}, text)).reason
    assert "planted" not in reason and "pass-word" not in reason and "https://host/x" in reason


pieces = st.sampled_from(
    [m for ms in MESSAGES.values() for m in ms] + [TRACE, "ValueError: x", "\x00\x1b[31m"]
)
texts = st.lists(st.one_of(pieces, st.text(max_size=80)), max_size=6).map("\n".join)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.integers(-3, 9), st.integers(-70, 300), max_size=5),
    texts,
    texts,
    st.booleans(),
)
def test_any_evidence_gives_one_line(codes: dict[int, int], text: str, log: str, hang: bool) -> None:
    verdict = classify(Evidence(codes, text, log, hang))
    assert verdict.reason and len(verdict.reason.splitlines()) == 1 and len(verdict.reason) <= 400
    assert verdict.reason.isprintable()
    assert verdict.rule in {row.name for row in TABLE}
    assert verdict.rank is None or verdict.rank in codes or str(verdict.rank) in text


def test_a_very_long_log_takes_no_time() -> None:
    text = ("nrt status " * 3000 + "\n") * 200 + "x" * 3_000_000
    started = time.monotonic()
    classify(Evidence({0: 1}, text, text))
    assert time.monotonic() - started < 5


def test_kernel_lines_are_those_since_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.clock_gettime(time.CLOCK_MONOTONIC_RAW)
    records = [
        f"6,1,{int((now - 100) * 1e6)},-;old".encode(),
        BrokenPipeError(),
        f"3,2,{int(now * 1e6)},-;NVRM: Xid (PCI:0000:3b:00): 79, pid=1; name=x\n SUBSYSTEM=pci\n".encode(),
        BlockingIOError(),
    ]

    def read(handle: int, size: int) -> bytes:
        record = records.pop(0)
        if isinstance(record, Exception):
            raise record
        return record

    monkeypatch.setattr(kernel.os, "open", lambda path, flags: 99)
    monkeypatch.setattr(kernel.os, "read", read)
    monkeypatch.setattr(kernel.os, "close", lambda handle: None)
    assert kernel_lines(time.time() - 50) == "NVRM: Xid (PCI:0000:3b:00): 79, pid=1; name=x"


def test_kernel_lines_fall_back_to_dmesg_and_to_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError

    now = time.clock_gettime(time.CLOCK_MONOTONIC_RAW)
    monkeypatch.setattr(kernel.os, "open", refuse)
    script = tmp_path / "dmesg"
    script.write_text(f"#!/bin/sh\necho '[    1.500000] old'\necho '[{now:12.6f}] new line'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert kernel_lines(time.time() - 50) == "new line"
    script.write_text(
        "#!/bin/sh\necho 'dmesg: read kernel buffer failed: Operation not permitted' >&2\nexit 1\n"
    )
    assert kernel_lines(time.time() - 50) == ""
    script.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert kernel_lines(time.time() - 50) == ""


def test_kernel_lines_on_this_machine() -> None:
    assert isinstance(kernel_lines(0.0), str)
    assert kernel_lines(time.time() + 1000) == ""


def test_the_page_is_current() -> None:
    path = Path(__file__).resolve().parents[2] / "docs" / "failure_reference.py"
    spec = importlib.util.spec_from_file_location("failure_reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.PAGE.read_text(encoding="utf-8")
    assert module.page(page) == page, "run: python docs/failure_reference.py"


def test_the_work_grows_with_the_length_of_a_line_and_no_faster() -> None:
    """However the lines look: in one expression, a gap is looked through from every beginning."""
    words = ("nrt ", "nrt:", "nrt status ", "NVRM: Xid (", "rank 1 (", "a", "gloo ", "hlat: error: ",
             "status    ", "inference timeout (30000 ms) ", "after step 1 ", "stopped because ")  # fmt: skip
    long, began = 1 << 14, time.process_time()
    for word in words:
        line = (word * long)[:long]
        assert not any(compiled(row.patterns).search(line) for row in TABLE if row.patterns and word != "a")
        classify(Evidence({0: 1}, line))
        assert time.process_time() - began < 30, word
    for row in TABLE:
        for pattern in row.patterns:
            for part in pattern.split(GAP):
                assert not re.search(r"(?<!\\)\.[*+]|\[\^[^]]*\][*+]", part), f"{row.name}: a gap in a part"


@pytest.mark.parametrize(
    ("line", "found"),
    [("a1 b", True), ("b a1", False), ("a b a b", True), ("B ... A1 ... B", True), ("x", False), ("c", True)],
)
def test_patterns_with_a_gap(line: str, found: bool) -> None:
    made = Patterns((rf"a\d?{GAP}b", "c"))
    assert made.search(line) is found is bool(re.search(r"a\d?.*b|c", line, re.IGNORECASE))
