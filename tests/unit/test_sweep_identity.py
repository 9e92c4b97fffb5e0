"""A sweep shows results of what it was asked for, and nothing else: whatever lies in its folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hlat import cli
from hlat.commands import sweep
from hlat.storage.fingerprint import FILE, read_stretches
from hlat.supervise.child import Children
from hlat.train import fingerprint

RECIPE = """
run: {name: tune, steps: 2, seed: 1}
init: {from: a}
data:
  examples: {path: rows.jsonl}
  seq_len: 16
  micro_batch: 2
  global_batch: 2
  holdout: 0.3
schedule: {name: constant}
checkpoint: {every: 1}
eval: {rows: 4}
compile: false
"""
BASE = """
run: {name: base, steps: 2, seed: 1}
model: {layers: 1, hidden: 16, heads: 2, kv_heads: 2, ffn: 32, vocab: 257, max_seq_len: 16}
data: {sources: [{path: rows.jsonl, text_field: prompt}], seq_len: 16, micro_batch: 2, global_batch: 2}
optim: {lr: 1e-2}
compile: false
"""
GRID = ["optim.lr=[1e-3, 2e-3]"]


def write_rows(path: Path, word: str) -> None:
    rows = [{"prompt": f"{word} number {i}", "completion": f" {word * 2}"} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))


def in_this_process(self: Children, words: list[str], log: Path) -> tuple[int, str]:
    """A run without a process of its own, which would take seconds."""
    return cli.main(words[1:]), ""


def quickly(patch: pytest.MonkeyPatch) -> None:
    """Leave out what a run and a sweep show at their end, which takes longer than they do."""
    patch.setattr("hlat.train.describe.sample", lambda *arguments: "")
    patch.setattr("hlat.observe.sweep.draw_png", lambda *arguments: False)


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    """Two models, and a finished sweep from the first, in `s`."""
    folder = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(Children, "run", in_this_process)
        quickly(patch)
        write_rows(folder / "rows.jsonl", "some")
        write_rows(folder / "others.jsonl", "other")
        (folder / "base.yaml").write_text(BASE)
        (folder / "tune.yaml").write_text(RECIPE)
        assert cli.main(["train", "base.yaml", "run.dir=a"]) == 0
        assert cli.main(["train", "base.yaml", "run.dir=b", "run.seed=2"]) == 0
        assert cli.main(["sweep", "tune.yaml", *GRID, "--out", "s"]) == 0
    return folder


@pytest.fixture
def again(swept, tmp_path, monkeypatch, capsys) -> Callable[..., tuple[int, str, int]]:
    """Sweep once more, in a copy of that folder: exit code, what is said, and how many runs there were."""
    shutil.copytree(swept, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    quickly(monkeypatch)
    runs: list[str] = []

    def run(self: Children, words: list[str], log: Path) -> tuple[int, str]:
        runs.append(log.stem)
        return in_this_process(self, words, log)

    monkeypatch.setattr(Children, "run", run)

    def start(*words: str, grid: list[str] = GRID, out: str = "s") -> tuple[int, str, int]:
        runs.clear()
        code = cli.main(["sweep", "tune.yaml", *grid, *words, "--out", out])
        said = capsys.readouterr()
        return code, said.out + said.err, len(runs)

    return start


def files(folder: str = "s") -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def losses() -> list[float]:
    trials, _ = sweep.plan("tune.yaml", GRID, 1, Path("s"))
    sweep.look_at_contents(trials)
    return [found.loss for trial in trials if (found := sweep.result(trial))]


def edit(path: str) -> Callable[[], None]:
    return lambda: Path(path).write_text(Path(path).read_text().replace("number 7", "number 8", 1))


def skip() -> None:
    path = Path("tune.yaml")
    path.write_text(path.read_text().replace("holdout: 0.3", "holdout: 0.3\n  skip: [[1, 1]]"))


def train_on() -> None:
    assert cli.main(["train", "base.yaml", "run.dir=a", "run.steps=3", "schedule.horizon_steps=2"]) == 0


@pytest.mark.parametrize(
    ("words", "change", "said"),
    [
        (["init.from=b"], None, "init.from: the weights differ"),
        ([], train_on, "init.from: the weights differ"),
        (["data.examples.path=others.jsonl"], None, "data.examples: the content differs"),
        ([], edit("rows.jsonl"), "data.examples: the content differs"),
        (["data.examples.eval_path=others.jsonl"], None, "data.examples.eval was not given"),
        (["eval.rows=8"], None, "eval.rows was 4 and is 8"),
        ([], skip, "data.skip leaves out other data"),
        (["data.tokenizer=train"], None, "data.tokenizer"),
        (["data.holdout=0.5"], None, "data.holdout was 0.3 and is 0.5"),
    ],
)
def test_results_of_something_else_are_refused_and_kept(again, words, change, said, tmp_path) -> None:
    if words == ["data.tokenizer=train"]:
        from tokenizers import Tokenizer, models

        vocabulary = {"</s>": 0, **{chr(i): i for i in range(1, 257)}}
        Tokenizer(models.BPE(vocabulary, [])).save("tokenizer.json")
        words = ["data.tokenizer=tokenizer.json"]
    if change is not None:
        change()
    before = files()
    code, line, runs = again(*words)
    assert (code, runs) == (2, 0) and said in line
    assert "--out s: 2 of 2 runs there are of something else than asked for: lr-0.001" in line
    assert files() == before


def test_the_same_thing_elsewhere_is_the_same(again) -> None:
    first = losses()
    shutil.move("a", "trained")
    shutil.move("rows.jsonl", "moved.jsonl")
    shutil.move("s", "t")
    words = ["init.from=trained", "data.examples.path=moved.jsonl", "log.every=1", "checkpoint.every=2"]
    code, said, runs = again(*words, out="t")
    assert (code, runs) == (0, 0) and all(f"{loss:.4f}" in said for loss in first)


@pytest.mark.slow
def test_other_values_of_the_grid_and_a_folder_of_its_own(again) -> None:
    first = losses()
    code, said, runs = again(grid=["optim.lr=[1e-3, 3e-3]"])
    assert (code, runs) == (0, 1) and f"{first[0]:.4f}" in said
    code, said, runs = again(grid=["optim.lr=[1e-3]", "init.from=[a, b]"], out="u")
    assert (code, runs) == (0, 2)
    found = [row["loss"] for path in Path("u").glob("*/metrics.jsonl") for row in evals(path)]
    assert first[0] in found and len(set(found)) == 2


def evals(path: Path) -> list[dict]:
    """Held-out rows, but for who wrote them."""
    rows = map(json.loads, path.read_text().splitlines())
    return [{**row, "by": ""} for row in rows if row["kind"] == "eval"]


def test_a_run_that_was_cut_off_goes_on_from_its_own_model_only(again) -> None:
    first = losses()
    trial, _ = sweep.plan("tune.yaml", GRID, 1, Path("s"))[0]
    shutil.rmtree(trial.folder)
    assert cli.main(["train", "tune.yaml", *trial.overrides, "run.stop_at_step=1"]) == 0
    before = files()
    code, said, runs = again("init.from=b", grid=["optim.lr=[1e-3]"])
    assert (code, runs) == (2, 0) and "1 of 1 runs" in said and "init.from: the weights differ" in said
    assert files() == before
    code, said, runs = again()
    assert (code, runs) == (0, 1) and losses() == first


def test_runs_of_an_older_version_are_not_taken_for_the_same(again) -> None:
    for path in Path("s").glob(f"*/{FILE}"):
        path.unlink()
    code, said, runs = again()
    assert (code, runs) == (
        2,
        0,
    ) and "what it stands for is not known: fingerprint.json is damaged or missing" in said


@pytest.mark.slow
def test_what_trained_nothing_is_in_nobodys_way(again) -> None:
    (path,) = Path("s").glob("lr-0.001_*/")
    shutil.rmtree(path / "checkpoints")
    assert again("init.from=b", grid=["optim.lr=[1e-3]"])[::2] == (2, 0)  # figures are kept, too
    (path / "metrics.jsonl").unlink()
    assert again("init.from=b", grid=["optim.lr=[1e-3]"])[::2] == (0, 1)


@pytest.mark.slow
def test_weights_that_change_while_the_sweep_runs(again, monkeypatch) -> None:
    shutil.rmtree("s")

    def run(self: Children, words: list[str], log: Path) -> tuple[int, str]:
        done = in_this_process(self, words, log)
        if len(list(Path("s").glob("*/metrics.jsonl"))) == 1:
            train_on()  # the base is still being trained
        return done

    monkeypatch.setattr(Children, "run", run)
    code, said, _ = again()
    assert code == 1 and "something changed while the sweep ran: init.from: the weights differ" in said
    assert len(list(Path("s").glob("*/metrics.jsonl"))) == 2
    assert len(losses()) == 1  # one began from the old weights, one from the new


@pytest.mark.slow
def test_copies_in_a_store_are_not_gone_on_from(again) -> None:
    remote = f"checkpoint.remote=file://{Path('store').absolute()}"
    grid = ["optim.lr=[1e-3]"]
    assert again(remote, "run.stop_at_step=1", grid=grid, out="r")[::2] == (0, 1)
    shutil.rmtree("r")
    code, said, runs = again(remote, "init.from=b", grid=grid, out="r")
    assert (code, runs) == (2, 0) and "init.from: the weights differ" in said and not Path("r").exists()
    code, said, runs = again(remote, grid=grid, out="r")
    assert (code, runs) == (0, 1), said
    (path,) = Path("r").glob("*/")
    assert [stretch.after for stretch in read_stretches(path)] == [0, 1]
    assert evals(path / "metrics.jsonl") == evals(next(Path("s").glob("lr-0.001_*/metrics.jsonl")))


def test_other_versions_are_shown_and_not_compared(again, monkeypatch) -> None:
    assert "were made" not in again()[1]
    monkeypatch.setattr(fingerprint, "versions", lambda: {"hlat": "99.0", "torch": "88.0"})
    code, said, runs = again(grid=["optim.lr=[1e-3]"])
    assert (code, runs) == (0, 0)
    assert "note: 1 of 1 runs were made, in part or whole, by hlat " in said
