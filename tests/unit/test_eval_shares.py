"""HLAT's own questions are from documents that the model held out, whichever way it is asked; where that is
not known, it is said.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hlat.cli import main

pytest.importorskip("lm_eval")

from hlat.data.packed import holdout_threshold
from hlat.evaluate import offline

MODEL = {"layers": 1, "hidden": 16, "heads": 2, "kv_heads": 2, "ffn": 16, "vocab": 260, "max_seq_len": 512}
UNKNOWN = "it is not known which documents the model was trained on"


def write_checkpoint(path: Path, shares: dict[str, float]) -> None:
    """A checkpoint whose run held out these shares, by kind."""
    from hlat.checkpoint.provenance import META, Provenance
    from hlat.checkpoint.store import write_weights
    from hlat.model.config import ModelConfig
    from hlat.model.init import init_tensor, parameter_shapes

    config = ModelConfig(**MODEL)  # type: ignore[arg-type]
    tensors = [
        (f"model/{name}", init_tensor(config, name, torch.Size(shape), 0))
        for name, shape in parameter_shapes(config).items()
    ]
    recipe = {"data": {"tokenizer": "bytes", "holdout": shares.get("documents", 0.0)}}
    meta = {"model": config.model_dump(), "step": 1, "recipe": recipe}
    write_weights(path, iter(tensors), {**meta, META: Provenance(held_out=shares).to_json()}, [])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`few`, an export of it, `many`, one of which nothing is known, and one that held out nothing."""
    folder = tmp_path_factory.mktemp("models")
    for name, shares in (("few", 0.02), ("many", 0.3), ("none", 0.0)):
        write_checkpoint(folder / name, {"documents": shares, "python-stdlib": shares})
    write_checkpoint(folder / "unknown", {"documents": 0.0})
    assert main(["convert", "to-hf", str(folder / "few"), str(folder / "few-hf")]) == 0
    assert main(["convert", "to-hf", str(folder / "unknown"), str(folder / "unknown-hf")]) == 0
    return folder


@pytest.fixture
def place(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the models, and with tasks of the user's that ask HLAT's questions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    for model in models.iterdir():
        Path(model.name).symlink_to(model)
    # A group and a task of the user's that ask HLAT's questions under other names.
    Path("tasks").mkdir()
    Path("tasks/group.yaml").write_text("group: my-group\ntask: [hlat-bits-comment]\n")
    own = Path(offline.__file__).with_name("tasks")
    text = (own / "hlat-bits-comment.yaml").read_text().replace("hlat-bits-comment", "my-comments")
    Path("tasks/offline.py").write_text("from hlat.evaluate.offline import comment_bits\n")
    Path("tasks/mine.yaml").write_text(text)
    return tmp_path


def asked_share(samples: dict[str, list[dict[str, Any]]]) -> float:
    """The smallest of a few shares whose documents hold all questions of the results."""
    texts = {sample["doc"]["text"] for answers in samples.values() for sample in answers}
    for share in (0.02, 0.05):
        below = [text for mark, text in offline.held_out_documents(0.05) if mark < holdout_threshold(share)]
        if texts and texts <= {comment for text in below for comment in offline._comments(text)}:
            return share
    return 1.0


def asked(path: str = "r.json") -> float:
    return asked_share(json.loads(Path(path).read_text())["samples"])


@pytest.mark.parametrize("model", ["few", "few-hf"])
@pytest.mark.parametrize("tasks", ["hlat-bits-comment", "my-group", "my-comments", "tasks/mine.yaml"])
def test_a_run_is_asked_about_what_it_held_out(place: Path, model: str, tasks: str, capsys) -> None:
    common = ["--include-path", "tasks", "--json", "r.json", "--samples"]
    assert main(["eval", model, "--tasks", tasks, *common]) == 0
    assert asked() == 0.02 and UNKNOWN not in capsys.readouterr().out


def test_where_nothing_is_known_it_is_said_beside_the_figure(place: Path, capsys) -> None:
    for model in ("unknown", "unknown-hf"):
        common = ["--tasks", "hlat-bits-comment", "--json", "r.json", "--samples"]
        assert main(["eval", model, *common]) == 0
        note = f"note: {UNKNOWN}: hlat-bits-comment ask about 0.05 of Python's standard library"
        assert note in capsys.readouterr().out and asked() == 0.05
        assert json.loads(Path("r.json").read_text())["hlat"]["unsure"] == {"hlat-bits-comment": 0.05}


def test_models_are_compared_on_what_all_of_them_held_out(place: Path, capsys, monkeypatch) -> None:
    """A model of which nothing is known counts with the share that it is asked about alone."""
    from hlat.evaluate import job

    found: list[dict[str, Any]] = []
    real = job.run_tasks
    monkeypatch.setattr(job, "run_tasks", lambda *args: found.append(real(*args)) or found[-1])
    for models, share in (("many few unknown", 0.02), ("unknown many", 0.05)):
        assert main(["compare", *models.split(), "--tasks", "hlat-bits-comment"]) == 0
        assert {asked_share(results["samples"]) for results in found} == {share}
        text = capsys.readouterr().out
        assert text.count(UNKNOWN) == 1 and f" unknown: {UNKNOWN}" in text
        found.clear()


def test_a_model_that_held_out_nothing_is_refused(place: Path, capsys) -> None:
    assert main(["eval", "none", "--tasks", "hlat-bits-comment"]) == 2
    assert "no document of Python's standard library is held out at 0" in capsys.readouterr().err


def harness(monkeypatch: pytest.MonkeyPatch, model: str, **options: Any) -> tuple[int, dict[str, Any]]:
    """Exit code and results of `hlat-lm-eval`, without the harness's own tasks: listing them takes long."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from hlat.evaluate.harness import main as command

    results: dict[str, Any] = {}

    def ask() -> None:
        from lm_eval.config.evaluate_config import EvaluatorConfig

        config = EvaluatorConfig(model="hlat", model_args={"pretrained": model}, tasks=["x"], **options)
        metadata = config.model_args | (config.metadata or {})  # as its command makes them
        folder = str(Path(offline.__file__).with_name("tasks"))
        manager = TaskManager(include_path=folder, include_defaults=False, metadata=metadata)
        named = {"model": "hlat", "model_args": config.model_args, "tasks": ["hlat-bits-comment"]}
        results.update(lm_eval.simple_evaluate(task_manager=manager, bootstrap_iters=0, **named))

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", ask)
    try:
        command()
    except SystemExit as error:
        return int(error.code or 0), results
    return 0, results


def test_the_command_of_the_harness_asks_about_what_was_held_out(place: Path, monkeypatch, capsys) -> None:
    for model in ("few", "few-hf"):
        code, found = harness(monkeypatch, model)
        assert code == 0 and asked_share(found["samples"]) == 0.02
        assert UNKNOWN not in capsys.readouterr().err
    code, found = harness(monkeypatch, "unknown")
    assert code == 0 and asked_share(found["samples"]) == 0.05
    assert f"note: {UNKNOWN}" in capsys.readouterr().err
    code, _ = harness(monkeypatch, "none")
    assert code == 2 and "is held out at 0" in capsys.readouterr().err
    # What the user asks for counts, but not against what the weights know.
    code, _ = harness(monkeypatch, "few", metadata={"holdout": 0.05})
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        code == 2 and "the model held out 0.02 of Python's standard library, and task 'hlat-bits-comm" in line
    )


def test_weights_of_others_have_no_share(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    assert offline._known_share(str(tmp_path)) is None and offline._known_share("owner/model") is None
