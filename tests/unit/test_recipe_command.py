"""`hlat recipes`: list, show, diff, check, schema."""

import argparse
import ast
import json
import os
from pathlib import Path
from typing import get_args

import pytest

import hlat
from hlat import cli
from hlat.backend.neuron.profile import prepare
from hlat.commands import recipes
from hlat.errors import UserError
from hlat.recipe import Recipe, load
from hlat.train.run import refuse_unsupported


def run(*words):
    parser = argparse.ArgumentParser()
    recipes.configure(parser)
    return recipes.main(parser.parse_args(words))


def test_list_names_every_recipe_with_its_description(capsys):
    assert run("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines][0] == "tiny"
    assert any(line.startswith("pretrain/hlat-7b ") and "1.8 trillion tokens" in line for line in lines)


@pytest.mark.parametrize("flags", [(), ("--changed",)])
@pytest.mark.parametrize("name", ["tiny", "hlat-70b"])
def test_show_prints_a_recipe_that_loads_again(capsys, tmp_path, name, flags):
    assert run("show", name, "optim.lr=0.25", "log.every=7", *flags) == 0
    out = capsys.readouterr().out
    (tmp_path / "copy.yaml").write_text(out)
    assert load(tmp_path / "copy.yaml") == load(name, ["optim.lr=0.25", "log.every=7"])


def test_show_counts(capsys):
    run("show", "hlat-7b")
    out = capsys.readouterr().out
    assert "# 6,738,415,616 parameters\n# 4,194,304 tokens a step (1024 rows of 4096)\n" in out
    run("show", "hlat-7b", "--changed")
    assert "norm_eps" not in capsys.readouterr().out


def test_diff(capsys):
    assert run("diff", "hlat-7b", "hlat-70b") == 0
    out = capsys.readouterr().out
    assert "parallel.tp" in out
    assert "8 -> 32" in out
    assert "betas" not in out
    run("diff", "tiny", "tiny")
    assert capsys.readouterr().out == "the same recipe\n"


def test_a_run_folder_stands_for_its_resolved_recipe(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, rate in (("a", "1e-3"), ("b", "2e-3")):
        (tmp_path / name).mkdir()
        recipe = load("tiny", [f"optim.lr={rate}", "run.name=x"])
        (tmp_path / name / "resolved.yaml").write_text(recipe.to_yaml())
    assert run("diff", "a", "b") == 0
    assert capsys.readouterr().out.split() == ["optim.lr", "0.001", "->", "0.002"]
    assert run("show", "b", "run.steps=77") == 0
    shown = capsys.readouterr().out
    assert "lr: 0.002" in shown and "steps: 77" in shown
    with pytest.raises(UserError, match=r"a: is a folder, not a recipe file; write a/resolved\.yaml"):
        load("a")


def test_a_pipe_or_a_device_is_no_recipe(tmp_path):
    """It would be waited for when it is read the second time; /dev/zero has no end."""
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(UserError, match=rf"{name}\.yaml: is a (pipe|device), not a recipe file"):
            load(tmp_path / f"{name}.yaml")


def test_check_takes_overrides(capsys):
    assert run("check", "tiny", "160m", "data.global_batch=512") == 0
    assert capsys.readouterr().out.count("ok ") == 2
    with pytest.raises(UserError, match="command line: optim.lrr: unknown key"):
        run("check", "tiny", "optim.lrr=1")


def test_check_stops_at_the_first_bad_one(capsys, tmp_path):
    assert run("check") == 0
    assert capsys.readouterr().out.count("ok ") >= 5
    bad = tmp_path / "bad.yaml"
    bad.write_text("model: {preset: tiny}\ndata: {sources: [{path: x}], seqlen: 3}\n")
    with pytest.raises(
        UserError, match=r"bad\.yaml:2: data\.seqlen: unknown key 'seqlen'; did you mean 'seq_len'\?"
    ):
        run("check", "tiny", str(bad), "1b")
    assert "1b" not in capsys.readouterr().out


WIDE = ["data.global_batch=1024", "data.micro_batch=1"]


@pytest.mark.parametrize(
    "words",
    [
        ["hlat-7b", "model.attention=flash", "data.document_mask=true"],
        ["hlat-7b", "model.attention=flash", "data.seq_len=3072"],
        ["hlat-7b", "model.vocab=32001"],
        ["hlat-7b", "parallel.pp=2", "parallel.schedule=gpipe", *WIDE],
        ["hlat-7b", "parallel.tp=16"],
        ["hlat-7b", "parallel.tp=4", "model.kv_heads=2"],
        ["hlat-7b", "parallel.tp=4", "parallel.pp=2", *WIDE],
        ["tiny", "optim.name=muon", "parallel.tp=2"],
        ["tiny", "parallel.pp=2", "data.micro_batch=32"],
        ["tiny", "train_only=[nothing.*]"],
        ["tiny", "optim.groups=[{match: nothing, lr: 1}]"],
        ["tiny", "data.tokenizer=train:wordpiece"],
        ["tiny", "reduce={name: conef, compressor: unbiased_block}"],
    ],
    ids=lambda words: " ".join(words[:3]),
)
def test_what_a_job_would_refuse_is_refused_before_it(capsys, tmp_path, monkeypatch, words) -> None:
    """`recipes check`, `doctor --profile` and `launch --dry-run` end with the line of `hlat train`."""
    monkeypatch.chdir(tmp_path)
    on_trn1 = words[0] == "hlat-7b"
    processes, lines = "32" if on_trn1 else "2", []
    commands = (
        ["recipes", "check", *words],
        ["doctor", "--profile", *words, *["--nodes", "1"] * on_trn1],
        ["launch", "slurm", *words, "--nodes", "1", "--nproc-per-node", processes, "--dry-run"],
        ["train", *words],
    )
    for command in commands:
        if "parallel.tp=4" in words and "parallel.pp=2" in words and command[0] == "recipes":
            continue  # on two nodes it would do
        code = cli.main(command)
        err = capsys.readouterr().err.replace(f" {words[0]}: ", " ")
        if command[0] == "train" and any(word.startswith("parallel.") for word in words):
            with pytest.raises(UserError) as caught:
                in_the_job(load(words[0], words[1:]), int(processes))
            code, err = 2, f"hlat: error: {caught.value.line()}\n"
        assert code == 2, command
        lines.append(err)
    assert len(set(lines)) == 1 and lines[0].count("\n") == 1, lines
    assert list(tmp_path.iterdir()) == []


def in_the_job(recipe, processes: int) -> None:
    """What each process asks before it builds anything; on trn1 first of all the Neuron profile."""
    if recipe.backend == "nxd":
        prepare(recipe, {})
    refuse_unsupported(recipe)
    recipe.accumulate(processes)


def test_schema(capsys, tmp_path):
    assert run("schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert run("schema", "--out", str(tmp_path / "s.json")) == 0
    assert json.loads((tmp_path / "s.json").read_text()) == schema
    with pytest.raises(UserError, match="there is no folder"):
        run("schema", "--out", str(tmp_path / "none" / "s.json"))


def test_overrides_may_stand_behind_options(capsys) -> None:
    assert cli.main(["recipes", "show", "tiny", "run.steps=70", "--changed", "optim.lr=5e-4"]) == 0
    shown = capsys.readouterr().out
    assert "steps: 70" in shown and "lr: 0.0005" in shown
    for words in (["recipes", "show", "tiny", "--unknown", "optim.lr=1"], ["recipes", "list", "optim.lr=1"]):
        assert cli.main(words) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def notes(capsys, *words):
    capsys.readouterr()
    assert run("check", *words) == 0
    found = [line.strip() for line in capsys.readouterr().out.splitlines() if "note:" in line]
    return [line.removeprefix("note: ").partition(": ")[0] for line in found]


@pytest.mark.parametrize(
    ("words", "noted"),
    [
        (["method.name=mezo"], ["optim.lr", "optim.betas"]),
        (["method.name=mezo", "optim.clip_norm=3"], ["optim.lr", "optim.betas", "optim.clip_norm"]),
        (["method.name=mezo_svrg", "optim.lr=3e-4"], ["optim.lr", "optim.betas"]),
        (["schedule.name=constant"], ["schedule.floor"]),
        (["eval.limit=5"], ["eval.limit"]),
        (["eval.limit=5", "eval.tasks=[piqa]"], []),
        (["data.holdout=0", "eval.rows=9"], ["eval.every", "eval.rows"]),
        (["parallel.sequence=true", "parallel.verify_every=9"], ["parallel.sequence"]),
        (["parallel.dp=1", "parallel.zero1=true", "parallel.verify_every=9", "parallel.timeout=9"],
         ["parallel.zero1", "parallel.verify_every", "parallel.timeout"]),
        (["parallel.schedule=gpipe"], ["parallel.schedule"]),
        (["parallel.dp=1", "parallel.tp=1", "parallel.zero1=false"], []),
        (["method.name=mezo", "precision.accumulate=bf16", "precision.states=bf16", "precision.reduce=bf16"],
         ["optim.lr", "optim.betas", "precision.accumulate", "precision.states", "precision.reduce"]),
        (["method={name: mezo_svrg, anneal_every: 9}"], ["optim.lr", "optim.betas", "method.anneal_every"]),
        (["method={name: mezo_svrg, anneal_every: 9, anneal: 2}"], ["optim.lr", "optim.betas"]),
        (["precision.compute=fp32", "precision.master=none"], ["precision.master"]),
        (["precision.compute=bf16", "precision.states=bf16", "precision.accumulate=bf16"], []),
        (["data.sources=[{dataset: python-stdlib, weight: 3}]"], ["data.sources[0].weight"]),
        (["data.sources=[{dataset: python-stdlib, weight: 3}, {path: x}]"], []),
        (["schedule={name: constant, horizon_steps: 9999}"], ["schedule.floor", "schedule.horizon_steps"]),
        (["schedule.horizon_steps=9999"], []),
        (["optim.weight_decay=0", "optim.decay=all"], ["optim.decay"]),
        (["train_only=[norm.weight]", "optim.groups=[{match: layers.*, lr: 1}]"], ["optim.groups[0]"]),
        (["optim={name: mada, learn: [], hyper_lr: 1}"], ["optim.hyper_lr"]),
        (["reduce={name: conef, rank: 2, size: 0.3, error: exact}"], ["reduce.rank", "reduce.size"]),
        (["reduce={name: conef, rank: 2, size: 0.3, compressor: lowrank}"], []),
        (["init.from=nowhere", "model.init_std=0.1"], ["model.init_std"]),
        (["backend=nxd", "compile=true"], ["compile"]),
        (["data.examples={path: x, eval_path: y, group_field: id}", "data.holdout=0.1"],
         ["data.holdout", "data.examples.group_field"]),
    ],
)  # fmt: skip
def test_check_notes_each_key_that_does_nothing(capsys, words, noted):
    assert sorted(notes(capsys, "tiny", *words)) == sorted(noted)


def test_check_has_no_note_for_what_ships_or_for_defaults(capsys, tmp_path):
    assert notes(capsys) == []
    file = tmp_path / "run" / "resolved.yaml"
    file.parent.mkdir()
    file.write_text(load("tiny", ["method.name=mezo"]).to_yaml())
    assert notes(capsys, str(file.parent)) == []
    assert notes(capsys, str(file.parent), "eval.limit=3") == ["eval.limit"]


def fields_of(section, prefix=""):
    for name, field in section.model_fields.items():
        inner = [t for t in (field.annotation, *get_args(field.annotation)) if hasattr(t, "model_fields")]
        yield f"{prefix}{name}"
        for kind in inner:
            yield from fields_of(kind, f"{prefix}{name}.")


def test_every_key_is_read_somewhere() -> None:
    """A key that no module asks for could do nothing and still be in the reference."""
    sources = [f for f in Path(hlat.__file__).parent.rglob("*.py") if not f.name.startswith("recipe")]
    nodes = [node for f in sources for node in ast.walk(ast.parse(f.read_text(encoding="utf-8")))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    keys = list(fields_of(Recipe))
    assert len(keys) > 100 and "data.examples.eval_path" in keys and "optim.groups.match" in keys
    assert [key for key in keys if key.rpartition(".")[2] not in read] == []


def test_check_refuses_a_beta_of_1(capsys):
    for name in ("beta1", "beta2", "beta3"):
        with pytest.raises(UserError, match="below 1|less than 1"):
            run("check", "tiny", "optim.name=mada", "optim.learn=[c]", f"optim.{name}=1.0")
    assert run("check", "tiny", "optim.name=mada", "optim.learn=[c]", "optim.rho=1.0") == 0
