"""The console: golden plain output, the live display's content, numbers for people, peak FLOP/s."""

from __future__ import annotations

import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console as RichConsole

from hlat.observe import text
from hlat.observe.console import Console, draw
from hlat.observe.peak import Peak, measure, peak_flops, stated_peak
from hlat.observe.progress import Progress, Smooth, Trace, sparkline


def train_row(step, loss=2.5, skipped=False):
    return {
        "kind": "train", "step": step, "loss": loss, "grad_norm": 0.8123, "lr": 3e-4, "tokens": step * 4096,
        "tokens_per_second": 12000.0, "mfu": 0.4123, "step_seconds": 0.34, "skipped": skipped,
    }  # fmt: skip


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_plain_output_is_aligned_and_rare():
    stream, clock = io.StringIO(), Clock()
    console = Console(
        100, name="tiny", stream=stream, clock=clock, stamp=lambda: "11-23 10:00:00", interval=5.0
    )
    console.banner(["hlat · tiny", ("compute", "bf16 (recipe)"), ("compile", "on [CPU]")])
    for step in range(1, 13):
        clock.now += 1.0
        console.row(train_row(step, loss=math.nan if step == 9 else 2.5, skipped=step == 9))
        console.flush()
    console.row({"kind": "eval", "step": 12, "loss": 2.75, "bits_per_byte": 1.875})
    console.checkpoint(12)
    console.warn("loss spike")
    console.close([("held-out", "1.875 bits per byte"), ("run folder", "runs/tiny")])
    console.close([("never", "twice")])
    row = "grad   0.812  lr 3.00e-04     12,000 tok/s  mfu 41.2 %"
    assert stream.getvalue().splitlines() == [
        "hlat · tiny",
        "compute  bf16 (recipe)",
        "compile  on [CPU]",
        "",
        f"11-23 10:00:00  step   1/100  loss   2.5000 (now   2.5000)  {row}  eta -",
        f"11-23 10:00:00  step   6/100  loss   2.5000 (now   2.5000)  {row}  eta 1:34",
        f"11-23 10:00:00  step  11/100  loss   2.5000 (now   2.5000)  {row}  eta 1:29  skipped 1",
        "11-23 10:00:00  held-out at step 12: loss 2.7500, 1.8750 bits per byte",
        "11-23 10:00:00  checkpoint of step 12 saved",
        "11-23 10:00:00  warning: loss spike",
        f"11-23 10:00:00  step  12/100  loss   2.5000 (now   2.5000)  {row}  eta 1:28  skipped 1",
        "",
        "held-out    1.875 bits per byte",
        "run folder  runs/tiny",
    ]


def test_a_reader_that_leaves_does_not_end_training():
    class Gone(io.StringIO):
        def write(self, _):
            raise BrokenPipeError

    console = Console(10, stream=Gone())
    console.event("one")
    console.row(train_row(1))
    console.flush()
    console.close()


def test_characters_outside_the_streams_encoding_are_replaced():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Console(10, stream=stream, stamp=lambda: "t").event("a · b")
    assert raw.getvalue() == b"t  a ? b\n"


def live(width=80):
    stream = io.StringIO()
    return stream, RichConsole(file=stream, force_terminal=True, width=width, height=30, color_system=None)


@pytest.mark.parametrize("width", [110, 80, 56, 30])
def test_live_display_fits_its_width_and_says_everything(width):
    state = Progress(3000)
    for step in range(1, 201):
        state.train(train_row(step, loss=9 - step / 50, skipped=step == 7))
        state.arrived(step * 0.5)
    state.evaluated({"kind": "eval", "step": 150, "loss": 2.7, "bits_per_byte": 1.9215})
    state.checkpoint = (100, 60.0)
    _, console = live(width)
    with console.capture() as capture:
        console.print(draw(state, 100.0, width, "tiny", "a measured 0.98 TFLOP/s"))
    lines = capture.get().splitlines()
    assert all(len(line) <= width for line in lines)
    whole = "\n".join(lines)
    if width >= 56:
        wanted = [
            "200/3,000",
            "7 %",
            "23:20 left",
            "█",
            "12,000",
            "41.2 %",
            "0.812",
            "3.00e-04",
            "skipped   1",
        ]
        for part in [*wanted, "1.9215 bits/byte, step 150", "step 100, 0:40 ago", "now 5.0000"]:
            assert part in whole


def test_live_display_restores_the_terminal_after_ctrl_c():
    stream, rich = live()
    console = Console(10, rich=rich)
    assert console.is_live
    with pytest.raises(KeyboardInterrupt), console:
        console.banner(["go"])
        console.row(train_row(1))
        console.flush()
        raise KeyboardInterrupt
    output = stream.getvalue()
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")  # cursor shown after it was hidden
    assert "1/10" in output


def test_markup_in_text_is_not_interpreted():
    stream, rich = live()
    console = Console(10, rich=rich, stamp=lambda: "t")
    console.event("[red]x[/red] [/]")
    console.close()
    assert "[red]x[/red] [/]" in stream.getvalue()


def test_text_of_others_cannot_steer_the_terminal():
    for stream, rich in [live(), (plain := io.StringIO(), RichConsole(file=plain))]:
        console = Console(10, rich=rich, stamp=lambda: "t")
        console.close([("sample", "one\x1b[2J\x07\r\n\ttwo"), ("run folder", "r")])
        assert "\x1b[2J" not in stream.getvalue()
        assert "\x07" not in stream.getvalue()
        assert r"one\x1b[2J\x07\x0d" in stream.getvalue() and "\n                two" in stream.getvalue()


def test_start_sets_the_step_and_the_clock():
    clock = Clock()
    console = Console(100, stream=io.StringIO(), clock=clock)
    clock.now = 60.0
    console.start(40, mfu_note="a stated 95 TFLOP/s")
    assert (console.progress.step, console.progress.started) == (40, 60.0)


def test_sparkline():
    assert sparkline([1, 2, 4, 8, 16, 32, 64, 128], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([-1, 0, 1], 3) == "▁▅█"  # not positive: linear
    assert sparkline([5.0] * 20, 6) == "▁▁▁▁▁▁"
    assert sparkline([], 6) == sparkline([1.0], 0) == ""
    assert len(sparkline(list(range(1, 1000)), 40)) == 40


def test_trace_holds_the_whole_run_in_constant_memory():
    trace = Trace(points=16)
    for value in range(10_000):
        trace.add(float(value))
    trace.add(None)
    trace.add(math.nan)
    values = trace.values()
    assert len(values) <= 17
    assert values == sorted(values)
    assert values[0] < 700
    assert values[-1] > 9_000


def test_smooth_starts_without_bias_and_passes_over_gaps():
    smooth = Smooth(span=20)
    assert smooth.value is None
    for value in (3.0, None, math.nan, 3.0):
        smooth.add(value)
    assert smooth.value == pytest.approx(3.0, abs=1e-12)
    half = Smooth(span=3)  # each value weighs half as much as the next
    half.add(0.0)
    half.add(1.0)
    assert half.value == pytest.approx(2 / 3)


def left(state, *arrivals):
    """Time left after windows of rows, as (last step, time of arrival)."""
    for last, now in arrivals:
        for step in range(state.step + 1, last + 1):
            state.train(train_row(step))
        assert state.arrived(now)
    assert not state.arrived(math.inf)
    return state.seconds_left()


def test_time_left_counts_from_the_end_of_the_first_step():
    state = Progress(100)
    assert state.seconds_left() is None
    assert left(state, (1, 300.0)) is None  # five minutes of compiling
    assert left(state, (2, 301.0), (3, 302.0)) == pytest.approx(97.0)


@pytest.mark.parametrize("every", [1, 10, 200, 300, 1000])
def test_time_left_with_windows_of_any_length(every):
    """Rows of a window arrive one after the other, a little later each; more of them than are remembered."""
    now = [0.0]

    def clock():
        now[0] += 1e-5
        return now[0]

    console = Console(100 * every, stream=io.StringIO(), clock=clock)
    for window in range(1, 8):
        now[0] = 0.5 * every * window
        for step in range(every * (window - 1) + 1, every * window + 1):
            console.row(train_row(step))
        console.flush()
    assert console.progress.seconds_left() == pytest.approx(93 * every * 0.5, rel=1e-3)


def test_time_left_counts_evaluations_for_what_they_take():
    """One in 1,000 steps, as long as all of them together; asked at any moment from the third on."""
    state, now, total = Progress(40_000), 0.0, 40_000
    for step in range(1, 20_001):
        state.train({"step": step})
        state.arrived(now := now + 0.1 + 100.0 * (step % 1000 == 1))
        if step > 8_000 and step % 137 == 0:
            assert state.seconds_left() == pytest.approx(0.2 * (total - step), rel=0.35)
    assert len(state._arrivals._thinned) < 256


def test_time_left_follows_a_change_of_pace():
    state, now = Progress(30_000), 0.0
    for step in range(1, 20_001):
        state.train({"step": step})
        state.arrived(now := now + (1.0 if step <= 2_000 else 0.1))
    assert state.seconds_left() == pytest.approx(1_000.0, rel=1e-6)


@given(st.lists(st.floats(-5, 5), max_size=400), st.integers(2, 20))
def test_trace_is_the_mean_of_equal_stretches(values, points):
    trace = Trace(points)
    for value in values:
        trace.add(value)
    means = trace.values()
    stretch = next(2**n for n in range(12) if len(values) // 2**n < 2 * (points // 2))
    pieces = [values[i : i + stretch] for i in range(0, len(values), stretch)]
    assert means == pytest.approx([sum(piece) / len(piece) for piece in pieces], abs=1e-9)


def test_numbers_for_people():
    assert [text.duration(s) for s in (7, 754, 11045, 183845, math.inf, -1)] == [
        "0:07", "12:34", "3:04:05", "2d 03:04:05", "-", "-",
    ]  # fmt: skip
    assert [text.short(n) for n in (950, 12_345, 999_999, 1.8e12)] == ["950", "12.3k", "1M", "1.8T"]
    assert [text.rate(n) for n in (None, 12.34, 12_345.6)] == ["-", "12.3", "12,346"]
    assert text.fixed(math.nan) == text.percent(None) == text.scientific(math.inf) == "-"
    assert [text.byte_size(n) for n in (12, 12_345, 1_234_567)] == ["12 B", "12 kB", "1.2 MB"]


def test_stated_peaks():
    bf16 = torch.bfloat16
    assert stated_peak("trn1", bf16).flops == 95e12
    assert stated_peak("NVIDIA H100 80GB HBM3", bf16).flops == 989e12
    assert stated_peak("NVIDIA H100 PCIe", bf16).flops == 756e12
    assert stated_peak("NVIDIA A100-SXM4-80GB", bf16).flops == 312e12
    assert stated_peak("NVIDIA A100-SXM4-80GB", torch.float32) is None
    assert stated_peak("NVIDIA H200 MIG 1g.18gb", bf16) is None
    assert stated_peak("unknown", bf16) is None
    assert str(Peak(0.62e12, measured=True)) == "a measured 0.62 TFLOP/s"
    assert str(Peak(4.5e9, measured=True)) == "a measured 4.5 GFLOP/s"


def test_measured_peak_is_plausible_cached_and_leaves_random_state_alone():
    before = torch.get_rng_state()
    peak = peak_flops(torch.device("cpu"), torch.float32)
    assert peak.measured
    assert 1e8 < peak.flops < 1e14
    assert peak_flops(torch.device("cpu"), torch.float32) is peak
    assert torch.equal(torch.get_rng_state(), before)
    assert measure(torch.device("cpu"), torch.float32, (64,)) > 0
