"""How numbers are written for people, the same in the terminal and in the report."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from hlat.errors import UserError


def duration(seconds: float) -> str:
    """Seconds as `0:07`, `12:34`, `3:04:05` or `2d 03:04:05`; `-` when not finite or negative."""
    if not math.isfinite(seconds) or seconds < 0:
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def short(value: float) -> str:
    """A count in three digits or so: `950`, `12.3k`, `4.56M`, `1.8T`."""
    for factor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * factor:
            return f"{value / factor:.3g}{suffix}"
    return f"{value:.3g}"


def rate(value: float | None) -> str:
    """Tokens per second: whole with thousands separators, one decimal below 100, `-` when unknown."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def percent(value: float | None) -> str:
    """A fraction as `41.2 %`, `-` when unknown."""
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def fixed(value: float | None, digits: int = 4) -> str:
    """A float with a fixed number of decimals, `-` when unknown or not finite."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def scientific(value: float | None) -> str:
    """A learning rate: `3.00e-04`, `-` when unknown."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.2e}"


def byte_size(size: int) -> str:
    """Bytes as `812 B`, `143 kB`, `2.1 MB` (powers of 1000)."""
    if size < 1000:
        return f"{size} B"
    return f"{size / 1000:.0f} kB" if size < 1_000_000 else f"{size / 1e6:.1f} MB"


def argument_text(text: str, where: str) -> str:
    """A text of the command line as UTF-8, whatever encoding the locale has. Raises UserError for other
    bytes.
    """
    if not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        raise UserError("is not UTF-8 text", where=where, fix="write it in UTF-8") from None


def anomaly_text(row: Mapping[str, Any]) -> str:
    """A metrics row of kind `anomaly` in a line."""
    values = [
        f"{name} {fixed(row.get(key)) if row.get(key) is not None else 'not finite'}"
        for key, name in (("loss", "loss"), ("grad_norm", "norm"))
    ]
    step, read = int(row["bad_step"]), int(row.get("data_step") or row["bad_step"])
    text = f"step {step:,}{'' if read == step else f' (data step {read:,})'}: {', '.join(values)}"
    if row["policy"] != "rewind":
        return f"{text}; {'update skipped' if row['policy'] == 'skip' else 'the run stops'}"
    first, last = row["skipped_data"]
    data = f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
    return f"{text}; back to step {int(row['checkpoint']):,}, without data {data}"
