"""Line charts as SVG text: no library, sharp at any size, coloured by the page's style sheet.

A chart is drawn in its own units (`WIDTH` x `HEIGHT`) and scaled by the browser. Colours are the classes
`s0`, `s1`, …
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hlat.observe.markup import escape
from hlat.observe.runs import Array
from hlat.observe.text import short

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 24, 12, 40
COLOURS = 8
POINTS = 480


@dataclass(frozen=True)
class Series:
    """One curve: `x`, `y` the line, `raw_x`, `raw_y` single values behind it, `dots` to mark its points."""

    name: str
    colour: int
    x: Array
    y: Array
    raw_x: Array = field(default_factory=lambda: np.empty(0))
    raw_y: Array = field(default_factory=lambda: np.empty(0))
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves over one axis.

    `log` asks for a logarithmic y axis, `zero` for one that starts at 0; `x_range` is the x axis (default:
    the data's).
    """

    key: str
    title: str
    x_title: str
    series: list[Series]
    note: str = ""
    log: bool = False
    zero: bool = False
    x_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Scale:
    """Maps data values to drawing units, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: Array) -> Array:
        """Drawing coordinates of data values."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        data = np.log(np.maximum(value, 1e-300)) if self.log else value
        return self.start + (data - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the scale; if logarithmic, powers of ten with as much between as it takes."""
        if not self.log:
            return nice_ticks(self.low, self.high)
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5)):
            ticks = [d * 10.0**e for e in exponents for d in digits if self.low <= d * 10.0**e <= self.high]
            if len(ticks) >= 3:
                return ticks
        return nice_ticks(self.low, self.high)


def decimate(x: Array, y: Array, points: int = POINTS) -> tuple[Array, Array]:
    """At most `points` of a smooth curve, first and last included. Rows that are NaN go."""
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(x) <= points:
        return x, y
    index = np.unique(np.linspace(0, len(x) - 1, points).round().astype(int))
    return x[index], y[index]


def envelope(x: Array, y: Array, points: int = POINTS) -> tuple[Array, Array]:
    """At most `points` of a noisy curve: lowest and highest of each stretch, so that no spike is lost."""
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(x) <= points:
        return x, y
    stretches = np.array_split(np.arange(len(x)), points // 2)
    index = [i for part in stretches for i in sorted({part[y[part].argmin()], part[y[part].argmax()]})]
    return x[index], y[index]


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= count + 0.5)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 15) for index in range(first, last + 1)]


def draw(chart: Chart) -> str:
    """The chart as an `<svg>` element; a note in its place when there is nothing to draw."""
    drawn = [series for series in chart.series if len(series.x)]
    if not drawn:
        return '<p class="none">no values in these runs</p>'
    x_scale, y_scale = scales(chart)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}" '
        f'data-chart="{escape(chart.key)}">',
        f'<clipPath id="clip-{escape(chart.key)}"><rect x="{LEFT - 4}" y="{TOP - 3}" '
        f'width="{WIDTH - LEFT - RIGHT + 8}" height="{HEIGHT - TOP - BOTTOM + 6}"/></clipPath>',
        *_grid(x_scale, y_scale, chart.x_title),
        f'<g clip-path="url(#clip-{escape(chart.key)})">',
        *(_path(s.raw_x, s.raw_y, x_scale, y_scale, f"raw s{s.colour}") for s in drawn if len(s.raw_x)),
        *(_path(s.x, s.y, x_scale, y_scale, f"line s{s.colour}") for s in drawn),
        *(_dots(s, x_scale, y_scale) for s in drawn if s.dots),
        "</g>",
        f'<line class="cross" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/>',
        f'<rect class="pad" x="{LEFT}" y="{TOP}" '
        f'width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"/>',
        "</svg>",
    ]
    return "\n".join(parts)


def hover_data(chart: Chart) -> dict[str, Any]:
    """What the page's script needs to show values under the pointer: the scales and each curve's points."""
    if not any(len(series.x) for series in chart.series):
        return {}
    x_scale, y_scale = scales(chart)
    return {
        "x": [x_scale.low, x_scale.high, x_scale.start, x_scale.end],
        "y": [y_scale.low, y_scale.high, y_scale.start, y_scale.end],
        "log": chart.log,
        "xTitle": chart.x_title,
        "series": [
            {
                "name": s.name,
                "colour": s.colour,
                "x": [float(f"{value:.7g}") for value in s.x],
                "y": [float(f"{value:.6g}") for value in s.y],
            }
            for s in chart.series
            if len(s.x)
        ],
    }


def scales(chart: Chart) -> tuple[Scale, Scale]:
    """Axes that hold every line, and all single values but the most extreme hundredth on either side."""
    drawn = [series for series in chart.series if len(series.x)]
    x_low, x_high = chart.x_range or (min(s.x.min() for s in drawn), max(s.x.max() for s in drawn))
    raw = np.concatenate([s.raw_y for s in drawn])
    low, high = min(s.y.min() for s in drawn), max(s.y.max() for s in drawn)
    if len(raw):
        low, high = min(low, np.percentile(raw, 1)), max(high, np.percentile(raw, 99))
    if chart.log:
        low, high = _open(math.log(low), math.log(high))
        low, high = math.exp(low), math.exp(high)
    else:
        low, high = _open(0.0 if chart.zero else low, high, 0.0 if chart.zero else 0.04)
    x_low, x_high = (x_low, x_high) if x_high > x_low else (x_low - 0.5, x_high + 0.5)
    return (
        Scale(float(x_low), float(x_high), LEFT, WIDTH - RIGHT),
        Scale(float(low), float(high), HEIGHT - BOTTOM, TOP, chart.log),
    )


def _open(low: float, high: float, below: float = 0.04) -> tuple[float, float]:
    span = high - low
    if span <= 1e-12 * max(abs(low), abs(high), 1e-300):
        span = abs(high) or 1.0
        return low - below * span, high + 0.04 * span
    return low - below * span, high + 0.04 * span


def _grid(x_scale: Scale, y_scale: Scale, x_title: str) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    y_ticks = y_scale.ticks()
    for value, y in zip(y_ticks, y_scale(np.array(y_ticks)), strict=True):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick y" x="{LEFT - 8}" y="{y:.1f}">{tick_label(value, y_ticks)}</text>')
    x_ticks = x_scale.ticks()
    for value, x in zip(x_ticks, x_scale(np.array(x_ticks)), strict=True):
        parts.append(
            f'<text class="tick x" x="{x:.1f}" y="{bottom + 16}">{tick_label(value, x_ticks)}</text>'
        )
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text class="tick title" x="{right}" y="{HEIGHT - 5}">{escape(x_title)}</text>')
    return parts


def tick_label(value: float, ticks: list[float]) -> str:
    """A tick's number: `20k`, `3e-4`, or with as many decimals as tell the ticks apart."""
    if value == 0:
        return "0"
    largest = max(abs(tick) for tick in ticks)
    if largest >= 10_000:
        return short(value)
    if largest < 0.01:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.6g}"


def _path(x: Array, y: Array, x_scale: Scale, y_scale: Scale, classes: str) -> str:
    points = zip(x_scale(x), y_scale(y), strict=True)
    return f'<polyline class="{classes}" points="{" ".join(f"{px:.1f},{py:.1f}" for px, py in points)}"/>'


def _dots(series: Series, x_scale: Scale, y_scale: Scale) -> str:
    points = zip(x_scale(series.x), y_scale(series.y), strict=True)
    circles = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in points)
    return f'<g class="dots s{series.colour}">{circles}</g>'
