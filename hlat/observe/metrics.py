"""Metrics of every step, fetched from the device once per window.

A value that the host reads makes it wait for the device. So the training loop hands each step's scalars over
as tensors; they stay on the device and travel together, in one transfer, every `every` steps. Every step
still gets its own row.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hlat.errors import TrainingStopped, UserError
from hlat.observe.jsonl import Row, finite
from hlat.observe.sinks import Sink, is_own

_TRAIN_FIELDS = ("loss", "grad_norm", "lr", "tokens", "tokens_per_second", "mfu", "step_seconds", "skipped")


class Interruption(Exception):
    """What a sink raises to send the training loop elsewhere. Any other exception costs it its rows."""


@dataclass
class _Step:
    """One step that waits for its window to end: `packed` holds the values of `names`, in that order."""

    step: int
    names: list[str]
    dtypes: list[torch.dtype]
    packed: list[Tensor]
    host: dict[str, Any]
    ended: float


def fetch(tensors: list[Tensor]) -> list[float]:
    """All elements of 1-D tensors of one device, in order, by one transfer to the host. XLA's come one by
    one: joining them would be a graph to compile for every number of tensors.
    """
    if tensors and tensors[0].device.type == "xla":
        return [float(tensor.cpu()) for tensor in tensors]
    return torch.cat(tensors).tolist() if tensors else []


class MetricBuffer:
    """Collects per-step metrics and gives one row for each step to every sink.

    Args:
        sinks: receivers of rows; none (every rank but the first) means that nothing is fetched.
        every: steps in a window (`log.every`).
        tokens_per_step: tokens of the global batch; gives `tokens` (steps x this) and `tokens_per_second`.
        flops_per_token: model FLOPs a token, forward and backward; with `peak_flops` gives `mfu`.
        peak_flops: FLOP/s of all devices together.
        clock: seconds, monotonic.
        fetch: how values reach the host (replaced in tests).

    `step_seconds` is the step's own wall time when its values are on the CPU (the step has ended when `add`
    is called); on an accelerator, where steps are only queued, it is the mean over the window.
    """

    def __init__(
        self,
        sinks: Iterable[Sink],
        *,
        every: int = 1,
        tokens_per_step: int = 0,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        fetch: Callable[[list[Tensor]], list[float]] = fetch,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self._sinks = list(sinks)
        self._every = every
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._clock = clock
        self._fetch = fetch
        self._pending: list[_Step] = []
        self._mark = clock()
        self.notes: deque[Row] = deque()
        """Rows of other kinds, from any thread; they are written with the next window."""
        self.evaluated: int | None = None
        """Step of the last row of kind `eval`, also of one that an earlier start has written."""

    def start(self) -> None:
        """Start the first step's time now; call it when set-up is over."""
        self._mark = self._clock()

    def add(
        self,
        step: int,
        device_values: Mapping[str, Tensor | float],
        host_values: Mapping[str, Any] | None = None,
    ) -> list[Row]:
        """Take the metrics of a finished step.

        Args:
            step: number of updates done, 1 for the first.
            device_values: one-element tensors (any dtype, any device) or numbers. A tensor is copied on its
                device, so the caller may overwrite it.
            host_values: values that are on the host already (learning rate, counters).

        Returns:
            The window's rows when this step ended a window, else an empty list.
        """
        if not self._sinks:
            return []
        host = dict(host_values or {})
        tensors: dict[str, Tensor] = {}
        for name, value in device_values.items():
            if isinstance(value, Tensor):
                tensors[name] = value.detach()
            else:
                host[name] = value
        self._pending.append(
            _Step(
                step,
                list(tensors),
                [tensor.dtype for tensor in tensors.values()],
                _pack(list(tensors.values())),
                host,
                self._clock(),
            )
        )
        return self.flush() if len(self._pending) >= self._every else []

    def flush(self) -> list[Row]:
        """Fetch what is waiting and hand its rows to the sinks.

        Call it before a checkpoint becomes complete: rows of steps that a checkpoint covers must outlive a
        crash.
        """
        if not self._pending:
            self._send(self._noted())
            return []
        window, self._pending = self._pending, []
        values = self._values(window)
        rows = [
            self._row(entry, entry_values, seconds)
            for entry, entry_values, seconds in zip(window, values, self._seconds(window), strict=True)
        ]
        self._send([*rows, *self._noted()])
        return rows

    def trouble(self) -> OSError | None:
        """Why rows handed out so far are not on the disk, after another attempt; None when they are. A sink
        that writes files has a method `sync` that sees to it.
        """
        found = [self._ask(sink, "sync") for sink in list(self._sinks)]
        return next((error for error in found if error), None)

    def eval(self, step: int, values: Mapping[str, Any], kind: str = "eval") -> Row:
        """Write a row of kind `eval` (held-out `loss`, `bits_per_byte`, …) or `tasks` (`<task>/<metric>`)
        after the training rows so far.
        """
        self.flush()
        if kind == "eval":
            self.evaluated = step
        row: Row = finite({"kind": kind, "step": step, **values})
        self._send([row])
        return row

    def event(self, row: Mapping[str, Any]) -> None:
        """Give every sink a row of another kind, after those it has."""
        self._send([finite(row)])

    def rewind(self, step: int) -> None:
        """The run goes back to the end of `step`: sinks that have a method `rewind` drop what came after."""
        self._pending.clear()
        self.evaluated = None
        for sink in list(self._sinks):
            self._ask(sink, "rewind", step)
        self.start()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keep the time spent inside (an evaluation, a blocking save) out of `step_seconds`."""
        self.flush()
        start = self._clock()
        try:
            yield
        finally:
            self._mark += self._clock() - start

    def close(self) -> None:
        """Flush, then close every sink, also when one of them fails. A guard's word would come too late."""
        with contextlib.ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(self._close, sink)
            with contextlib.suppress(Interruption, TrainingStopped):
                self.flush()

    def _values(self, window: list[_Step]) -> list[list[float]]:
        """Values of each step in the order of its names; one fetch a device, so in practice one in all."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for entry in window:
            for tensor in entry.packed:
                by_device.setdefault(tensor.device, []).append(tensor)
        streams = {device: iter(self._fetch(tensors)) for device, tensors in by_device.items()}
        return [
            [next(streams[tensor.device]) for tensor in entry.packed for _ in range(tensor.numel())]
            for entry in window
        ]

    def _seconds(self, window: list[_Step]) -> list[float]:
        if all(tensor.device.type == "cpu" for entry in window for tensor in entry.packed):
            starts = [self._mark, *(entry.ended for entry in window[:-1])]
            self._mark = window[-1].ended
            return [entry.ended - start for entry, start in zip(window, starts, strict=True)]
        now = self._clock()  # the fetch has waited for the window's last step
        mean = (now - self._mark) / len(window)
        self._mark = now
        return [mean] * len(window)

    def _row(self, entry: _Step, values: list[float], seconds: float) -> Row:
        known = {
            name: _cast(v, dtype) for name, v, dtype in zip(entry.names, values, entry.dtypes, strict=True)
        }
        known.update(entry.host)
        per_second = self._tokens_per_step / seconds if self._tokens_per_step and seconds > 0 else None
        known.setdefault("tokens", entry.step * self._tokens_per_step)
        known.setdefault("tokens_per_second", per_second)
        known.setdefault("mfu", self._mfu(known["tokens_per_second"]))
        known.setdefault("step_seconds", seconds)
        known["skipped"] = bool(known.get("skipped", False))
        row: Row = {"kind": "train", "step": entry.step}
        row.update((name, known.pop(name, None)) for name in _TRAIN_FIELDS)
        row.update(known)
        return finite(row)  # type: ignore[no-any-return]

    def _mfu(self, per_second: float | None) -> float | None:
        if per_second is None or not self._flops_per_token or not self._peak_flops:
            return None
        return per_second * self._flops_per_token / self._peak_flops

    def _noted(self) -> list[Row]:
        return [finite(self.notes.popleft()) for _ in range(len(self.notes))]

    def _send(self, rows: list[Row]) -> None:
        for sink in list(self._sinks):
            try:
                for row in rows:
                    sink.row(row)
                getattr(sink, "flush", lambda: None)()
            except (UserError, Interruption):
                raise
            except Exception as error:
                self._drop(sink, error)

    def _ask(self, sink: Sink, method: str, *arguments: Any) -> Any:
        """What a method says that a sink need not have; a sink of another package that raises is dropped."""
        try:
            return getattr(sink, method, _nothing)(*arguments)
        except (UserError, Interruption):
            raise
        except Exception as error:
            if is_own(type(sink)):
                raise
            self._drop(sink, error)
            return None

    def _drop(self, sink: Sink, error: Exception) -> None:
        """Go on without a sink: a broken tracker must not end a training run."""
        self._sinks.remove(sink)
        what = f"metric sink {type(sink).__name__} failed ({error}); it gets no more rows"
        warnings.warn(what, stacklevel=3)
        if not is_own(type(sink)):
            with contextlib.suppress(Exception):
                sink.close()

    def _close(self, sink: Sink) -> None:
        if sink not in self._sinks:
            return  # dropped by the last flush
        try:
            sink.close()
        except UserError:
            raise
        except Exception as error:
            if is_own(type(sink)):
                raise
            warnings.warn(f"metric sink {type(sink).__name__} failed to close ({error})", stacklevel=2)


def _nothing(*arguments: Any) -> None:
    """What a sink without a method does."""


def _pack(tensors: list[Tensor]) -> list[Tensor]:
    """The scalars as 1-D tensors, copied now because compiled steps may reuse their output memory.

    float64 where the device has it, so that fp32 losses and counts up to 2^53 arrive exactly. On XLA the
    scalars are kept as they are: an operation queued here would become part of the next step's graph and
    compile it anew.
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    packed: list[Tensor] = []
    if len(by_device) <= 1:
        for device, group in by_device.items():
            if device.type == "xla":
                packed.extend(group)
            else:
                packed.append(torch.stack([tensor.reshape(()).to(_wide(device)) for tensor in group]))
        return packed
    return [tensor.reshape(1).to(_wide(tensor.device), copy=True) for tensor in tensors]


def _wide(device: torch.device) -> torch.dtype:
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


def _cast(value: float, dtype: torch.dtype) -> Any:
    if dtype == torch.bool:
        return bool(value)
    return float(value) if dtype.is_floating_point else int(value)
