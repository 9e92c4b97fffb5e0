"""`hlat eval` and `hlat compare`: the harness's schema, notes on what was cut, one line for each error."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hlat.cli import main

pytest.importorskip("lm_eval")

MODEL = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "vocab": 260, "max_seq_len": 64}


def write_checkpoint(path: Path, seed: int = 0, vocab: int = 260, **meta: Any) -> Path:
    """A checkpoint of random weights with the tokenizer of bytes."""
    from hlat.checkpoint.store import write_weights
    from hlat.model.config import ModelConfig
    from hlat.model.init import init_tensor, parameter_shapes

    config = ModelConfig(**{**MODEL, "vocab": vocab})  # type: ignore[arg-type]
    tensors = [
        (f"model/{name}", init_tensor(config, name, torch.Size(shape), seed) * 5)
        for name, shape in parameter_shapes(config).items()
    ]
    recipe = {"data": {"tokenizer": "bytes", "holdout": 0.02}}
    write_weights(
        path, iter(tensors), {"model": config.model_dump(), "step": 7, "recipe": recipe, **meta}, []
    )
    return path


def write_task(folder: Path, rows: list[dict[str, Any]], name: str = "mine", **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "num_fewshot": 0,
        **config,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(content))
    return folder


QUESTIONS = [{"context": f"number {i} is", "choices": [f"{i}", "nothing"], "answer": i % 2} for i in range(6)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    write_checkpoint(tmp_path / "model")
    return tmp_path


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    # Bars of libraries that another test imported before they could be told not to draw them are no lines.
    lines = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line and "0%|" not in line and "[00:" not in line
    ]
    assert len(lines) == 1 and lines[0].startswith("hlat: error: ")
    return lines[0]


def test_results_have_the_schema_of_the_harness(place: Path, capfd: pytest.CaptureFixture) -> None:
    write_task(place / "tasks", QUESTIONS)
    write_task(place / "tasks", QUESTIONS, "more")
    common = ["--tasks", "mine,more", "--include-path", "tasks"]
    assert main(["eval", "model", *common, "--limit", "4", "--json", "r.json", "--samples"]) == 0
    text, errors = capfd.readouterr()
    assert "git" not in errors, "the working directory is no repository, and need not be one"
    assert "mine" in text and "acc_norm" in text and "chance" in text
    found = json.loads(Path("r.json").read_text())
    values = found["results"]["mine"]
    answers = [sample["acc"] for sample in found["samples"]["mine"]]
    assert values["acc,none"] == sum(answers) / 4 and values["acc_stderr,none"] >= 0
    assert found["n-samples"]["mine"] == {"original": 6, "effective": 4}
    assert {"configs", "versions", "n-shot", "higher_is_better", "config", "git_hash", "date"} <= found.keys()
    assert found["config"]["model"] == "hlat" and found["hlat"]["chance"]["mine"]["acc"] == 0.5
    assert main(["eval", "model", *common, "--json", "plain.json"]) == 0
    assert "samples" not in json.loads(Path("plain.json").read_text())


def test_what_is_too_long_is_cut_and_counted(place: Path, capsys: pytest.CaptureFixture) -> None:
    long = [{"context": "x" * 100, "choices": ["a" * 10, "b" * 90], "answer": 0}]
    write_task(place / "tasks", long + QUESTIONS)
    generation = {"until": ["\n"], "max_gen_toks": 500}
    options = {"output_type": "generate_until", "doc_to_target": "context", "generation_kwargs": generation}
    metric = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    write_task(place / "tasks", QUESTIONS[:1], "long-text", doc_to_choice=None, metric_list=metric, **options)
    names = ["--tasks", "mine", "long-text", "--include-path", "tasks", "--json", "r.json"]
    assert main(["eval", "model", *names]) == 0
    notes = json.loads(Path("r.json").read_text())["hlat"]["notes"]
    # One token is never fed: 65 of the texts' tokens fit. The harness puts a space before each choice.
    assert notes == {"truncated": 2, "dropped_tokens": (111 - 65) + (191 - 65), "shortened": 1}
    text = capsys.readouterr().out
    assert "note: 2 requests longer than the model's context lost tokens on the left" in text


def test_compare(place: Path, capsys: pytest.CaptureFixture) -> None:
    write_checkpoint(place / "other", seed=1)
    names = ["--tasks", "hlat-function", "hlat-bits-code", "--limit", "8"]
    out = ["--html", "c.html", "--markdown", "c.md", "--json", "c.json"]
    assert main(["compare", "model", "other", "model", *names, *out]) == 0
    found = json.loads(Path("c.json").read_text())
    assert len(found["models"]) == len(set(found["models"])) == 3
    for row in found["rows"]:
        assert row["values"][0] == row["values"][2] and row["differences"][1]["p"] == 1.0
        assert row["differences"][0]["questions"] == 8
    assert Path("c.md").read_text().startswith("| task | metric |")
    assert "<table>" in Path("c.html").read_text() and "McNemar" in capsys.readouterr().out


def test_published_values(place: Path, capsys: pytest.CaptureFixture) -> None:
    write_task(place / "tasks", QUESTIONS, "boolq")
    common = ["--include-path", "tasks", "--reference"]
    assert main(["eval", "model", "--tasks", "boolq", *common]) == 0
    text = capsys.readouterr().out
    assert "OpenLLaMA 7Bv2" in text and "72  OpenLLaMA README" in text and "Llama 2, arXiv" in text


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nowhere", "--tasks", "hlat-cloze"], "nowhere: no such checkpoint"),
        (["model", "--tasks", "hlat-clze"], "unknown task 'hlat-clze'; did you mean 'hlat-cloze'?"),
        (["model", "--tasks", "hlat-cloze", "--limit", "0"], "--limit: 0 is out of range"),
        (
            ["model", "--tasks", "hlat-cloze", "--include-path", "gone"],
            "--include-path: no such folder: 'gone'",
        ),
        (["model", "--tasks", "hlat-cloze", "--tp", "2"], "1 process cannot be divided into replicas"),
        (["model", "--tasks", "hlat-cloze", "--html", "x"], "add --all-checkpoints"),
        (["model", "--tasks", "hlat-cloze", "--all-checkpoints"], "no complete checkpoint here"),
        (["model", "--tasks", "hlat-cloze", "--device", "warp"], "device 'warp' cannot be used"),
        (["model", "--tasks", "hlat-cloze", "--tokenizer", "gone"], "no tokenizer at 'gone'"),
        (["model", "--tasks", "empty", "--include-path", "tasks"], "task 'empty'"),
        (["model", "--tasks", "runs-code", "--include-path", "tasks"], "add --allow-code-execution"),
        (["model", "--tasks", "unknown-option", "--include-path", "tasks"], "'num_beams' is not supported"),
    ],
)
def test_errors(place: Path, capsys: pytest.CaptureFixture, arguments: list[str], part: str) -> None:
    write_task(place / "tasks", [], "empty")
    write_task(place / "tasks", QUESTIONS, "runs-code", unsafe_code=True)
    options = {
        "output_type": "generate_until",
        "doc_to_target": "context",
        "generation_kwargs": {"num_beams": 2},
    }
    metric = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    write_task(place / "tasks", QUESTIONS, "unknown-option", metric_list=metric, **options)
    assert part in refused(capsys, "eval", *arguments)


@pytest.mark.parametrize(
    "words", ["eval nothing", "compare nothing neither --markdown m.md", "compare nothing neither"]
)
def test_where_to_write_is_checked_before_anything_is_read(
    place: Path, capsys: pytest.CaptureFixture, words: str
) -> None:
    command = [*words.split(), "--tasks", "hlat-cloze"]
    assert "--json none/r.json: there is no folder none;" in refused(
        capsys, *command, "--json", "none/r.json"
    )
    assert f"--json {place}: is a folder" in refused(capsys, *command, "--json", str(place))
    if words.startswith("compare"):
        assert "--html none/r.html: there is" in refused(capsys, *command, "--html", "none/r.html")


def test_a_tokenizer_of_another_model(place: Path, capsys: pytest.CaptureFixture) -> None:
    write_checkpoint(place / "small", vocab=200)
    line = refused(capsys, "eval", "small", "--tasks", "hlat-cloze")
    assert "the tokenizer has 257 ids, the model's embedding 200 rows" in line and "--tokenizer PATH" in line


def test_without_the_harness(
    place: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "lm_eval":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    line = refused(capsys, "eval", "model", "--tasks", "hlat-cloze")
    assert "needs the package 'lm-eval'" in line and "pip install 'hlat[eval]'" in line


def test_the_command_of_the_harness(
    place: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hlat.evaluate.harness import main as command

    write_task(place / "tasks", QUESTIONS)
    arguments = "lm_eval --model hlat --model_args pretrained=model --include_path tasks --tasks mine"
    monkeypatch.setattr("sys.argv", [*arguments.split(), "--output_path", "out"])
    command()
    assert main(["eval", "model", "--tasks", "mine", "--include-path", "tasks", "--json", "r.json"]) == 0
    (file,) = Path("out").rglob("results_*.json")
    theirs, ours = (json.loads(path.read_text())["results"]["mine"] for path in (file, Path("r.json")))
    assert theirs["acc,none"] == ours["acc,none"] and theirs["acc_norm,none"] == ours["acc_norm,none"]


def diverged(source: Path, target: Path) -> Path:
    """The checkpoint with a NaN in the last norm."""
    from hlat.checkpoint.store import open_checkpoint, write_weights

    stored = open_checkpoint(source)
    tensors = {name: stored.read(name).clone() for name in stored.names()}
    tensors["model/norm.weight"][0] = float("nan")
    write_weights(target, iter(tensors.items()), stored.meta, [])
    return target


GENERATION = {
    "output_type": "generate_until",
    "doc_to_choice": None,
    "doc_to_target": "context",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def test_a_model_that_is_not_finite_has_no_figure(place: Path, capsys: pytest.CaptureFixture) -> None:
    diverged(place / "model", place / "bad")
    write_task(place / "tasks", QUESTIONS)
    write_task(place / "tasks", QUESTIONS, "text", generation_kwargs={"max_gen_toks": 4}, **GENERATION)
    bits = [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}]
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_target": "context", "metric_list": bits}
    write_task(place / "tasks", QUESTIONS, "bits", doc_to_choice=None, doc_to_text="", **rolling)
    (place / "tasks" / "all.yaml").write_text(
        json.dumps({"group": "all", "task": ["mine"], "aggregate_metric_list": [{"metric": "acc"}]})
    )
    common = ["--tasks", "all", "text", "bits", "--include-path", "tasks"]
    assert main(["eval", "bad", *common, "--json", "r.json", "--samples"]) == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith(
        "hlat: error: no task has a figure: the model's logits are not"
    )
    rows = [
        line.split()[2:]
        for line in said.out.splitlines()
        if line.split()[:1] in (["mine"], ["text"], ["bits"])
    ]
    assert len(rows) == 4 and all(set(row) <= {"-", "0.5000", "8.0000"} and row[0] == "-" for row in rows)
    for task in ("mine", "text", "bits"):
        assert f"note: {task}: no figure: the model's logits are not finite for 6 of 6 questions" in said.out
    assert "note: all: no figure: mine has no figure" in said.out
    found = json.loads(Path("r.json").read_text(), parse_constant=pytest.fail)
    figures = {**found["results"], **found.get("groups", {})}
    values = [
        v for task in figures.values() for key, v in task.items() if "," in key and not isinstance(v, str)
    ]
    assert len(values) >= 5 and set(values) == {None}
    assert found["samples"]["mine"][0]["resps"][0][0] == [None, False]

    assert main(["compare", "model", "bad", *common, "--json", "c.json", "--markdown", "c.md"]) == 0
    rows = json.loads(Path("c.json").read_text())["rows"]
    assert len(rows) >= 4 and all(row["differences"][0]["p"] is None for row in rows)
    assert all(row["values"][1]["value"] is None for row in rows)
    assert "*" not in Path("c.md").read_text().split("±")[0]
    told = "bad: mine: no figure: the model's logits are not finite for 6 of 6 questions"
    assert f"{told}\n" in Path("c.md").read_text() and f"{told}\n" in capsys.readouterr().out
    assert told in json.loads(Path("c.json").read_text())["notes"][0]


def harness_command(monkeypatch: pytest.MonkeyPatch, model: str, task: str, **options: Any) -> int:
    """Exit code of `hlat-lm-eval`, without the harness's own tasks, which take seconds to list."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from hlat.evaluate.harness import main as command

    def ask() -> None:
        manager = TaskManager(include_path="tasks", include_defaults=False)
        named = {"model": "hlat", "model_args": f"pretrained={model}", "tasks": [task], **options}
        lm_eval.simple_evaluate(task_manager=manager, bootstrap_iters=0, **named)

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", ask)
    try:
        command()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def test_the_command_of_the_harness_says_what_was_cut_or_is_wrong(
    place: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverged(place / "model", place / "bad")
    write_task(place / "tasks", QUESTIONS)
    write_task(place / "tasks", QUESTIONS[:1], "text", generation_kwargs={"max_gen_toks": 99}, **GENERATION)
    assert harness_command(monkeypatch, "bad", "mine") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("hlat-lm-eval: error: the model's logits are not finite for 12 of 12 requests;")
    assert harness_command(monkeypatch, "model", "text", apply_chat_template=True) == 2
    assert "error: the model's tokenizer has no chat template;" in capsys.readouterr().err.splitlines()[-1]
    assert harness_command(monkeypatch, "model", "text", gen_kwargs="top_k=-1") == 2
    assert "top_k -1 is out of range" in capsys.readouterr().err.splitlines()[-1]
    assert harness_command(monkeypatch, "model", "text", system_instruction="be brief") == 0
    said = capsys.readouterr().err
    assert "note: 1 tasks wanted more new tokens than fit" in said
    assert "note: text: 1 generations ended at the end of the model's context" in said


def test_draws_follow_the_harness(place: Path) -> None:
    """A temperature alone is a wish to sample; the same seed gives the same texts, another one others."""
    same = [{"context": "again", "choices": [], "answer": 0}] * 8
    warm = {"temperature": 1.0, "max_gen_toks": None, "top_k": None}
    write_task(place / "tasks", same, "text", generation_kwargs=warm, **GENERATION)
    runs = []
    for number in range(2):
        names = ["--tasks", "text", "--include-path", "tasks", "--json", f"{number}.json", "--samples"]
        assert main(["eval", "model", *names]) == 0
        found = json.loads(Path(f"{number}.json").read_text())
        runs.append([sample["resps"][0][0] for sample in found["samples"]["text"]])
    assert runs[0] == runs[1] and len(set(runs[0])) == 8
    assert found["hlat"]["notes"] == {"shortened": 1}


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_chat_templates(place: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["convert", "to-hf", "model", "hf"]) == 0
    config = json.loads(Path("hf/tokenizer_config.json").read_text())
    Path("hf/tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    write_task(
        place / "tasks", QUESTIONS, num_fewshot=1, fewshot_split="test", fewshot_config={"sampler": "first_n"}
    )
    common = ["eval", "hf", "--tasks", "mine", "--include-path", "tasks", "--json", "r.json", "--samples"]
    assert main([*common, "--limit", "2"]) == 0
    assert (
        "note: the tokenizer has a chat template, and the questions were asked without"
        in capsys.readouterr().out
    )

    def prompt() -> str:
        found = json.loads(Path("r.json").read_text())
        return str(found["samples"]["mine"][1]["arguments"][0][0])

    plain = prompt()
    assert "<user>" not in plain
    assert main([*common, "--limit", "2", "--apply-chat-template"]) == 0
    assert "chat template" not in capsys.readouterr().out
    turns = prompt()
    assert turns.startswith("<user>number 0 is<assistant>") and turns.endswith("<user>number 1 is<assistant>")
    options = ["--apply-chat-template", "--no-fewshot-as-multiturn", "--system-instruction", "be brief"]
    assert main([*common, "--limit", "2", *options]) == 0
    assert prompt().count("<user>") == 1 and "be brief" not in prompt()
    assert "prompts are without their system message" in capsys.readouterr().out
    line = refused(capsys, *common, "--fewshot-as-multiturn")
    assert (
        "--fewshot-as-multiturn: there are turns only in a chat template; add --apply-chat-template" in line
    )
    line = refused(capsys, "eval", "model", *common[2:], "--apply-chat-template")
    assert "the model's tokenizer has no chat template" in line


@pytest.mark.slow
def test_a_chat_template_by_the_command_of_the_harness(
    place: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hlat.evaluate.harness import main as command

    assert main(["convert", "to-hf", "model", "hf"]) == 0
    Path("hf/chat_template.jinja").write_text(TEMPLATE)
    write_task(place / "tasks", QUESTIONS)
    arguments = "lm_eval --model hlat --model_args pretrained=hf --include_path tasks --tasks mine --limit 2"
    more = ["--apply_chat_template", "--output_path", "out", "--log_samples"]
    monkeypatch.setattr("sys.argv", [*arguments.split(), *more])
    command()
    (file,) = Path("out").rglob("samples_mine*.jsonl")
    first = json.loads(file.read_text().splitlines()[0])
    assert first["arguments"]["gen_args_0"]["arg_0"] == "<user>number 0 is<assistant>"
