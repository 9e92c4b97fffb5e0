"""Metric rows: one fetch a window, one exact row a step, a file that survives a crash at any byte."""

from __future__ import annotations

import errno
import json
import math
import os
import struct
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hlat.errors import SaveFailed, UserError
from hlat.observe import jsonl, metrics, sinks
from hlat.observe.jsonl import MetricsFile, encode, read_rows, truncate_after
from hlat.observe.metrics import MetricBuffer
from hlat.registry import register


def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


class Memory:
    def __init__(self):
        self.rows, self.closed = [], False

    def row(self, row):
        self.rows.append(row)

    def close(self):
        self.closed = True


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def counting_fetch(calls):
    def fetch(tensors):
        calls.append(len(tensors))
        return metrics.fetch(tensors)

    return fetch


def test_one_fetch_a_window_and_one_row_a_step():
    sink, calls = Memory(), []
    buffer = MetricBuffer([sink], every=4, fetch=counting_fetch(calls))
    for step in range(1, 11):
        rows = buffer.add(step, {"loss": torch.tensor(1.0 / step), "grad_norm": torch.tensor(2.0)})
        assert len(rows) == (4 if step % 4 == 0 else 0)
    assert len(calls) == 2
    buffer.close()
    assert len(calls) == 3
    assert [row["step"] for row in sink.rows] == list(range(1, 11))
    assert sink.closed


def test_row_is_exact():
    sink, clock = Memory(), Clock()
    buffer = MetricBuffer([sink], tokens_per_step=4096, flops_per_token=1e6, peak_flops=1e12, clock=clock)
    clock.now += 0.5
    loss = torch.tensor(2.3, dtype=torch.float32)
    device = {
        "loss": loss,
        "grad_norm": torch.tensor(0.75, dtype=torch.bfloat16),
        "targets": torch.tensor(2**40 + 1),
    }
    buffer.add(3, {**device, "skipped": torch.tensor(True)}, {"lr": 3e-4, "reduce/bytes": 17})
    assert sink.rows == [
        {
            "kind": "train",
            "step": 3,
            "loss": 2.299999952316284,  # the float32 nearest to 2.3, every digit
            "grad_norm": 0.75,
            "lr": 3e-4,
            "tokens": 3 * 4096,
            "tokens_per_second": 8192.0,
            "mfu": 8192.0 * 1e6 / 1e12,
            "step_seconds": 0.5,
            "skipped": True,
            "targets": 2**40 + 1,
            "reduce/bytes": 17,
        }
    ]
    assert isinstance(sink.rows[0]["skipped"], bool)
    assert isinstance(sink.rows[0]["targets"], int)


def test_missing_values_and_non_finite_are_null():
    sink = Memory()
    MetricBuffer([sink]).add(1, {"loss": torch.tensor(math.nan), "extra": torch.tensor(-math.inf)})
    (row,) = sink.rows
    assert row["loss"] is row["extra"] is row["grad_norm"] is row["lr"] is row["mfu"] is None
    assert json.loads(encode({"a": {"b": [math.inf, 1.5]}})) == {"a": {"b": [None, 1.5]}}


def test_values_are_copied_when_added():
    sink = Memory()
    buffer = MetricBuffer([sink], every=2)
    loss = torch.tensor(1.0)
    buffer.add(1, {"loss": loss})
    loss.fill_(5.0)
    buffer.add(2, {"loss": loss})
    assert [row["loss"] for row in sink.rows] == [1.0, 5.0]


def test_windows_may_hold_different_fields():
    sink = Memory()
    buffer = MetricBuffer([sink], every=3)
    buffer.add(1, {"loss": torch.tensor(1.0)})
    buffer.add(2, {"b": torch.tensor(3), "loss": torch.tensor(2.0)})
    buffer.add(3, {"loss": 3.0})
    assert [row["loss"] for row in sink.rows] == [1.0, 2.0, 3.0]
    assert sink.rows[1]["b"] == 3
    assert "b" not in sink.rows[2]


def test_step_seconds_on_the_cpu_are_each_steps_own_and_leave_pauses_out():
    sink, clock = Memory(), Clock()
    buffer = MetricBuffer([sink], every=3, clock=clock)
    for step, seconds in enumerate((1.0, 2.0, 4.0), 1):
        clock.now += seconds
        buffer.add(step, {"loss": torch.tensor(0.0)})
    with buffer.paused():
        clock.now += 50.0
    clock.now += 8.0
    buffer.add(4, {"loss": torch.tensor(0.0)})
    buffer.flush()
    assert [row["step_seconds"] for row in sink.rows] == [1.0, 2.0, 4.0, 8.0]


def test_step_seconds_on_an_accelerator_are_the_windows_mean():
    sink, clock = Memory(), Clock()

    def fetch(tensors):
        clock.now += 3.0  # the host waits here for the queued steps
        return [7.0] * sum(tensor.numel() for tensor in tensors)

    buffer = MetricBuffer([sink], every=2, clock=clock, fetch=fetch)
    for step in (1, 2):
        clock.now += 0.5
        buffer.add(step, {"loss": torch.tensor(0.0, device="meta")})
    assert [row["step_seconds"] for row in sink.rows] == [2.0, 2.0]
    assert [row["loss"] for row in sink.rows] == [7.0, 7.0]


def test_eval_row_follows_the_training_rows_before_it():
    sink = Memory()
    buffer = MetricBuffer([sink], every=10)
    buffer.add(1, {"loss": torch.tensor(1.0)})
    buffer.eval(1, {"loss": 2.0, "bits_per_byte": math.nan})
    assert [row["kind"] for row in sink.rows] == ["train", "eval"]
    assert sink.rows[1] == {"kind": "eval", "step": 1, "loss": 2.0, "bits_per_byte": None}


def test_without_sinks_nothing_is_fetched():
    calls = []
    buffer = MetricBuffer([], fetch=counting_fetch(calls))
    buffer.add(1, {"loss": torch.tensor(1.0)})
    buffer.close()
    assert calls == []


def test_a_broken_sink_is_dropped_with_a_warning_and_the_others_go_on():
    class Broken(Memory):
        def row(self, row):
            raise ConnectionError("server away")

    good = Memory()
    buffer = MetricBuffer([Broken(), good])
    with pytest.warns(UserWarning, match="Broken failed .server away."):
        buffer.add(1, {"loss": 1.0})
    buffer.add(2, {"loss": 1.0})
    assert len(good.rows) == 2


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_survive_the_file_bit_for_bit(value):
    assert struct.pack("d", json.loads(encode({"x": value}))["x"]) == struct.pack("d", value)


@pytest.mark.parametrize("torn", [b'{"kind":"train","st', b"x" * 200_000, b""])
def test_a_torn_last_line_is_cut_on_opening(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(encode({"step": 1}) + encode({"step": 2}) + torn)
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    file = MetricsFile(path)
    file.row({"step": 3})
    file.close()
    assert path.read_bytes() == b'{"step":1}\n{"step":2}\n{"step":3}\n'


def test_rows_reach_the_file_on_flush_in_whole_lines(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.row({"step": 1})
    assert file.path.read_bytes() == b""
    file.flush()
    assert file.path.read_bytes() == b'{"step":1}\n'
    file.close()
    file.close()


@pytest.mark.parametrize("undo_fails", [False, True])
def test_rows_wait_for_a_full_disk_and_follow_in_order(tmp_path, monkeypatch, undo_fails):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.row({"step": 1})
    file.flush()
    real = os.write

    def half_then_full(handle, block):
        if len(block) < 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, block[: len(block) - 4])

    monkeypatch.setattr(os, "write", half_then_full)
    if undo_fails:
        monkeypatch.setattr(os, "ftruncate", lambda *args: full())
    file.row({"step": 2})
    with pytest.warns(UserWarning, match="No space left"):
        file.flush()
    file.row({"step": 3})
    with warnings.catch_warnings():  # told once
        warnings.simplefilter("error")
        file.flush()
    assert file.trouble is not None
    assert undo_fails or file.path.read_bytes() == b'{"step":1}\n', "never a torn line"
    monkeypatch.undo()
    file.row({"step": 4})
    file.flush()
    assert file.trouble is None
    file.close()
    assert file.path.read_bytes() == b'{"step":1}\n{"step":2}\n{"step":3}\n{"step":4}\n'


def test_rows_that_wait_are_bounded_and_never_lost_in_silence(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", full)
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.row({"step": 1})
    with pytest.warns(UserWarning, match="rows wait in memory"):
        file.flush()
    monkeypatch.setattr(jsonl, "MOST_WAITING", 20)
    file.row({"step": 2})
    with pytest.raises(SaveFailed, match="No space left"):
        file.flush()
    with pytest.raises(SaveFailed):
        file.close()
    file.close()


def test_a_checkpoint_is_refused_while_rows_wait(tmp_path, monkeypatch):
    buffer = MetricBuffer([file := MetricsFile(tmp_path / "metrics.jsonl")])
    assert buffer.trouble() is None

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.warns(UserWarning):
            buffer.add(1, {"loss": 1.0})
        assert buffer.trouble().errno == errno.ENOSPC
    buffer.notes.append({"kind": "storage", "step": 1, "what": "save", "error": "full"})
    assert buffer.trouble() is None, "asked again, it tries again"
    buffer.flush()
    assert [row["kind"] for row in read_rows(file.path)] == ["train", "storage"]


def test_rows_at_the_end_are_cut_off_without_room_for_a_copy(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(encode({"kind": "train", "step": step}) for step in (1, 2, 3)))

    monkeypatch.setattr(jsonl, "replace_file", full)
    assert truncate_after(path, 2) == 1
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    path.write_bytes(encode({"step": 3}) + encode({"step": 1}))
    with pytest.raises(SaveFailed, match="No space left"):
        truncate_after(path, 2)


def test_truncate_after_keeps_earlier_rows_untouched(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [encode({"kind": "train", "step": step, "loss": step / 3}) for step in range(1, 7)]
    held_out = encode({"kind": "eval", "step": 3, "loss": 1.0})
    path.write_bytes(b"".join([*lines[:3], held_out, b"torn{\n", *lines[3:], b'{"step"']))
    assert truncate_after(path, 3) == 5
    assert path.read_bytes() == b"".join([*lines[:3], held_out])
    before = path.stat().st_ino
    assert truncate_after(path, 3) == 0
    assert path.stat().st_ino == before
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    assert truncate_after(tmp_path / "none.jsonl", 3) == 0


def test_open_sinks_drops_rows_after_the_restored_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(encode({"step": step}) for step in (1, 2, 3)))
    (sink,) = sinks.open_sinks([], tmp_path, after_step=2)
    sink.row({"step": 3, "again": True})
    sink.close()
    assert list(read_rows(path)) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_an_unknown_sink_is_refused_and_drops_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(encode({"step": 9}))
    with pytest.raises(UserError, match="did you mean 'tensorboard'"):
        sinks.open_sinks([("tensorbord", {})], tmp_path)
    assert list(read_rows(tmp_path / "metrics.jsonl")) == [{"step": 9}]


def test_another_package_can_add_a_sink(tmp_path):
    made = []

    @register("sink", "test-observe-memory")
    class Mine(Memory):
        def __init__(self, folder, after_step):
            super().__init__()
            made.append((folder, after_step))

    opened = sinks.open_sinks([("test-observe-memory", {})], tmp_path, 5)
    MetricBuffer(opened).add(6, {"loss": 1.0})
    assert made == [(tmp_path, 5)]
    assert opened[1].rows[0]["step"] == 6
    assert next(read_rows(tmp_path / "metrics.jsonl"))["loss"] == 1.0


def test_tensorboard_writes_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    opened = sinks.open_sinks([("tensorboard", {})], tmp_path)
    buffer = MetricBuffer(opened)
    buffer.add(1, {"loss": torch.tensor(2.5), "bad": torch.tensor(math.nan)})
    buffer.close()
    events = EventAccumulator(str(tmp_path / "logs" / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.5)]
    assert "train/bad" not in events.Tags()["scalars"]


def test_missing_tensorboard_names_the_install_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboard.compat.proto", None)
    with pytest.raises(UserError, match=r"pip install 'hlat\[track\]'"):
        sinks.open_sinks([("tensorboard", {})], tmp_path)
