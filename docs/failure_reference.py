"""Write the failure table in docs/operations/node-checks.md from the code.

    python docs/failure_reference.py

The part between the two markers is replaced; tests/unit/test_classify.py fails when it is not current.
"""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).parent / "operations" / "node-checks.md"
BEGIN, END = "<!-- table: begin (python docs/failure_reference.py) -->", "<!-- table: end -->"
SEEN = {
    "kernel": "kernel",
    "text": "ranks' logs",
    "both": "kernel, ranks' logs",
    "flag": "supervisor",
}


def cell(text: str) -> str:
    """Text that cannot break a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def table() -> str:
    """Every rule in the order in which they are tried, then what decides nothing, in Markdown."""
    from hlat.supervise.failure_rows import XID_APPLICATION, XID_BENIGN, XID_HARDWARE
    from hlat.supervise.failure_table import BENIGN, TABLE

    lines = ["| | rule | seen in | what it means | kind | action | source |", "|---|---|---|---|---|---|---|"]
    for number, row in enumerate(TABLE, 1):
        seen = SEEN.get(row.where) or f"status {', '.join(map(str, row.codes))}"
        if row.kind == "node" and row.action != "stop" and row.where in ("text", "both"):
            seen += ", if confirmed"
        parts = (str(number), f"`{row.name}`", seen, row.meaning, row.kind, row.action, row.source)
        lines.append(f"| {' | '.join(cell(part) for part in parts)} |")
    lines += ["", "Lines that decide nothing, whatever else is there:", ""]
    lines += [f"- `{pattern}`: {why}" for pattern, why in BENIGN]
    for what, codes in (
        ("`xid-hardware`", XID_HARDWARE),
        ("`cuda-access`", XID_APPLICATION),
        ("nothing", XID_BENIGN),
    ):
        lines += ["", f"Xids of {what}: {', '.join(map(str, codes))}."]
    return "\n".join([*lines, ""])


def page(text: str) -> str:
    """The page with its table made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
