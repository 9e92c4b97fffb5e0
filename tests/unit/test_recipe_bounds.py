"""Numbers, texts and files beyond all bounds: one line that names the key, at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from hlat.cli import main
from hlat.errors import UserError
from hlat.evaluate.running import Selection, check_tasks
from hlat.observe.torchelastic import leave_message, shown_here, told
from hlat.recipe import load
from hlat.recipe_yaml import parse_yaml

WHOLE = (
    *("model.layers", "model.hidden", "model.heads", "model.kv_heads", "model.ffn", "model.vocab"),
    *("model.max_seq_len", "model.classes", "run.steps", "run.stop_at_step", "run.seed", "data.seq_len"),
    *("data.micro_batch", "data.global_batch", "parallel.tp", "parallel.pp", "parallel.dp"),
    *("parallel.stages", "parallel.timeout", "parallel.first_timeout", "parallel.verify_every"),
    *("schedule.warmup_steps", "schedule.horizon_steps", "checkpoint.every", "checkpoint.keep"),
    *("checkpoint.permanent_every_tokens", "eval.every", "eval.rows", "eval.limit", "log.every"),
)
REAL = (
    *("run.max_hours", "checkpoint.patience", "checkpoint.grace", "optim.lr", "optim.weight_decay"),
    *("optim.clip_norm", "schedule.floor", "data.holdout", "model.norm_eps", "model.rope_theta"),
    *("model.init_std",),
)


@pytest.mark.parametrize("key", [*WHOLE, *REAL])
def test_no_number_is_beyond_all_bounds(key: str) -> None:
    values = ["1e300", "-1", ".inf", "-.inf", ".nan", "1e400", "true", "'7'", "[1]", f"1{'0' * 5000}"]
    values += ["1e19", "1.5"] if key in WHOLE else []
    for value in values:
        with pytest.raises(UserError) as caught:
            load("tiny", [f"{key}={value}"])
        # `auto` may stand in the place of a number, so what is told may be of the kinds it takes
        assert key in caught.value.line() and len(caught.value.line()) < 400, (value, caught.value.line())


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 3000,
        "a: " + "{a: " * 3000 + "1" + "}" * 3000,
        "a: &x [1]\nb: [*x, *x]\n",
        "a: !!python/object/apply:os.system ['id']\n",
        "run: {}\nrun: {}\n",
        "[" + "1," * 40_000 + "]",
        "a: \0\n",
        "a: 1\n---\nb: 1\n",
    ],
)
def test_no_yaml_is_too_much(text: str) -> None:
    with pytest.raises(UserError):
        parse_yaml(text, "r.yaml")


def test_a_file_too_large(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"#" * (10 << 20))
    with pytest.raises(UserError, match="is larger than 1 MiB, so it is not a recipe"):
        load(tmp_path / "r.yaml")


def test_tasks_are_looked_up_before_anything_is_built(tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    words = ["train", "tiny", "eval.tasks=[hlat-offlin]", "data.sources=[{path: nowhere}]"]
    assert main(words) == 2  # the data, which is not there, is not even looked for
    said = capsys.readouterr().err
    assert "eval.tasks: unknown task 'hlat-offlin'; did you mean 'hlat-offline'?" in said
    with pytest.raises(UserError, match=r"--tasks: no such task file: './none.yaml'"):
        check_tasks(Selection(("./none.yaml",)))
    assert main(["eval", "nowhere", "--tasks", ",", "--limit", "1"]) == 2
    assert "--tasks: no task is named" in capsys.readouterr().err


def test_torchrun_is_told_the_reason(tmp_path: Path) -> None:
    errors = pytest.importorskip("torch.distributed.elastic.multiprocessing.errors")
    file = tmp_path / "error.json"
    environ = {"TORCHELASTIC_ERROR_FILE": str(file), "TORCHELASTIC_RUN_ID": "1", "RANK": "0"}
    leave_message("hlat: error: x: no such recipe", environ)
    failure = errors.ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    report = str(errors.ChildFailedError("hlat", {0: failure}))
    assert "traceback : hlat: error: x: no such recipe" in report and "To enable traceback" not in report
    assert told("a line", environ) == "a line (torchrun's report of it follows)"
    assert shown_here(environ) and not shown_here({**environ, "RANK": "1"})
    supervised = {**environ, "HLAT_HEARTBEATS": "x"}
    assert told("a line", supervised) == "a line" == told("a line", {})
