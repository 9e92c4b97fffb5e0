"""`hlat train` started again: damaged checkpoints, finished and longer runs, data that holds the run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hlat.checkpoint.reader import open_checkpoint
from hlat.cli import main
from hlat.storage.remote import Remote
from hlat.train import loop
from tests.unit import test_train_command as small

place, train = small.place, small.train  # `place` is a fixture
ROOT = Path("runs/small/checkpoints")


def step(number: int) -> Path:
    return ROOT / f"step-{number:08d}"


def flip(folder: Path, name: str = "data-00000.safetensors") -> None:
    """Change one byte."""
    data = bytearray((folder / name).read_bytes())
    data[-9] ^= 1
    (folder / name).write_bytes(data)


def cut(folder: Path, name: str = "data-00000.safetensors") -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


def kept() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path("runs/small").rglob("*") if path.is_file()}


def steps_done() -> list[int]:
    return [row["step"] for row in small.rows("runs/small")]


@pytest.mark.parametrize(
    "damages",
    [(flip, cut), (cut, cut), (flip, flip), (flip, lambda folder: (folder / "complete.json").unlink())],
)
def test_a_run_without_one_good_checkpoint_does_not_start_over(
    place: Path, capsys, damages: tuple[Callable[[Path], None], ...]
) -> None:
    assert train("run.stop_at_step=4") == 0
    for damage, number in zip(damages, (4, 2), strict=True):
        damage(step(number))
    before = kept()
    capsys.readouterr()
    assert train() == 2
    out, error = capsys.readouterr()
    assert kept() == before
    assert (
        error.count("hlat: error:") == 1 and "none can be used (step 2: " in error and "; step 4: " in error
    )
    assert str(ROOT.absolute()) in error and "another run.dir" in error and "step 1/" not in out
    assert out.count("no other one here can be used") == out.count("skipped checkpoint")
    shutil.move(ROOT, "elsewhere")
    assert train() == 0, "moved away, the run starts anew"


def test_one_damaged_checkpoint_is_one_too_many(place: Path) -> None:
    assert train("run.stop_at_step=2") == 0
    cut(step(2))
    assert train() == 2 and steps_done() == [1, 2]


def test_what_a_kill_in_the_first_save_leaves_is_no_checkpoint(place: Path) -> None:
    assert train("run.dir=whole") == 0
    assert train("run.stop_at_step=2") == 0
    (step(2) / "complete.json").unlink()
    step(2).with_name(".step-00000004.partial-1-elsewhere").mkdir()
    assert train() == 0
    assert steps_done() == [1, 2, 3, 4, 5, 6] and small.same_state("runs/small", "whole")


@pytest.mark.parametrize("how", ["gone", "empty"])
def test_rows_of_a_run_without_checkpoints_are_put_aside(place: Path, capsys, how: str) -> None:
    """Several times in a row, each under a number of its own, with what they stand for."""
    logs, former = Path("runs/small/logs"), {}
    assert train("run.stop_at_step=2") == 0
    for number in (1, 2):
        former |= {
            f"{name}-aside-{number}{end}": Path(f"runs/small/{name}{end}").read_bytes()
            for name, end in (("metrics", ".jsonl"), ("fingerprint", ".json"))
        }
        shutil.rmtree(ROOT)
        if how == "empty":
            ROOT.mkdir()
        Path("runs/small/environment.json").unlink()  # its number of starts names nothing here
        capsys.readouterr()
        assert train(f"run.stop_at_step={3 - number}", f"run.resume={('auto', 'never')[number - 1]}") == 0
        out = capsys.readouterr().out
        assert "there are rows up to step 2 and no checkpoint: the run " in out
        assert (
            f"starts over at step 0, and the rows are kept in {logs.absolute()}/metrics-aside-{number}" in out
        )
        assert {name: (logs / name).read_bytes() for name in former} == former
        assert steps_done() == list(range(1, 4 - number))


def test_rows_before_the_first_save_are_put_aside(place: Path, monkeypatch, capsys) -> None:
    """Killed before there was a checkpoint, the run starts over by right."""

    def fail(run: object) -> object:
        if run.step == 3:  # type: ignore[attr-defined]
            raise RuntimeError("planted")
        return step_of(run)

    step_of = loop.train_step
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", fail)
        with pytest.raises(RuntimeError):
            train("checkpoint.every=6", "log.every=1")
    assert steps_done() == [1, 2, 3]
    before = Path("runs/small/metrics.jsonl").read_bytes()
    assert train() == 0 and steps_done() == [1, 2, 3, 4, 5, 6]
    assert Path("runs/small/logs/metrics-aside-1.jsonl").read_bytes() == before


def test_the_last_evaluation_of_a_stopped_run_has_a_row(place: Path) -> None:
    """One, however often the start is repeated that has nothing left to do; the run itself is the same."""
    assert train("run.stop_at_step=2", "eval.every=0") == 0
    assert train("run.stop_at_step=2", "eval.every=0") == 0
    assert [row["step"] for row in small.rows("runs/small", "eval")] == [2]
    lines = Path("runs/small/metrics.jsonl").read_text().splitlines()
    Path("runs/small/metrics.jsonl").write_text("\n".join(x for x in lines if '"eval"' not in x) + "\n")
    assert train("run.stop_at_step=2", "eval.every=0") == 0, "as an earlier version left it"
    assert train("eval.every=0") == train("eval.every=0") == 0
    assert [row["step"] for row in small.rows("runs/small", "eval")] == [6], "as if it had not been stopped"
    assert train("run.dir=whole", "eval.every=0") == 0 and small.same_state("runs/small", "whole")
    assert steps_done() == [1, 2, 3, 4, 5, 6]


def test_missing_rows_are_told(place: Path, capsys) -> None:
    assert train("run.stop_at_step=2") == 0
    Path("runs/small/metrics.jsonl").unlink()
    capsys.readouterr()
    assert train("run.stop_at_step=4") == 0
    assert "has no rows: those up to step 2, where the run goes on, are missing" in capsys.readouterr().out
    assert steps_done() == [3, 4]


def test_the_store_has_none_either(place: Path, capsys) -> None:
    store = f"checkpoint.remote=file://{place}/store"
    assert train(store, "run.stop_at_step=2") == 0
    names = {path.partition("/")[0] for path in Remote(f"file://{place}/store/small").files()}
    flip(step(2))
    for name in names:
        flip(place / "store" / "small" / name)
    assert train(store) == 2
    assert "none can be used (step 2: " in capsys.readouterr().err
    shutil.rmtree("runs")
    assert train(store) == 2
    assert "there are checkpoints in the store and none can be used" in capsys.readouterr().err


def test_nxds_files_without_their_mark_are_counted(place: Path, capsys) -> None:
    assert train("run.stop_at_step=2") == 0
    for number in (1, 2):
        Path(f"runs/small/nxd-checkpoints/step-{number:09d}").mkdir(parents=True)
    shutil.rmtree(step(2))
    assert train() == 2
    assert (
        "nxd-checkpoints: there are checkpoints and none can be used (step-000000001: it"
        in capsys.readouterr().err
    )
    shutil.rmtree("runs/small/nxd-checkpoints/step-000000001")
    assert train() == 0 and steps_done() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["data-00000.safetensors", "index.json", "meta.json", "complete.json"])
def test_generate_and_to_hf_say_which_checkpoint_they_take(place: Path, capsys, name: str) -> None:
    assert train("run.stop_at_step=4") == 0
    assert main(["convert", "to-hf", "runs/small", "whole"]) == 0
    assert "wrote whole from step 4 (runs/small/checkpoints/step-00000004): " in capsys.readouterr().out
    (step(4) / name).unlink() if name.startswith("data") else (step(4) / name).write_text("{")
    assert main(["generate", "runs/small", "--prompt", "alpha", "--max-new-tokens", "3"]) == 0
    told = f"skipped checkpoint {step(4)}: {name}"
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith(f"hlat: warning: {told}") and line.endswith("; using step 2 instead")
    assert main(["convert", "to-hf", "runs/small", "other"]) == 0
    out, error = capsys.readouterr()
    assert (
        f"warning: {told}" in error and "using step 2 instead" in error and "wrote other from step 2 (" in out
    )


def test_every_save_is_told_and_uploaded_however_fast_they_come(place: Path, monkeypatch, capsys) -> None:
    """The next save begins before anybody has asked whether the one before is complete."""
    from hlat.checkpoint import layout
    from hlat.train.remote import RemoteSaves

    write, sent = layout.write_tensors, []

    def slowly(*args, **kwargs):
        time.sleep(0.3)
        return write(*args, **kwargs)

    monkeypatch.setattr(layout, "write_tensors", slowly)
    submit = RemoteSaves.submit
    monkeypatch.setattr(RemoteSaves, "submit", lambda self, n: (sent.append(n), submit(self, n)))
    assert train("checkpoint.every=1", f"checkpoint.remote=file://{place}/store") == 0
    out = capsys.readouterr().out
    saved = [int(line.split()[-2]) for line in out.splitlines() if "checkpoint of step" in line]
    assert saved == sent == [1, 2, 3, 4, 5, 6], out


def test_a_finished_run_says_so_and_how_to_go_on(place: Path, capsys) -> None:
    assert train("run.stop_at_step=4") == 0 and train("run.stop_at_step=4") == 0
    assert "run.stop_at_step=4 is reached, nothing is left to train" in " ".join(
        capsys.readouterr().out.split()
    )
    assert train() == 0
    assert "nothing is left to train" not in capsys.readouterr().out
    assert train() == 0
    line = (
        "all 6 steps are done, nothing is left to train; to train on: run.steps=MORE schedule.horizon_steps=6"
    )
    assert line in " ".join(capsys.readouterr().out.split())
    assert train("run.steps=9", "schedule.horizon_steps=6") == 0
    assert steps_done() == list(range(1, 10))


def test_a_longer_run_is_told_what_to_write(place: Path, capsys) -> None:
    assert train() == 0
    assert train("run.steps=9") == 2
    error = capsys.readouterr().err
    assert "run.steps is 9 now and the schedule ends with it; in the saved run it ended at 6" in error
    assert "add schedule.horizon_steps=6 to train on" in error and "another run.name or run.dir" in error
    assert train("schedule.horizon_steps=9") == 2
    assert "schedule.horizon_steps was 6 in the saved run and is 9 now" in capsys.readouterr().err


def rates() -> list[float]:
    return [row["lr"] for row in small.rows("runs/small")]


def test_a_run_in_its_stable_phase_can_be_made_longer(place: Path, capsys) -> None:
    """What was trained so far had the same rates: the run is the one that was meant to be longer at first."""
    wsd = ("schedule.name=wsd", "schedule.decay_fraction=0.5", "schedule.warmup_steps=1")
    assert train("run.name=whole", "run.steps=12", *wsd) == 0
    assert train(*wsd, "run.stop_at_step=3") == 0
    assert train(*wsd, "run.steps=12", "run.stop_at_step=5") == 0
    assert train(*wsd, "run.steps=12") == 0
    whole = [row["lr"] for row in small.rows("runs/whole")]
    assert rates() == whole and len(set(whole)) > 3
    assert [row["loss"] for row in small.rows("runs/small")] == [
        row["loss"] for row in small.rows("runs/whole")
    ]
    capsys.readouterr()
    assert train(*wsd, "run.steps=24") == 2  # it has begun to decay
    error = capsys.readouterr().err
    assert "in the saved run it ended at 12, so that step 8 and later ones had other rates" in error


def test_a_constant_run_goes_on_and_may_begin_to_decay(place: Path, capsys) -> None:
    assert train("schedule.name=constant") == 0
    capsys.readouterr()
    assert train("schedule.name=constant") == 0
    assert "to train on: run.steps=MORE" in (said := " ".join(capsys.readouterr().out.split()))
    assert "schedule.horizon_steps" not in said
    assert train("schedule.name=constant", "run.steps=8") == 0
    assert train("schedule.name=wsd", "run.steps=12") == 0  # the last fifth of 12 steps lies ahead
    assert len(set(rates()[2:9])) == 1 and rates()[-1] < rates()[2] and steps_done() == list(range(1, 13))
    assert train("schedule.name=constant", "run.steps=14") == 2
    assert "schedule.name was 'wsd' in the saved run and is 'constant' now" in capsys.readouterr().err


@pytest.mark.parametrize("place_of_run", ["run.dir=text/runs/small", "run.dir=text"])
def test_data_that_holds_the_run_folder_is_refused(place: Path, capsys, place_of_run: str) -> None:
    assert train(place_of_run) == 2
    error = capsys.readouterr().err
    assert error.count("hlat: error:") == 1 and "data.sources[0].path: 'text' holds the run folder" in error
    assert "set run.dir to one outside it" in error and not Path("text/runs").exists()


def test_data_that_holds_the_cache_is_refused(place: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "text" / "cache"))
    assert train() == 2
    assert "'text' holds HLAT's cache" in capsys.readouterr().err


def test_a_hidden_run_folder_in_the_data_continues(place: Path) -> None:
    assert train("run.dir=text/.runs/small", "run.stop_at_step=3") == 0
    assert train("run.dir=text/.runs/small") == 0
    assert open_checkpoint("text/.runs/small").step == 6
