"""Every tiny recipe trains two steps, as it is shipped but for its length; so do those that finetune it.

The GLUE recipes read a folder laid out as their data sets on the hub, with a small model in place of theirs.
"""

import json
from pathlib import Path

import pytest

from hlat.cli import main
from hlat.recipe import load
from hlat.recipe_io import shipped_recipes

TINY = sorted(name for name in shipped_recipes() if name.rpartition("/")[2].startswith("tiny"))
FINETUNE = sorted(name for name in shipped_recipes() if name.startswith("finetune/"))
GLUE = {
    "sst2": (["validation"], {"sentence": "a film"}, 2),
    "qnli": (["validation"], {"question": "who?", "sentence": "he"}, 2),
    "mnli": (
        ["validation_matched", "validation_mismatched"],
        {"premise": "it rains", "hypothesis": "it is wet"},
        3,
    ),
    "cola": (["validation"], {"sentence": "they is"}, 2),
}
OFFLINE = ("finetune/packages", "finetune/sft", "finetune/chat")
FIGURES = ("accuracy", "bits_per_byte", "bits_per_byte")
SMALL = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 64, "vocab": 257}


def short(folder: Path) -> list[str]:
    return ["run.steps=2", "schedule.warmup_steps=1", "eval.rows=8", f"run.dir={folder}"]


def rows(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `tiny`, two steps long."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    assert main(["train", "tiny", *short(folder)]) == 0
    return folder


def test_all_are_here() -> None:
    assert TINY == ["tiny"]
    assert set(FINETUNE) == {*OFFLINE, *(f"finetune/{name}" for name in GLUE)}


def test_two_steps(pretrained: Path) -> None:
    assert len(rows(pretrained, "train")) == 2
    assert 0 < rows(pretrained, "eval")[-1]["bits_per_byte"] < 20


@pytest.mark.parametrize(("name", "figure"), [*zip(OFFLINE, FIGURES, strict=True)])
def test_two_steps_of_finetuning(pretrained: Path, tmp_path: Path, name: str, figure: str) -> None:
    folder = tmp_path / "run"
    assert main(["train", name, f"init.from={pretrained}", *short(folder)]) == 0
    assert len(rows(folder, "train")) == 2
    assert figure in rows(folder, "eval")[-1]


@pytest.mark.parametrize("name", GLUE)
def test_two_steps_of_glue(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    splits, fields, labels = GLUE[name]
    hub = tmp_path / "glue"
    (hub / name).mkdir(parents=True)
    files = {part: f"{name}/{part}.jsonl" for part in ("train", *splits)}
    listed = [{"split": part, "path": path} for part, path in files.items()]
    (hub / "README.md").write_text(
        f"---\nconfigs:\n- {json.dumps({'config_name': name, 'data_files': listed})}\n---\n"
    )
    for part, path in files.items():
        count = 80 if part == "train" else 10
        content = [{**{key: f"{text} {i}" for key, text in fields.items()}} for i in range(count)]
        content = [{**row, "label": i % labels, "idx": i} for i, row in enumerate(content)]
        (hub / path).write_text("\n".join(map(json.dumps, content)))
    folder = tmp_path / "run"
    shipped = load(f"finetune/{name}").data.examples
    assert shipped is not None
    overrides = [
        f"data.examples.dataset={shipped.dataset}".replace("nyu-mll/glue", str(hub)),
        f"data.examples.eval_dataset={shipped.eval_dataset}".replace("nyu-mll/glue", str(hub)),
        *(f"model.{key}={value}" for key, value in SMALL.items()),
        "init.from=null",
        "data.tokenizer=bytes",
        "data.micro_batch=8",
        "data.global_batch=8",
        "compile=false",
    ]
    whole = [option for option in short(folder) if not option.startswith("eval.rows")]
    assert main(["train", f"finetune/{name}", *overrides, *whole]) == 0, capsys.readouterr().err
    assert len(rows(folder, "train")) == 2
    assert rows(folder, "eval")[-1]["held_out_examples"] == 10 * len(splits), "the whole validation set"
