"""Results files say how they were made, and pages quote the figures that stand in them."""

from __future__ import annotations

import json
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from docs_pages import PAGES, ROOT, number, prose, table, tables, text

RESULTS = sorted((ROOT / "docs" / "results").glob("*.json"))


def result(name: str) -> dict[str, Any]:
    """A results file of docs/results."""
    return json.loads((ROOT / "docs" / "results" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.name)
def test_a_results_file_can_be_made_again(file: Path) -> None:
    """Command, date, versions, seeds; and a page that quotes it with the date."""
    content = result(file.name)
    words = content["command"].split()
    assert words[0] == "python" and words[-2:] == ["--out", file.name]
    script = (ROOT / words[1]).read_text(encoding="utf-8")
    assert [word for word in words if word.startswith("--") and f'"{word}"' not in script] == []
    assert datetime.fromisoformat(content["date"]).tzinfo is not None
    assert {"torch", "python"} <= set(content["versions"])
    assert content["seeds"] and all(isinstance(seed, int) for seed in content["seeds"].values())
    assert any(f"docs/results/{file.name}" in text(page) for page in PAGES)


def test_there_are_results() -> None:
    assert len(RESULTS) >= 3
    named = {name for page in PAGES for name in re.findall(r"docs/results/([\w.-]+\.json)", text(page))}
    assert named == {file.name for file in RESULTS}


def test_figures_of_long_runs() -> None:
    runs = result("soak.json")["runs"]
    rows = table("docs/benchmarks.md", "", "ranks", "loss at the end").rows
    assert {row[0].strip("`") for row in rows} == set(runs)
    for row in rows:
        run = runs[row[0].strip("`")]
        marks = run["marks"]
        assert int(row[1]) == run["ranks"]
        assert row[2] == f"{marks[-1]['loss']:.3f}" and int(row[3]) == marks[-1]["skipped"], row[0]
        assert row[4:7] == [f"{mark['memory'] / 1e6:.1f}" for mark in marks], row[0]
        assert row[7] == ", ".join(str(mark["files"]) for mark in marks), row[0]


def test_figures_of_killed_runs() -> None:
    content = result("soak-kills.json")
    run = content["runs"]["adamw"]
    page = prose(ROOT / "docs" / "benchmarks.md")
    told = page[page.index("`docs/results/soak-kills.json`") :].split("\n\n")[0]
    marks = run["marks"]
    assert run["faults"] == [], "rows and state are those of the undisturbed run"
    assert f"--steps {content['steps']} --kills {content['kills']}" in told
    figures = [number(word) for word in re.findall(r"(?<![\w-])[\d,.]*\d", told)]
    wanted = [round(mark["memory"] / 1e6, 1) for mark in marks] + [mark["files"] for mark in marks]
    wanted += [round(1e3 * mark["seconds"], 2) for mark in marks] + [marks[-1]["skipped"], content["steps"]]
    assert [figure for figure in wanted if figure not in figures] == []


def test_figures_of_products() -> None:
    found = {
        (r["limit"], r["dtype"], r["part"]): r["ratio"] for r in result("narrow-products.json")["results"]
    }
    limits = {"AVX2": "AVX2", "AVX-512 without `avx512_bf16`": "AVX512_CORE"}
    rows = table("docs/benchmarks.md", "CPU", "dtype").rows
    told = {
        (limits[row[0]], row[1], part): row[column]
        for row in rows
        for column, part in enumerate(("layer", "attention", "model"), 2)
    }
    assert told == {key: f"{ratio:.1f}" for key, ratio in found.items()}


def test_every_measured_table_names_its_command() -> None:
    """A section of docs/benchmarks.md with a table has a command, or a file, from which it comes."""
    page = text(ROOT / "docs" / "benchmarks.md")
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        if re.search(r"^\|---", section, re.MULTILINE):
            assert re.search(r"python tests/bench/\w+\.py|docs/results/", section), section.splitlines()[0]
    assert sum(t.page == "docs/benchmarks.md" for page in PAGES for t in tables(page)) >= 6
