"""Seconds and sizes that the pages on operations name are those of the code."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from hlat.backend.cluster import JOIN_SECONDS
from hlat.commands import supervise
from hlat.observe import failures, heartbeat, spot, stopping, watchdog
from hlat.recipe_sections import CheckpointSection, ParallelSection
from hlat.supervise import (
    bounded,
    classify,
    cleaner,
    cluster_check,
    exits,
    logs,
    measure,
    node,
    supervisor,
    watch,
)
from hlat.train import loop

DOCS = Path(__file__).resolve().parents[2] / "docs"
MIB = 1 << 20
WORDS = {0.25: "four times a second", 0.5: "twice a second", 2.0: "two seconds", 4.0: "four seconds",
         1.0: "one second", 300.0: "five minutes"}  # fmt: skip
TIMES = ParallelSection()
SAID = {
    "failures.md": [
        f"Every {WORDS[watchdog.INTERVAL]} each rank posts a sign of life",
        f"has given no sign for {watchdog.GONE:.0f} seconds",
        f"the store does not answer for {watchdog.NO_STORE:.0f} seconds",
        f"still waiting for it {failures.CLEANUP_SECONDS + failures.LINGER_SECONDS:.0f} seconds later",
        f"{loop._MARGIN:.0f} seconds above `parallel.timeout`",
        f"processes wait {JOIN_SECONDS:.0f} seconds for each other",
        f"`parallel.timeout` seconds (default {TIMES.timeout:.0f})",
        f"`parallel.first_timeout` (default {TIMES.first_timeout:.0f})",
    ],
    "operations.md": [
        f"Each rank writes {WORDS[heartbeat.INTERVAL]}",
        f"The search begins {watch.SEARCH} seconds before a limit",
        f"the first {bounded.HEAD // MIB} MiB and at least the last {bounded.TAIL // MIB} MiB are kept,"
        f" {(bounded.HEAD + 2 * bounded.TAIL) // MIB} MiB at most",
        f"if more than {logs._BEHIND // MIB} MiB wait",
        f"{logs._SHOWN // MIB} MiB at once and {logs._SHOWN_PER_SECOND // 1000} kB a second",
        f"copied {WORDS[logs._POLL]}",
        f"The pause before a restart is {WORDS[supervisor.Budget().pause]}, doubled",
        f"at most {WORDS[supervisor._LONGEST_PAUSE]}",
        f"`parallel.first_timeout` ({TIMES.first_timeout:.0f} s)",
        f"`parallel.timeout` ({TIMES.timeout:.0f} s)",
    ],
    "operations/node-checks.md": [
        f"get {WORDS[node.PATIENCE]} each",
        f"clock is more than {cluster_check._SKEW:.0f} seconds off the median",
        f"Lines are cut at {classify._LONGEST_LINE:,} characters",
        f"The all-reduce is of {measure.ELEMENTS * 4 // MIB} MiB",
    ],
    "operations/signals.md": [
        f"metadata service every {spot.INTERVAL:.0f} seconds",
        f"a fifth more, and {stopping._SLACK:.0f} seconds",
        f"Say in `checkpoint.grace` how long it is (default {CheckpointSection().grace:.0f})",
    ],
}


@pytest.mark.parametrize(("page", "sentence"), [(page, text) for page, many in SAID.items() for text in many])
def test_a_number_on_the_page_is_the_codes(page: str, sentence: str) -> None:
    assert sentence in " ".join((DOCS / page).read_text().split())


def test_other_numbers_in_words() -> None:
    assert cleaner.LONGEST_LINE == MIB  # "Of a line without an end the first mebibyte is kept"
    assert node._RECENT == 3600  # "in the last hour"


def test_defaults_of_the_options() -> None:
    parser = argparse.ArgumentParser()
    supervise.configure(parser)
    args = parser.parse_args(["recipe"])
    text = (DOCS / "operations.md").read_text()
    rows = {line.split("`")[1].split()[0]: line for line in text.splitlines() if line.startswith("| `--")}
    for name in ("max_restarts", "max_fruitless", "hang_seconds", "meet_seconds"):
        assert f"({getattr(args, name):.0f})" in rows[f"--{name.replace('_', '-')}"]
    assert "(300)" in rows["--grace"]


def test_kubernetes_gives_up_after_the_codes_that_do_not_start_again() -> None:
    final = [code for code in exits.ORDER if not exits.starts_again(code) and code != exits.INTERRUPTED]
    job = (DOCS.parent / "launch/templates/job.yaml").read_text()
    assert f"values: {sorted(final)}" in job
    said = (DOCS / "operations/launch.md").read_text().partition("Exit codes ")[2]
    assert said.startswith(f"{', '.join(map(str, sorted(final)[:-1]))} and {max(final)} of any pod")


def test_the_exit_codes_are_on_the_page() -> None:
    text = (DOCS / "operations.md").read_text()
    table = text.partition("| exit code | meaning |")[2].partition("\n\n")[0]
    codes = [
        int(line.split("|")[1]) for line in table.splitlines() if line.startswith("| ") and "---" not in line
    ]
    assert codes == sorted({exits.DONE, exits.REQUEUE, *exits.ORDER})
