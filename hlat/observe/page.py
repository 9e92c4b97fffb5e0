"""The page around a report's content, with style sheet and script inside it: nothing comes from a network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hlat.observe.markup import escape

# Two sets of eight colours that stay apart for colour-blind readers, one for each background.
_LIGHT = ("#2563eb", "#d9480f", "#0f8a5f", "#9333ea", "#b7791f", "#0e7490", "#be185d", "#475569")
_DARK = ("#6ea8fe", "#ff9a62", "#4fd1a1", "#c792f7", "#f0c35b", "#5fd0e0", "#f783ac", "#a8b3c4")


def page(title: str, body: str, charts: dict[str, Any]) -> str:
    """A complete HTML document; its script shows the values of `charts` (key -> `hover_data`) on hover."""
    data = json.dumps(charts, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{_style()}</style>
</head>
<body>
<main>
{body}
</main>
<div id="tip" hidden></div>
<script type="application/json" id="data">{data}</script>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def by_key(table: Mapping[str, Sequence[Any]], columns: Sequence[str]) -> str:
    """A table with a line for each key, and a column for each name where there are several."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns) if len(columns) > 1 else ""
    head = f"<thead><tr><th></th>{head}</tr></thead>" if head else ""
    lines = "".join(
        f"<tr><th>{escape(key)}</th>" + "".join(f"<td>{escape(plain(v))}</td>" for v in values) + "</tr>"
        for key, values in table.items()
    )
    return f'<div class="sheet"><table>{head}<tbody>{lines}</tbody></table></div>'


def plain(value: Any) -> str:
    """A value of a recipe as text."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _style() -> str:
    def colours(values: tuple[str, ...]) -> str:
        return "".join(f"--s{index}:{value};" for index, value in enumerate(values))

    series = "".join(
        f".s{index}{{--c:var(--s{index})}}body.off{index} .s{index}{{display:none}}"
        for index in range(len(_LIGHT))
    )
    return (
        f":root{{{colours(_LIGHT)}{_LIGHT_PAGE}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{colours(_DARK)}{_DARK_PAGE}}}}}{series}{_STYLE}"
    )


_LIGHT_PAGE = "--page:#f6f7f9;--card:#fff;--ink:#1b2330;--soft:#5c6675;--line:#e3e6eb;--grid:#eceef2;"
_DARK_PAGE = "--page:#0f1218;--card:#171b23;--ink:#e6e9ef;--soft:#98a2b3;--line:#2a303b;--grid:#232935;"
_STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1320px;margin:0 auto;padding:28px 20px 56px}
header{display:flex;flex-wrap:wrap;gap:4px 16px;align-items:baseline;margin-bottom:18px}
h1{font-size:24px;line-height:1.25;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:16px;margin:34px 0 10px}
header p,.note,.none{color:var(--soft);margin:0;font-size:13px}
.legend{position:sticky;top:0;z-index:2;display:flex;flex-wrap:wrap;gap:8px;padding:8px 0;
 background:var(--page)}
.legend button{all:unset;cursor:pointer;display:inline-flex;align-items:center;gap:7px;
 padding:3px 12px 3px 9px;font-size:13px;border:1px solid var(--line);border-radius:99px;
 background:var(--card);max-width:100%;overflow-wrap:anywhere}
.legend button:focus-visible{outline:2px solid var(--s0)}
.legend button[aria-pressed=false]{opacity:.45}
i{flex:none;display:inline-block;width:11px;height:11px;border-radius:3px;background:var(--c)}
.tiles{display:grid;grid-template-columns:repeat(8,1fr);gap:12px;margin-bottom:14px}
.tile,figure,.sheet{background:var(--card);border:1px solid var(--line);border-radius:10px}
.tile{padding:11px 14px}
.tile b{display:block;font-size:20px;font-weight:600;line-height:1.3;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:12.5px}
.charts{display:grid;grid-template-columns:repeat(6,minmax(0,1fr));gap:14px}
figure{grid-column:span 2}figure:nth-child(-n+2){grid-column:span 3}
figure{margin:0;padding:12px 14px 8px}
figcaption{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 12px;margin-bottom:4px}
figcaption b{font-weight:600;font-size:14.5px}
svg{display:block;width:100%;height:auto;touch-action:pan-y}
svg text{font-size:15px;fill:var(--soft);font-variant-numeric:tabular-nums}
figure:nth-child(-n+2) svg text{font-size:11.5px}
.tick.y{text-anchor:end;dominant-baseline:central}.tick.x{text-anchor:middle}.tick.title{text-anchor:end}
.grid{stroke:var(--grid)}.axis{stroke:var(--line)}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.raw{fill:none;stroke:var(--c);stroke-width:1;opacity:.22}
.dots circle{fill:var(--card);stroke:var(--c);stroke-width:1.8}
.cross{stroke:var(--soft);stroke-dasharray:3 3}.pad{fill:transparent}
.here{fill:var(--c);stroke:var(--card);stroke-width:1.5}
.sheet{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:6px 14px;border-bottom:1px solid var(--grid);vertical-align:top}
tr:last-child>*{border-bottom:0}
thead th{color:var(--soft);font-weight:500;font-size:12.5px;white-space:nowrap}
tbody th{font-weight:500;white-space:nowrap}
td{min-width:7em;overflow-wrap:anywhere}
.tight td{min-width:0;white-space:nowrap}.tight th,.tight td{padding:6px 9px}
.tight thead th{white-space:normal;vertical-align:bottom}
.tight tbody th,.tight thead th:first-child{position:sticky;left:0;background:var(--card);white-space:normal;
 overflow-wrap:anywhere;min-width:9em}
.below{margin-top:10px}
.scale{display:flex;align-items:center;gap:9px;margin:8px 2px 0;color:var(--soft);font-size:13px;
 flex-wrap:wrap}
.scale span{width:180px;height:11px;border-radius:3px}
code,pre{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{margin:0;padding:12px 14px;overflow-x:auto}
details{margin-top:10px}summary{cursor:pointer;color:var(--soft);font-size:13.5px;margin-bottom:8px}
#tip{position:fixed;z-index:3;pointer-events:none;background:var(--card);border:1px solid var(--line);
 border-radius:8px;padding:6px 10px;font-size:12.5px;box-shadow:0 4px 16px #0003;max-width:80vw;
 font-variant-numeric:tabular-nums}
#tip div{display:flex;gap:7px;align-items:center}#tip b{margin-left:auto;padding-left:12px}
@media (max-width:1100px){.tiles{grid-template-columns:repeat(4,1fr)}
 figure,figure:nth-child(-n+2){grid-column:span 3}
 svg text,figure:nth-child(-n+2) svg text{font-size:13.5px}}
@media (max-width:760px){main{padding:18px 12px 40px}h1{font-size:20px}
 .tiles{grid-template-columns:repeat(2,1fr)}
 figure,figure:nth-child(-n+2){grid-column:span 6;padding:10px 8px 6px}
 svg text,figure:nth-child(-n+2) svg text{font-size:17px}th,td{padding:6px 10px}}
@media print{.legend{position:static}figure{break-inside:avoid}}
"""

_SCRIPT = """
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const svgs = [...document.querySelectorAll("svg[data-chart]")].filter(svg => data[svg.dataset.chart]);
  const shown = colour => !document.body.classList.contains("off" + colour);
  const scale = ([low, high, start, end], value, log) => {
    const f = log ? Math.log : v => v;
    return start + (f(value) - f(low)) / (f(high) - f(low)) * (end - start);
  };
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle; else high = middle;
    }
    return x - xs[low] <= xs[high] - x ? low : high;
  };
  const number = value => {
    const size = Math.abs(value);
    if (size >= 1e12) return (value / 1e12).toPrecision(4) + "T";
    if (size >= 1e9) return (value / 1e9).toPrecision(4) + "G";
    if (size >= 1e7) return (value / 1e6).toPrecision(4) + "M";
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    return size && size < 0.01 ? value.toExponential(2) : String(+value.toPrecision(5));
  };
  const clear = () => {
    tip.hidden = true;
    document.querySelectorAll(".here").forEach(dot => dot.remove());
    svgs.forEach(svg => svg.querySelector(".cross").setAttribute("visibility", "hidden"));
  };
  const show = (event, source) => {
    clear();
    const from = data[source.dataset.chart], box = source.getBoundingClientRect();
    const unit = (event.clientX - box.left) / box.width * source.viewBox.baseVal.width;
    const [low, high, start, end] = from.x;
    const x = low + (Math.min(Math.max(unit, start), end) - start) / (end - start) * (high - low);
    const lines = [];
    for (const svg of svgs) {
      const chart = data[svg.dataset.chart], cross = svg.querySelector(".cross");
      const at = scale(chart.x, x);
      if (at < chart.x[2] || at > chart.x[3]) continue;
      cross.setAttribute("x1", at); cross.setAttribute("x2", at); cross.setAttribute("visibility", "visible");
      for (const series of chart.series.filter(series => shown(series.colour))) {
        if (x > series.x[series.x.length - 1] * 1.02) continue;
        const index = nearest(series.x, x);
        const dot = document.createElementNS("http://www.w3.org/2000/svg", "circle");
        dot.setAttribute("class", "here s" + series.colour); dot.setAttribute("r", 4);
        dot.setAttribute("cx", scale(chart.x, series.x[index]));
        dot.setAttribute("cy", scale(chart.y, series.y[index], chart.log));
        svg.append(dot);
        if (svg === source) lines.push([series, series.y[index]]);
      }
    }
    if (!lines.length) return;
    tip.replaceChildren();
    const head = document.createElement("div");
    head.textContent = from.xTitle + " " + number(x); tip.append(head);
    for (const [series, value] of lines) {
      const line = document.createElement("div"), mark = document.createElement("i");
      const text = document.createElement("b");
      line.className = "s" + series.colour; text.textContent = number(value);
      line.append(mark, series.name, text); tip.append(line);
    }
    tip.hidden = false;
    const size = tip.getBoundingClientRect();
    const right = event.clientX + 16 + size.width > innerWidth;
    tip.style.left = Math.max(4, right ? event.clientX - size.width - 16 : event.clientX + 16) + "px";
    tip.style.top = Math.min(innerHeight - size.height - 4, event.clientY + 16) + "px";
  };
  for (const svg of svgs) {
    const pad = svg.querySelector(".pad");
    for (const name of ["pointermove", "pointerdown"]) pad.addEventListener(name, event => show(event, svg));
    pad.addEventListener("pointerleave", clear);
  }
  for (const button of document.querySelectorAll(".legend button")) button.addEventListener("click", () => {
    const off = document.body.classList.toggle("off" + button.dataset.colour);
    button.setAttribute("aria-pressed", !off);
  });
})();
"""
