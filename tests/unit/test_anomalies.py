"""Bad steps under each policy: what a run does, what it records, and that going back ends bit for bit like a
run that never saw the data.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hlat.checkpoint.reader import open_checkpoint
from hlat.cli import main
from hlat.train import loop

sys.path.insert(0, str(Path(__file__).parents[1]))

import poisoned  # noqa: F401 (registers the objective)

RECIPE = """
run: {name: small, steps: 12, seed: 3}
model: {layers: 2, hidden: 32, heads: 4, kv_heads: 2, ffn: 64, vocab: 320, max_seq_len: 32}
data: {sources: [{path: text}], tokenizer: bytes, micro_batch: 2, global_batch: 4, holdout: 0.1}
precision: {compute: fp32}
objective: {name: poisoned}
optim: {name: adamw, lr: 3e-3}
schedule: {name: clamped_cosine, warmup_steps: 2}
guard: {name: rewind, window: 4, sigma: 200}
checkpoint: {every: 2, keep: 10}
eval: {every: 4, rows: 2}
log: {every: 3}
compile: false
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short documents, no two rows of which are the same, and a cache."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "text").mkdir()
    letters = np.random.default_rng(0).choice(list("abcdefghij "), size=(40, 300))
    for number, row in enumerate(letters):
        (folder / "text" / f"{number:02}.txt").write_text("".join(row))
    return folder


@pytest.fixture
def place(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(text / "cache"))
    (tmp_path / "text").symlink_to(text / "text")
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path


def open_data() -> Any:
    from hlat.data import open_data
    from hlat.recipe import load

    return open_data(load("small.yaml"), quiet=True)


def poison(*steps: int) -> str:
    """The override that makes the second row of these data steps bad."""
    data = open_data()
    rows = [data.batches(step - 1, 4, 1)[0].targets[1].tolist() for step in steps]
    return f"objective.rows={rows}"


def train(*overrides: str) -> int:
    return main(["train", "small.yaml", *overrides])


def rows(folder: str, *kinds: str) -> list[dict]:
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    measured = ("tokens_per_second", "mfu", "step_seconds", "memory/peak_bytes", "by")
    found = [row for row in map(json.loads, lines) if row["kind"] in kinds]
    return [{k: v for k, v in row.items() if k not in measured} for row in found]


def records(folder: str = "runs/small") -> list[dict]:
    file = Path(folder, "logs", "anomalies.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def same_state(a: str, b: str) -> bool:
    one, two = open_checkpoint(a), open_checkpoint(b)
    assert one.step == two.step and one.names() == two.names()
    return all(torch.equal(one.read(name), two.read(name)) for name in one.names())


def ends_like(skip: str, bad: str, *overrides: str) -> bool:
    """Whether runs/small is, but for its records, an undisturbed run that leaves out this data."""
    assert train(f"data.skip={skip}", bad, "run.dir=whole", *overrides) == 0
    assert records("whole") == []
    kinds = ("train", "eval")
    return rows("runs/small", *kinds) == rows("whole", *kinds) and same_state("runs/small", "whole")


def test_a_bad_batch_is_taken_back_and_left_out(place: Path, capsys) -> None:
    bad = poison(6)
    assert train(bad) == 0
    assert "step 6: loss not finite, norm not finite; back to step 4, without data step 6" in (
        capsys.readouterr().out
    )
    (row,) = rows("runs/small", "anomaly")
    assert row == {
        "kind": "anomaly", "step": 5, "policy": "rewind", "bad_step": 6, "data_step": 6,
        "loss": None, "grad_norm": None, "skipped_data": [6, 6], "checkpoint": 4,
    }  # fmt: skip
    (record,) = records()
    assert (record["step"], record["policy"], record["skipped_data"]) == (6, "rewind", [6, 6])
    assert record["documents"] == open_data().locate(6)
    rewound = [json.loads(line) for line in Path("runs/small/logs/rewound.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rewound] == [5, 6] and rewound[1]["skipped"]
    assert [row["step"] for row in rows("runs/small", "train")] == list(range(1, 13))
    assert open_checkpoint("runs/small").meta["skipped_data"] == [[6, 6]]
    assert ends_like("[[6, 6]]", bad)


def test_the_documents_of_a_step_are_found(place: Path, capsys) -> None:
    bad = poison(6)
    assert train(bad) == 0
    capsys.readouterr()
    assert main(["data", "locate", "runs/small", "--step", "5"]) == 0
    assert "step 5 reads data step 5: 4 rows" in capsys.readouterr().out
    assert main(["data", "locate", "runs/small", "--step", "6", "--row", "1", "--text"]) == 0
    out = capsys.readouterr().out
    assert "step 6 reads data step 7: 1 rows" in out
    ids = open_data().batches(6, 4, 1)[0].ids[1]
    parts = open_data().tokenizer.decode(ids.tolist()).split("<")[0]
    assert parts and parts in out
    assert main(["data", "locate", "runs/small", "--data-step", "6"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("row   1")]
    recorded = [entry for entry in records()[0]["documents"] if entry["row"] == 1]
    assert len(lines) == len(recorded) and all(
        e["hash"] in text for e, text in zip(recorded, lines, strict=True)
    )
    assert main(["report", "runs/small", "--out", "report.html"]) == 0
    assert "back to step 4, without data step 6" in Path("report.html").read_text()
    for wrong, word in (
        (["runs", "--step", "1"], "not a run folder"),
        (["runs/small", "--step", "0"], "from 1"),
    ):
        assert main(["data", "locate", *wrong]) == 2
        assert word in capsys.readouterr().err


@pytest.mark.parametrize("every", [1, 100])
def test_it_may_be_noticed_late(place: Path, every: int) -> None:
    """In the first step, in the last one, and twice; whatever the window of metrics."""
    bad = poison(1, 7, 8, 14)
    options = (f"log.every={every}", "guard.rewinds=4", "checkpoint.every=4")
    assert train(bad, *options) == 0
    assert [row["skipped_data"] for row in rows("runs/small", "anomaly")] == [
        [1, 1],
        [7, 7],
        [8, 8],
        [14, 14],
    ]
    assert ends_like("[[1, 1], [7, 8], [14, 14]]", bad, *options)


def test_a_spike_is_taken_back_at_once_with_data_around_it(place: Path) -> None:
    bad = poison(8)
    options = ("objective.factor=10000.0", "guard.before=2", "guard.after=1", "guard.bad_steps=5")
    assert train(bad, *options) == 0
    (row,) = rows("runs/small", "anomaly")
    assert row["loss"] > 50 and row["skipped_data"] == [6, 9] and row["checkpoint"] == 4
    assert ends_like("[[6, 9]]", bad, *options)


def test_patience(place: Path) -> None:
    """Fewer bad steps in a row than `bad_steps` are skipped; as many are taken back, over checkpoints too."""
    bad = poison(3, 7, 8, 9)
    assert train(bad, "guard.bad_steps=3", "log.every=1") == 0
    assert [(r["policy"], r["bad_step"]) for r in rows("runs/small", "anomaly")] == [
        ("skip", 3),
        ("rewind", 9),
    ]
    assert [r["policy"] for r in records()] == ["skip", "skip", "skip", "rewind"]
    assert rows("runs/small", "anomaly")[1]["skipped_data"] == [7, 9]
    assert [row["step"] for row in rows("runs/small", "train") if row["skipped"]] == [3]
    assert train(bad, "guard.bad_steps=3", "data.skip=[[7, 9]]", "run.dir=whole") == 0
    assert same_state("runs/small", "whole")


def test_a_checkpoint_that_was_taken_back_is_not_gone_back_to(place: Path, monkeypatch) -> None:
    """Step 8 is saved within the bad steps 7 to 9, and after going back that save does not succeed."""
    from hlat.train.saves import Saves

    save = Saves.save

    def failing(self: Any, run: Any, *args: Any) -> None:
        if not (run.step == 8 and run.skips.found):
            save(self, run, *args)

    monkeypatch.setattr(Saves, "save", failing)
    bad, options = poison(7, 8, 9, 12, 13, 14), ("guard.bad_steps=3", "log.every=1", "checkpoint.async=false")
    assert train(bad, *options) == 0
    assert [row["checkpoint"] for row in rows("runs/small", "anomaly") if row["policy"] == "rewind"] == [6, 6]
    monkeypatch.setattr(Saves, "save", save)
    assert ends_like("[[7, 9], [12, 14]]", bad, *options)


def test_it_gives_up_after_so_many(place: Path, capsys) -> None:
    assert train(poison(4, 6, 8), "guard.rewinds=2") == 3
    err = capsys.readouterr().err
    assert "guard.rewinds: step 6 is bad, and the run has gone back 2 times for data within 1000 steps" in err
    assert [r["policy"] for r in records()] == ["rewind", "rewind", "stop"]
    assert train(poison(4, 6, 8), "guard.rewinds=2", "guard.within=1", "run.dir=apart") == 0


def test_it_gives_up_without_a_checkpoint(place: Path, capsys) -> None:
    assert train(poison(7, 8), "guard.bad_steps=2", "checkpoint.keep=1", "checkpoint.every=1") == 3
    assert "no checkpoint before it is left; raise checkpoint.keep" in capsys.readouterr().err


def test_skip_leaves_the_update_out(place: Path, capsys) -> None:
    assert train("guard={name: skip, window: 4, sigma: 200}", poison(6)) == 0
    (row,) = rows("runs/small", "anomaly")
    assert (row["policy"], row["step"], row["data_step"]) == ("skip", 6, 6)
    assert "step 6: loss not finite, norm not finite; update skipped" in capsys.readouterr().out
    assert [row["step"] for row in rows("runs/small", "train") if row["skipped"]] == [6]
    assert records()[0]["documents"] == open_data().locate(6)
    assert int(open_checkpoint("runs/small").read("run/updates")) == 11


def test_stop(place: Path, capsys) -> None:
    assert train("guard={name: stop, window: 4, sigma: 200}", poison(6), "log.every=1") == 3
    assert (
        "guard.name: stop: a step is bad: loss or norm not finite or far above the recent ones"
        in capsys.readouterr().err
    )
    assert [(row["policy"], row["bad_step"]) for row in rows("runs/small", "anomaly")] == [("stop", 6)]
    assert records()[0]["policy"] == "stop"
    assert open_checkpoint("runs/small").step == 4
    spike = ("run.dir=spike", "objective.factor=10000.0", "log.every=1")
    assert train("guard={name: stop, window: 4, sigma: 200}", poison(9), *spike) == 3
    assert open_checkpoint("spike").step == 8


@pytest.mark.parametrize(("policy", "code"), [("skip", 0), ("rewind", 0), ("stop", 3)])
def test_an_absurd_step_before_half_a_window_is_known(place: Path, policy: str, code: int) -> None:
    """Its update is not applied under any policy; without a guard the same one is."""
    bad, last = poison(6), ("objective.factor=1e6", "log.every=1", "eval.every=0")
    assert train(bad, *last, f"guard={{name: {policy}, window: 128, sigma: 6}}") == code
    (row,) = rows("runs/small", "anomaly")
    assert (row["policy"], row["bad_step"]) == (policy, 6) and row["loss"] > 1e4
    done = {"skip": 11, "rewind": 12, "stop": 4}[policy]
    assert int(open_checkpoint("runs/small").read("run/updates")) == done
    if policy == "skip":
        assert train(bad, *last, "guard={name: none}", "run.dir=none") == 0
        assert int(open_checkpoint("none").read("run/updates")) == 12


def test_a_stop_and_a_resume_in_the_middle(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by hand right before and right after going back, and continued each time. TensorBoard shows
    each step once.
    """
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    bad = poison(6, 9)
    for step in (6, 7, 9):
        assert train(bad, f"run.stop_at_step={step}", "log.tensorboard=true") == 0
    assert train(bad, "log.every=1", "log.tensorboard=true") == 0
    shown = accumulator.EventAccumulator("runs/small/logs/tensorboard").Reload().Scalars("train/loss")
    assert [point.step for point in shown] == list(range(1, 13))
    assert [row["skipped_data"] for row in rows("runs/small", "anomaly")] == [[6, 6], [9, 9]]
    assert ends_like("[[6, 6], [9, 9]]", bad)


def test_the_state_saved_after_a_signal_is_not_that_of_bad_steps(place: Path, monkeypatch) -> None:
    import os
    import signal

    bad, train_step = poison(6), loop.train_step

    def disturbed(run: Any) -> Any:
        if run.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(run)

    monkeypatch.setattr(loop, "train_step", disturbed)
    assert train(bad, "log.every=100") == 143
    monkeypatch.setattr(loop, "train_step", train_step)
    assert open_checkpoint("runs/small").step == 4
    assert train(bad) == 0
    assert ends_like("[[6, 6]]", bad)


@pytest.mark.parametrize(
    "method",
    [
        ("optim={name: mada, lr: 3e-3}",),
        ("method={name: mezo, lr: 1e-4}",),
        ("method={name: mezo_svrg, anchor_examples: 8, lr_anchor: 1e-4, lr_inner: 1e-5, anchor_every: 3}",),
        ("precision={compute: bf16, master: none, states: bf16, accumulate: bf16, rounding: stochastic}",),
    ],
    ids=["mada", "mezo", "mezo_svrg", "bf16"],
)
def test_every_method_goes_back(place: Path, method: tuple[str, ...]) -> None:
    bad = poison(6, 9)
    assert train(bad, *method, "guard.sigma=0") == 0
    assert len(rows("runs/small", "anomaly")) == 2
    assert ends_like("[[6, 6], [9, 9]]", bad, *method, "guard.sigma=0")


def test_what_cannot_go_back_says_so(place: Path, capsys) -> None:
    assert train("method={name: full_batch_zo, anchor_examples: 8}") == 2
    assert "reads the same rows in every step" in capsys.readouterr().err


def test_data_may_be_left_out_by_hand_where_it_is_not_read_yet(place: Path, capsys) -> None:
    plain = "objective.rows=[]"
    assert train(plain, "run.stop_at_step=6", "data.skip=[[2, 3]]") == 0
    assert open_checkpoint("runs/small").meta["next_row"] == 8 * 4
    for wrong in ("[]", "[[2, 4]]", "[[2, 3], [8, 8]]"):
        assert train(plain, f"data.skip={wrong}") == 2
        assert "the saved run has read the data up to step 8" in capsys.readouterr().err
    assert train(plain, "data.skip=[[2, 3], [9, 11]]") == 0
    assert ends_like("[[9, 11], [2, 3]]", plain)
    assert train("data.skip=[[3, 2]]") == 2
    assert "data.skip[0]: the stretch ends at step 2, before it begins at 3" in capsys.readouterr().err


def test_rows_are_taken_back_on_a_full_disk(place: Path, monkeypatch: pytest.MonkeyPatch, recwarn) -> None:
    from hlat.observe import jsonl

    file = jsonl.MetricsFile(place / "metrics.jsonl")
    for step in (1, 2, 3):
        file.row({"kind": "train", "step": step})
    file.flush()

    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(jsonl.os, "write", full)
        patch.setattr(Path, "open", lambda path, *a, o=Path.open: full() if "ab" in a else o(path, *a))
        file.row({"kind": "train", "step": 4})
        file.row({"kind": "anomaly", "policy": "rewind", "step": 3})
        file.flush()
        file.take_back(2, place / "rewound.jsonl")
        assert file.trouble is not None
    file.row({"kind": "train", "step": 3})
    file.close()
    assert [(row["kind"], row["step"]) for row in jsonl.read_rows(place / "metrics.jsonl")] == [
        ("train", 1),
        ("train", 2),
        ("anomaly", 3),
        ("train", 3),
    ]
