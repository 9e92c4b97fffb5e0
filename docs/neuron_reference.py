"""Write the table of Neuron variables and compiler flags in docs/trainium.md from the code.

    python docs/neuron_reference.py

The part between the two markers is replaced; tests/unit/test_neuron_profile.py fails when it is not current.
"""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).with_name("trainium.md")
BEGIN, END = "<!-- table: begin (python docs/neuron_reference.py) -->", "<!-- table: end -->"


def cell(text: str) -> str:
    """Text that cannot break a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def tables() -> str:
    """What HLAT sets, what it leaves alone, and the packages it is written for, in Markdown."""
    from hlat.backend.neuron.release import FORWARD, NATIVE, PRIMARY
    from hlat.backend.neuron.table import LEFT_ALONE, TABLE

    lines = ["### What HLAT sets", ""]
    lines += ["| name | value | when | for | releases | why | source |", "|---|---|---|---|---|---|---|"]
    for row in TABLE:
        shown = f"`{row.shown}`" if " " not in row.shown else row.shown
        parts = (
            f"`{row.name}`",
            shown,
            row.when,
            ", ".join(row.platforms),
            row.releases,
            row.why,
            row.source,
        )
        lines.append(f"| {' | '.join(cell(part) for part in parts)} |")
    lines += ["", "The flags together are `NEURON_CC_FLAGS`.", "", "### What HLAT leaves alone", ""]
    lines += ["| name | why |", "|---|---|"]
    for names, why in LEFT_ALONE:
        quoted = ", ".join(f"`{name.strip()}`" for name in names.split(","))
        lines.append(f"| {quoted} | {cell(why)} |")
    releases = (PRIMARY, FORWARD, NATIVE)
    lines += ["", "### Packages", ""]
    lines.append(f"| package | {' | '.join(f'{item.name} ({item.role})' for item in releases)} |")
    lines.append("|---|---|---|---|")
    pythons = (f"3.{item.python[0]} to 3.{item.python[1]}" for item in releases)
    lines.append(f"| Python | {' | '.join(pythons)} |")
    versions = [{**item.packages, **item.system} for item in releases]
    for name in dict.fromkeys(name for item in versions for name in item):
        lines.append(f"| `{name}` | {' | '.join(item.get(name, '–') for item in versions)} |")
    return "\n".join([*lines, ""])


def page(text: str) -> str:
    """The page with its tables made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
