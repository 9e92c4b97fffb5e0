"""What a person sees while a run trains: a live display on a terminal, plain aligned lines in a log file."""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hlat.observe.progress import Progress, sparkline
from hlat.observe.redact import redact
from hlat.observe.skipped import OftenSkipped
from hlat.observe.terminal import escaped, unguarded
from hlat.observe.text import anomaly_text, duration, fixed, percent, rate, scientific

Lines = Sequence[str | tuple[str, str]]
_REFRESH_HZ = 2  # by rich's thread, half a millisecond each: 0.1 % of one core
_MAX_WIDTH = 110


class Console:
    """Progress of one run; a metric sink (`row`, `flush`, `close`) that also takes events.

    Args:
        total_steps: the step at which the run ends.
        first_step: steps already done (a resumed run).
        name: the run's name, shown beside the bar.
        mfu_note: what MFU is measured against ("a measured 0.62 TFLOP/s").
        interval: least seconds between two plain step lines.
        stream: where to write (default: stdout). A terminal gets the live display.
        clock: seconds, monotonic. stamp: the time a plain line starts with.
        rich: a rich console to draw on (tests, recordings).

    Nothing here waits for the device: rows arrive when the metric buffer has fetched them.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        name: str = "",
        mfu_note: str = "",
        interval: float = 5.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        stamp: Callable[[], str] = lambda: time.strftime("%m-%d %H:%M:%S"),
        rich: RichConsole | None = None,
    ) -> None:
        self._rich = rich or RichConsole(file=unguarded(stream or sys.stdout), highlight=False)
        self._name, self._mfu_note, self._interval = name, mfu_note, interval
        self._clock, self._stamp = clock, stamp
        self.progress = Progress(total_steps, first_step, started=clock())
        self._often = OftenSkipped()
        self._printed: float | None = None
        self._printed_step = -1
        self._closed = self._lost = False
        self._live: Live | None = None
        self.is_live = (
            self._rich.is_terminal and not self._rich.is_dumb_terminal and _draws_blocks(self._rich)
        )

    def start(self, first_step: int, *, mfu_note: str = "", every: int = 1) -> None:
        """Set what is known once set-up is over, before `banner`; the time shown counts from here. Rows
        arrive in windows of `every` steps.
        """
        self._mfu_note, self._often = mfu_note, OftenSkipped(every)
        self.progress.step, self.progress.started = first_step, self._clock()

    def banner(self, lines: Lines) -> None:
        """Print what was chosen and why (a pair is a name and its value, aligned) and start the display."""
        self._lines(lines)
        self._print(Text())
        self._start_live()

    def row(self, row: Mapping[str, Any]) -> None:
        """Take a metric row. Held-out results are printed at once; steps wait for `flush`."""
        if row.get("kind") == "eval":
            self.progress.evaluated(row)
            self._event(_eval_text(row))
        elif row.get("kind") == "tasks":
            self._event(_tasks_text(row))
        elif row.get("kind") == "anomaly":
            self.warn(anomaly_text(row))
        elif row.get("kind") == "train":
            self.progress.train(row)
            if line := self._often.row(row):
                self.warn(line)

    def flush(self) -> None:
        """A window of rows is complete. On a plain stream its last step is printed now and then."""
        now = self._clock()
        if not self.progress.arrived(now):
            return
        if self.is_live:
            self._start_live()
        elif self._printed is None or now - self._printed >= self._interval:
            self._print_step(now)

    def rewind(self, step: int) -> None:
        """The run goes back to the end of `step`."""
        self._often.rewind()
        self.progress.rewind(step)

    def checkpoint(self, step: int) -> None:
        """Note that the checkpoint of `step` is complete."""
        self.progress.checkpoint = (step, self._clock())
        self._event(f"checkpoint of step {step:,} saved")

    def event(self, text: str) -> None:
        """Print a line about something that happened."""
        self._event(text)

    def warn(self, text: str) -> None:
        """Print a line about something that may be wrong."""
        self._event(text, Text("warning: ", style="yellow bold"))

    def close(self, summary: Lines = ()) -> None:
        """End the display, leave its last state on the screen, print the summary. Later calls do nothing.

        Safe in a `finally` after Ctrl-C: the cursor and the terminal's mode come back.
        """
        if self._closed:
            return
        self._closed = True
        self._stop_live()
        if line := self._often.end():
            self.warn(line)
        if not self.is_live and self.progress.last and self._printed_step != self.progress.step:
            self._print_step(self._clock())
        if summary:
            self._print(Text())
            self._lines(summary)

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _event(self, text: str, prefix: Text | str = "") -> None:
        head = f"{self._stamp()}  "
        lines = clean(text).replace("\n", f"\n{' ' * len(head)}")
        self._print(Text.assemble((head, "dim"), prefix, lines))

    def _lines(self, lines: Lines) -> None:
        width = max((len(line[0]) for line in lines if not isinstance(line, str)), default=0)
        for line in lines:
            if isinstance(line, str):
                self._print(Text(clean(line), style="bold"))
            else:
                value = clean(line[1]).replace("\n", f"\n{' ' * (width + 2)}")
                self._print(Text.assemble((f"{line[0]:<{width}}  ", "dim"), value))

    def _print(self, text: Text) -> None:
        if self._lost:
            return
        try:
            if self.is_live:
                self._rich.print(text)
            else:  # one line each whatever the width: log files are read with grep
                encoding = self._rich.encoding
                line = text.plain.rstrip().expandtabs().encode(encoding, "replace").decode(encoding)
                self._rich.file.write(f"{line}\n")
                self._rich.file.flush()
        except (OSError, ValueError):  # the reader of a pipe has left, the terminal is gone: training goes on
            self._lost = True

    def _print_step(self, now: float) -> None:
        self._printed, self._printed_step = now, self.progress.step
        self._event(step_line(self.progress))

    def _start_live(self) -> None:
        if self.is_live and self._live is None and not self._closed:
            self._live = Live(
                get_renderable=self._draw,
                console=self._rich,
                refresh_per_second=_REFRESH_HZ,
                vertical_overflow="crop",
            )
            self._live.start(refresh=True)
            atexit.register(self._stop_live)

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            atexit.unregister(self._stop_live)

    def _draw(self) -> RenderableType:
        return draw(
            self.progress, self._clock(), min(self._rich.width, _MAX_WIDTH), self._name, self._mfu_note
        )


def draw(state: Progress, now: float, width: int, name: str = "", mfu_note: str = "") -> RenderableType:
    """The live display: a bar, the loss with its curve over the run, three columns of values, a note."""
    left, row = state.seconds_left(), state.last
    share = f"{100 * state.step / max(state.total, 1):.0f} %"
    times = f"{duration(now - state.started)}" + ("" if left is None else f" + {duration(left)} left")
    head = Table.grid(padding=(0, 1), expand=True)
    head.width = width
    for ratio in (None, 1, None, None, None):
        head.add_column(no_wrap=True, ratio=ratio)
    head.add_row(
        Text(name or "training", style="bold"),
        ProgressBar(max(state.total, 1), state.step, style="bright_black", complete_style="cyan"),
        Text.assemble((f"{state.step:,}", "bold"), (f"/{state.total:,}", "dim")),
        Text(share, style="cyan"),
        Text(times),
    )
    loss = Text.assemble(("loss      ", "dim"), (fixed(state.loss.value), "bold"))
    now_loss = Text.assemble(("  now ", "dim"), fixed(row.get("loss")))
    loss.append(
        "  " + sparkline(state.trace.values(), max(8, width - len(loss) - len(now_loss) - 2)), style="cyan"
    )
    loss.append_text(now_loss)
    note = Text.assemble(
        ("skipped   ", "dim"), (f"{state.skipped:<11}", "yellow bold" if state.skipped else "")
    )
    note.append(f"MFU against {mfu_note}" if mfu_note else "", style="dim")
    lines = [loss, *_values(state, now, width)]
    if learned := optimizer_values(row):
        lines.append(Text.assemble((f"{'optimizer':<10}", "dim"), learned))
    if wire := wire_text(row):
        lines.append(Text.assemble((f"{'reduced':<10}", "dim"), wire))
    lines.append(note)
    for line in lines:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return Group(head, *lines)


def _values(state: Progress, now: float, width: int) -> list[Text]:
    """The named values in three aligned columns, in two on a narrow terminal."""
    row, held, saved = state.last, "-", "no checkpoint yet"
    if state.held_out:
        held = f"{_held_out_text(state.held_out[1])}, step {state.held_out[0]:,}"
    if state.checkpoint:
        saved = f"step {state.checkpoint[0]:,}, {duration(now - state.checkpoint[1])} ago"
    speed = [("tokens/s", rate(state.per_second.value)), ("MFU", percent(state.mfu.value))]
    update = [("grad norm", fixed(row.get("grad_norm"), 3)), ("lr", scientific(row.get("lr")))]
    kept = [("held-out", held), ("saved", saved)]
    if width >= 72:
        lines = [[speed[0], update[0], kept[0]], [speed[1], update[1], kept[1]]]
    else:
        lines = [[speed[0], update[0]], [speed[1], update[1]], [kept[0]], [kept[1]]]
    return [Text.assemble(*_cells(cells)) for cells in lines]


def _cells(cells: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [part for name, value in cells for part in ((f"{name:<10}", "dim"), (f"{value:<11}", ""))]


def optimizer_values(row: Mapping[str, Any]) -> str:
    """What the optimizer says of itself (keys `optim/…`), as `beta1 0.900  rho 0.412`; "" if nothing."""
    names = [key for key in row if key.startswith("optim/")]
    return "  ".join(f"{name.removeprefix('optim/')} {fixed(row[name], 3)}" for name in names)


def step_line(state: Progress) -> str:
    """One step as a line of a log: fixed columns, smoothed loss first, skipped steps when there are any."""
    row, digits, left = state.last, len(str(state.total)), state.seconds_left()
    parts = [
        f"step {state.step:>{digits}}/{state.total}",
        f"loss {fixed(state.loss.value):>8} (now {fixed(row.get('loss')):>8})",
        f"grad {fixed(row.get('grad_norm'), 3):>7}",
        f"lr {scientific(row.get('lr'))}",
        f"{rate(state.per_second.value):>9} tok/s",
        f"mfu {percent(state.mfu.value):>6}",
        f"eta {'-' if left is None else duration(left)}",
    ]
    if learned := optimizer_values(row):
        parts.append(learned)
    if wire := wire_text(row):
        parts.append(wire)
    if state.skipped:
        parts.append(f"skipped {state.skipped}")
    return "  ".join(parts)


def wire_text(row: Mapping[str, Any]) -> str:
    """What a compressed reduction sent and what it keeps; empty for one that reports nothing."""
    wire, dense, norm, held = (
        row.get(f"reduce/{name}") for name in ("wire_bytes", "dense_bytes", "error_norm", "error_bytes")
    )
    if wire is None or dense is None:
        return ""
    text = f"wire {wire / 1e6:.3g} of {dense / 1e6:.3g} MB"
    return text if norm is None or held is None else f"{text}, error {norm:.2g} in {held / 1e6:.3g} MB"


def _eval_text(row: Mapping[str, Any]) -> str:
    if row.get("loss") is None:
        return f"held-out at step {int(row['step']):,}: no figure, the loss is not finite"
    text = f"held-out at step {int(row['step']):,}: loss {fixed(row.get('loss'))}"
    if row.get("accuracy") is not None:
        return f"{text}, accuracy {percent(row['accuracy'])}"
    bits = row.get("bits_per_byte")
    return text if bits is None else f"{text}, {fixed(bits)} bits per byte"


def _held_out_text(row: Mapping[str, Any]) -> str:
    """The one figure of an evaluation: accuracy if it has one."""
    if row.get("accuracy") is not None:
        return f"{percent(row['accuracy'])} right"
    return f"{fixed(row.get('bits_per_byte'))} bits/byte"


def _tasks_text(row: Mapping[str, Any]) -> str:
    figures = [
        f"{name.replace('/', ' ')} {fixed(value)}"
        for name, value in row.items()
        if "/" in name and not name.endswith("_stderr")
    ]
    told = "".join(f"; {line}" for line in row.get("notes", ()))
    return f"tasks at step {int(row['step']):,}: {', '.join(figures) or 'no figure'}{told}"


def clean(text: str) -> str:
    """The text without secrets, and with its control characters escaped: a generated sample or a file name
    must not steer the terminal.
    """
    return escaped(redact(text))


def _draws_blocks(console: RichConsole) -> bool:
    """Whether the stream's encoding has the sparkline's characters (a legacy terminal gets plain lines)."""
    return console.encoding.lower().replace("-", "").startswith("utf")
