"""What a run and its report say of skipped updates: where they are many, and which of them a guard skipped
that divided the sums over its window by all steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hlat.checkpoint.reader import open_checkpoint
from hlat.cli import main
from hlat.observe.skipped import OftenSkipped, often_lines, often_skipped, stretch, wrong_skips
from hlat.train.guard import RewindGuard, SkipGuard, StopGuard

RECIPE = """
run: {name: small, steps: 200, seed: 3}
model: {layers: 1, hidden: 16, heads: 2, kv_heads: 1, ffn: 32, vocab: 257, max_seq_len: 16}
data: {sources: [{path: text}], tokenizer: bytes, micro_batch: 2, global_batch: 2, holdout: 0}
precision: {compute: fp32}
optim: {name: adamw, lr: 1e-4}
schedule: {name: constant}
guard: {name: skip, window: 6, sigma: 3, patience: 100}
checkpoint: {every: 50, keep: 10, async: false}
log: {every: 20}
compile: false
"""


def misjudge(guard: SkipGuard, loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """`SkipGuard.__call__` as it was while it divided by all steps."""
    now, state = torch.stack([loss, norm]).detach().float(), guard.state()
    finite, seen = torch.isfinite(now).all(), state["seen"].clone()
    filled, count = torch.arange(guard.window) < seen, seen.clamp(min=1)
    mean = (state["history"] * filled).sum(1) / count
    variance = ((state["history"] - mean[:, None]).square() * filled).sum(1) / count
    far = (now > mean + guard.sigma * variance.sqrt().clamp(min=1e-6)).any() & (seen >= guard.window // 2)
    keep = finite & ~far
    slot = torch.arange(guard.window) == seen % guard.window
    state["history"].copy_(torch.where(slot & finite, now[:, None], state["history"]))
    state["seen"].add_(finite.float())
    state["skips_in_a_row"].copy_(torch.where(keep, 0.0, state["skips_in_a_row"] + 1))
    return keep


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A document all rows of which are the same, so that losses change smoothly, and a cache."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("abcdefghijklmnop" * 420)  # less than an epoch is read
    return folder


@pytest.fixture
def place(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(text / "cache"))
    monkeypatch.setattr("hlat.train.metrics.peak_flops", lambda *args: None)  # measured at each start
    monkeypatch.setattr("hlat.train.describe.sample", lambda *args: "")
    (tmp_path / "text").symlink_to(text / "text")
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path


def train(*overrides: str) -> int:
    return main(["train", "small.yaml", *overrides])


def skipped(folder: Path = Path("runs/small"), name: str = "metrics.jsonl") -> list[int]:
    rows = map(json.loads, (folder / name).read_text().splitlines())
    return [row["step"] for row in rows if row["kind"] == "train" and row["skipped"]]


def report(folder: str = "runs/small") -> str:
    assert main(["report", folder, "--out", "report.html"]) == 0
    return Path("report.html").read_text()


def test_a_run_goes_on_from_what_such_a_guard_has_left(place: Path, monkeypatch: Any, capsys: Any) -> None:
    """It ends by itself after 36 windows; its state then continues without a skip, and run and report say
    what was done to it.
    """
    with monkeypatch.context() as patch:
        patch.setattr(SkipGuard, "__call__", misjudge)
        assert train() == 3
    lost = skipped()
    assert 30 < lost[0] <= 60 and len(lost) >= 100 and open_checkpoint("runs/small").step >= 150
    before = [step for step in lost if step <= open_checkpoint("runs/small").step]
    assert before and float(open_checkpoint("runs/small").read("guard/seen")) > 12
    message = f"skipped {len(lost)} updates, from step {lost[0]} on, for no reason"
    assert message in report()
    capsys.readouterr()
    assert train() == 0
    out = capsys.readouterr().out
    assert out.count(message) == 1 and "for no reason" in out
    assert f"{len(lost) - len(before)} of them lie after this checkpoint and are done again" in out
    assert skipped() == before, "not one more"
    assert int(open_checkpoint("runs/small").read("run/updates")) == 200 - len(before)
    assert f"skipped {len(before)} updates, from step {lost[0]} on" in report()
    assert train() == 0
    assert f"skipped {len(before)} updates" in capsys.readouterr().out


def test_what_is_not_known_is_said(place: Path, monkeypatch: Any, capsys: Any) -> None:
    """Where the rows are gone the checkpoint still says that such a guard counted."""
    with monkeypatch.context() as patch:
        patch.setattr(SkipGuard, "__call__", misjudge)
        assert train("run.stop_at_step=100") == 0
    count = len(skipped())
    assert count
    Path("runs/small/metrics.jsonl").unlink()
    capsys.readouterr()
    assert train("run.stop_at_step=101") == 0
    assert f"{count} updates were skipped whose metrics are not in" in capsys.readouterr().out
    assert train("run.stop_at_step=102") == 0
    assert "skipped" not in capsys.readouterr().out.replace("skipped   ", "")


@pytest.mark.parametrize("guard", [StopGuard, RewindGuard])
def test_stop_and_rewind_go_on(place: Path, monkeypatch: Any, capsys: Any, guard: Any) -> None:
    """What stopped a run at a good step, or took good steps back, is found out too."""
    name = "stop" if guard is StopGuard else "rewind"
    options = (f"guard={{name: {name}, window: 6, sigma: 3}}",)
    with monkeypatch.context() as patch:
        patch.setattr(SkipGuard, "__call__", misjudge)
        assert train(*options) == 3
    lost = skipped() + (skipped(Path("runs/small/logs"), "rewound.jsonl") if name == "rewind" else [])
    assert lost and f"from step {min(lost)} on" in report()
    capsys.readouterr()
    assert train(*options) == 0
    assert "all of them lie after this checkpoint and are done again" in capsys.readouterr().out
    assert skipped() == []


def test_a_run_without_it_says_nothing(place: Path, capsys: Any) -> None:
    assert train("run.stop_at_step=150") == 0
    assert train() == 0
    assert "no reason" not in capsys.readouterr().out and skipped() == []
    page = report()
    assert "no reason" not in page and "Anomalies" not in page


def rows(folder: Path, count: int, bad: dict[int, tuple[float | None, bool]], first: int = 1) -> Path:
    """A run folder with even steps but for `bad`: step -> (loss, skipped)."""
    make, folder = np.random.default_rng(0), folder / "run"
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, count + 1):
            loss, gone = bad.get(step, (3 + 0.01 * make.standard_normal(), False))
            row = {"kind": "train", "step": step, "loss": loss, "grad_norm": 1.0, "skipped": gone}
            if step >= first:
                file.write(json.dumps(row) + "\n")
    return folder


def test_only_what_was_skipped_in_error_counts(tmp_path: Path) -> None:
    """A spike and a value that is not finite are bad steps under any rule, and nothing is said of steps
    before whose window rows are missing.
    """
    guard = {"name": "skip", "window": 16, "sigma": 6.0}
    bad = {900: (3.0, True), 950: (9.0, True), 960: (None, True), 1000: (2.99, True)}
    (tmp_path / "a").mkdir()
    folder = rows(tmp_path / "a", 1000, bad)
    assert wrong_skips(folder, guard).steps == [900, 1000]
    assert "2 updates, from step 900 on" in wrong_skips(folder, guard).text()
    assert "1 of them lie after" in wrong_skips(folder, guard).text(950)
    assert wrong_skips(folder, {**guard, "sigma": 0}) == wrong_skips(folder, {"name": "none"})
    assert wrong_skips(tmp_path, guard).text() == ""
    (tmp_path / "b").mkdir()
    assert wrong_skips(rows(tmp_path / "b", 1000, bad, first=890), guard).steps == [1000]
    (tmp_path / "c").mkdir()
    early = rows(tmp_path / "c", 1000, {10: (3.0, True), 16: (3.0, True)})
    assert wrong_skips(early, guard).steps == [], "within the first window the rule was right"


def feed(count: int, gone: Any, every: int = 10) -> list[str]:
    watch = OftenSkipped(every)
    told = [watch.row({"kind": "train", "step": s, "skipped": gone(s)}) for s in range(1, count + 1)]
    return [line for line in [*told, watch.end()] if line]


def test_many_skips_get_a_line_and_not_one_for_ever() -> None:
    assert feed(1000, lambda s: s % 100 == 0) == [], "one in a hundred"
    (line,) = feed(1000, lambda s: 400 < s <= 403)
    assert line.startswith("3 updates were skipped in steps 401 to 500 (3.0 %)")
    assert len(feed(200_000, lambda s: s % 2 == 0)) <= 11
    assert len(feed(200_000, lambda s: s % 200 < 5)) <= 11, "on and off"
    assert feed(150, lambda s: s > 140)[0].startswith("10 updates were skipped in steps 101 to 150 (20.0 %)")
    assert (stretch(1), stretch(7), stretch(250)) == (100, 105, 250)


def test_a_report_lists_where_they_were_many() -> None:
    steps = np.arange(1, 2051.0)
    gone = np.where((steps > 390) & (steps <= 610) | (steps > 2040), 1.0, 0.0)
    assert often_skipped(steps, gone, 10) == [(301, 700, 220), (2001, 2050, 10)]
    assert list(often_lines([(301, 700, 220)])) == ["220 updates were skipped in steps 301 to 700 (55.0 %)"]
    lines = list(often_lines([(i * 200 + 1, i * 200 + 100, 2) for i in range(9)]))
    assert len(lines) == 6 and lines[-1].startswith("8 more in 4 later stretches")
    assert often_skipped(np.empty(0), np.empty(0)) == []


def test_a_line_on_the_console_and_in_the_report(place: Path, monkeypatch: Any, capsys: Any) -> None:
    judge = SkipGuard._is_spike

    def strict(self: SkipGuard, now: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        return judge(self, now, seen) | (now[0] > 0) & (seen == self.window)

    monkeypatch.setattr(SkipGuard, "_is_spike", strict)
    assert train("run.steps=200", "log.every=10") == 0
    text = f"{len([s for s in skipped() if s <= 100])} updates were skipped in steps 1 to 100"
    assert capsys.readouterr().out.count("updates were skipped in steps 1 to 100") == 1
    assert (
        text.split(" ")[0] != "0" and f"{len(skipped())} updates were skipped in steps 1 to 200" in report()
    )
