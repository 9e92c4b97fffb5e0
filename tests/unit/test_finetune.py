"""Finetuning through `hlat train`: what comes from the source, accuracy, resume, what is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from hlat.checkpoint.hf import to_hf
from hlat.checkpoint.store import open_checkpoint, write_weights
from hlat.cli import main
from hlat.commands.recipe_file import load
from hlat.observe.report import summary_table
from hlat.observe.runs import load_runs
from hlat.recipe_yaml import parse_yaml
from hlat.storage.fingerprint import Fingerprint
from hlat.train.fingerprint import differences
from hlat.train.initial import source_for
from hlat.train.origin import _label_remarks

MODEL = "model: {layers: 2, hidden: 32, heads: 4, kv_heads: 2, ffn: 64, vocab: 300, max_seq_len: 64}"
PRETRAIN = f"""
run: {{name: pre, steps: 2}}
{MODEL}
data:
  sources: [{{path: text}}]
  tokenizer: train:bpe-300
  seq_len: 64
  micro_batch: 4
  global_batch: 4
  holdout: 0.2
precision: {{compute: fp32}}
compile: false
"""
FINETUNE = """
run: {name: fine, steps: 2}
init: {from: PRE}
data:
  examples:
    path: rows.jsonl
    prompt: "{q}: "
    label_field: kind
    labels: {odd: "o", even: "e"}
  seq_len: 64
  micro_batch: 4
  global_batch: 4
  holdout: 0.2
objective: {name: classification}
precision: {compute: fp32}
schedule: {name: constant}
eval: {every: 1}
log: {every: 1}
compile: false
"""


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """A folder with texts, rows and a pretrained run, tokenizer of its own."""
    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "text").mkdir()
    for i in range(20):
        (folder / "text" / f"{i}.txt").write_text(f"text {i}: the quick brown fox, {i} times.\n" * 40)
    rows = [{"q": f"number {i}", "kind": "odd" if i % 2 else "even"} for i in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "pre.yaml").write_text(PRETRAIN.replace("path: text", f"path: {folder / 'text'}"))
    assert main(["train", str(folder / "pre.yaml"), f"run.dir={folder / 'pre'}"]) == 0
    return folder


@pytest.fixture
def finetune(pretrained, tmp_path, monkeypatch, capsys):
    """A function that finetunes in a folder of its own with overrides: (exit code, output, run folder)."""
    shutil.copy(pretrained / "rows.jsonl", tmp_path)
    (tmp_path / "fine.yaml").write_text(FINETUNE.replace("PRE", str(pretrained / "pre")))
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str, name: str = "fine"):
        code = main(["train", "fine.yaml", f"run.dir={name}", *overrides])
        captured = capsys.readouterr()
        return code, captured.out + captured.err, tmp_path / name

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.names() if name.startswith("model/")}


def rows_of(folder: Path, kind: str) -> list[dict]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == kind]


def test_model_tokenizer_and_weights_come_from_the_run(finetune, pretrained) -> None:
    code, text, folder = finetune("optim.lr=0.0", "run.steps=1")
    assert code == 0
    ours, theirs = weights(folder), weights(pretrained / "pre")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert f"weights of {pretrained / 'pre'}" in text.replace("\n", "")
    resolved, _ = parse_yaml((folder / "resolved.yaml").read_text(), "resolved")
    assert resolved["model"]["hidden"] == 32
    assert resolved["data"]["tokenizer"] == "init"
    files = [open_checkpoint(path).tokenizer / "tokenizer.json" for path in (folder, pretrained / "pre")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("by", ["words", "tokens", "head"])
def test_accuracy_is_in_metrics_console_and_report(finetune, by: str) -> None:
    code, text, folder = finetune(f"objective.by={by}")
    assert code == 0
    evals = rows_of(folder, "eval")
    assert [row["step"] for row in evals] == [1, 2]
    for row in evals:
        assert set(row) == {"kind", "step", "by", "loss", "accuracy", "held_out_examples"}
        assert row["accuracy"] * row["held_out_examples"] == pytest.approx(
            round(row["accuracy"] * row["held_out_examples"])
        )
        assert row["loss"] > 0
    assert "accuracy" in text
    assert "always '" in text
    table = summary_table(load_runs([folder]))
    assert table["held-out accuracy"] == [f"{100 * evals[-1]['accuracy']:.1f} %"]
    assert "held-out bits/byte" not in table


def test_a_resume_needs_nothing_of_the_source_and_is_bitwise(finetune, pretrained) -> None:
    source = shutil.copytree(pretrained / "pre", "copy")
    options = ("init.from=copy", "objective.by=head", "run.steps=4", "schedule.horizon_steps=4")
    finetune(*options, name="whole")
    code, _, folder = finetune(*options, "run.stop_at_step=2", name="parts")
    assert code == 0
    shutil.rmtree(source)
    code, text, _ = finetune(*options, name="parts")
    assert code == 0, text
    ours, theirs = weights(folder), weights(folder.with_name("whole"))
    assert "model/classifier.weight" in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_hugging_face_folder(finetune, pretrained) -> None:
    to_hf(pretrained / "pre", "hf", dtype="fp32")
    code, _, folder = finetune("init.from=hf", "optim.lr=0.0", "run.steps=1")
    assert code == 0
    ours, theirs = weights(folder), weights(pretrained / "pre")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    _, _, other = finetune("optim.lr=0.0", "run.steps=1", name="other")
    losses = [rows_of(path, "train")[0]["loss"] for path in (folder, other)]
    assert losses[0] == losses[1]


def test_a_classifier_goes_on_and_is_left_out_of_exports(finetune) -> None:
    _, _, first = finetune("objective.by=head", name="first")
    code, text, second = finetune(f"init.from={first}", "objective.by=head", "optim.lr=0.0", name="second")
    assert code == 0
    assert "classifier from there too" in text.replace("\n", " ") and "in this order" not in text
    turned = Path("fine.yaml").read_text().replace('{odd: "o", even: "e"}', '{even: "e", odd: "o"}')
    Path("turned.yaml").write_text(turned)
    former, other = (
        load(path, [f"init.from={first}", "objective.by=head"]) for path in ("fine.yaml", "turned.yaml")
    )
    (line,) = _label_remarks(other, source_for(other)[0])
    assert "trained for the labels odd; even, in this order, and goes on with even; odd" in line
    found = differences(Fingerprint(former.to_dict(), {}), Fingerprint(other.to_dict(), {}), 2)
    assert found == ["data.examples.labels are in another order"]
    assert all(torch.equal(weights(second)[name], value) for name, value in weights(first).items())
    assert any("classifier" in line for line in to_hf(first, "exported"))
    code, text, third = finetune(f"init.from={first}", name="third")
    assert code == 0
    assert "model/classifier.weight" not in weights(third)


@pytest.mark.parametrize(("by", "pattern"), [("words", "layers.1.*"), ("head", "classifier.*")])
def test_partial_training(finetune, pretrained, by: str, pattern: str) -> None:
    """What is not named stays as it was, bitwise, also in a resume; the banner counts what is trained."""
    options = (f"objective.by={by}", f"train_only=['{pattern}']", "optim.lr=0.01")
    code, text, folder = finetune(*options, "run.stop_at_step=1")
    assert code == 0
    before = weights(folder)
    assert finetune(*options)[0] == 0
    ours, start = weights(folder), weights(pretrained / "pre")
    named = {name for name in ours if name.removeprefix("model/").startswith(pattern[:-1])}
    assert named
    for name in ours.keys() - named:
        assert torch.equal(ours[name], start[name]), name
    assert all(not torch.equal(ours[name], before[name]) for name in named)
    total, trained = (
        sum(value.numel() for name, value in ours.items() if name in some) for some in (ours, named)
    )
    assert f"{total:,} parameters, {trained:,} of them trained" in text.replace("\n", " ")


def test_pretraining_may_go_on_from_weights(finetune, pretrained) -> None:
    """init.from is not tied to examples."""
    code, _, folder = finetune(
        "data={examples: null, sources: [{path: %s}]}" % (pretrained / "text"),
        "data.tokenizer=init",
        "objective.name=causal_lm",
        "optim.lr=0.0",
    )
    assert code == 0
    assert all(torch.equal(weights(folder)[n], v) for n, v in weights(pretrained / "pre").items())


def test_the_preset_of_a_base_gives_way_to_the_weights(finetune) -> None:
    text = Path("fine.yaml").read_text() + "model: {preset: tiny}\n"
    Path("fine.yaml").write_text(text)
    code, _, folder = finetune("model.preset=null", "run.steps=1", "eval.every=9")
    assert code == 0
    assert weights(folder)["model/embed.weight"].shape[1] == 32


def wrong_sources(tmp_path: Path, pretrained: Path) -> dict[str, tuple[str, list[str], str]]:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    )
    checkpoint = open_checkpoint(pretrained / "pre")
    tensors = [(n, checkpoint.read(n)) for n in checkpoint.names() if n.startswith("model/")]
    write_weights(tmp_path / "mute", iter(tensors), {"model": checkpoint.meta["model"], "step": 0}, [])
    write_weights(tmp_path / "partial", iter(tensors[1:]), {"model": checkpoint.meta["model"], "step": 0}, [])
    return {
        "gone": ("gone", [], "init.from: gone: no such checkpoint; give a run folder"),
        "empty": ("empty", [], "init.from: empty: no complete checkpoint here"),
        "gguf": ("model.gguf", [], "hlat convert from-gguf"),
        "mute": ("mute", [], "these weights have no tokenizer; set data.tokenizer"),
        "partial": ("partial", [], "1 tensors are missing, first"),
        "narrower": (
            str(pretrained / "pre"),
            ["model.hidden=64"],
            "model.hidden is 64 in the recipe and 32 in these weights; leave the model section out",
        ),
        "preset": (
            str(pretrained / "pre"),
            ["model.preset=tiny"],
            "in these weights; write model.preset=null: the model section is then read from there",
        ),
        "heads": (str(pretrained / "pre"), ["model.kv_heads=4"], "model.kv_heads is 4 in the recipe and 2"),
    }


@pytest.mark.parametrize("case", ["gone", "empty", "gguf", "mute", "partial", "narrower", "preset", "heads"])
def test_wrong_sources_are_one_line(finetune, pretrained, tmp_path, case: str) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    source, overrides, wanted = wrong_sources(tmp_path, pretrained)[case]
    code, text, folder = finetune(f"init.from={source}", *overrides)
    assert code == 2
    assert wanted in text
    assert text.count("\n") == 1
    assert not folder.exists()


def test_the_unused_head_is_not_trained(finetune) -> None:
    code, text, _ = finetune("objective.by=head", "train_only=[head.weight]")
    assert code == 2
    assert "train_only[0]: pattern 'head.weight' matches no parameter" in text


def test_fields_of_the_model_may_be_added(finetune, pretrained) -> None:
    recipe = load("fine.yaml", ["model.attention=plain", "model.max_seq_len=128"])
    assert (recipe.model.hidden, recipe.model.attention, recipe.model.max_seq_len) == (32, "plain", 128)


def test_weights_that_are_not_finite_have_no_accuracy(finetune, pretrained, tmp_path) -> None:
    stored = open_checkpoint(pretrained / "pre")
    tensors = {name: stored.read(name).clone() for name in stored.names() if name.startswith("model/")}
    tensors["model/norm.weight"][0] = torch.nan
    write_weights(tmp_path / "bad", iter(tensors.items()), stored.meta, stored.tokenizer)
    code, text, folder = finetune(f"init.from={tmp_path / 'bad'}", "guard.name=none", "run.steps=1")
    assert code == 0, text
    rows = rows_of(folder, "eval")
    assert rows and all(row["accuracy"] is None and row["loss"] is None for row in rows)
    assert "held-out at step 1: no figure, the loss is not finite" in text
    assert "no figure: the loss is not finite" in text.splitlines()[-2] and "nan" not in text
    assert summary_table(load_runs([folder]))["held-out accuracy"] == ["not finite"]
