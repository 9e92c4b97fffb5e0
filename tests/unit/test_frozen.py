"""`train_only`: the rest stays as it is, bitwise, in what is saved, whatever computes with it."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from hlat.checkpoint.hf import to_hf
from hlat.checkpoint.store import CheckpointStore, write_weights
from hlat.checkpoint.weights import open_weights
from hlat.cli import main
from hlat.mesh import ONE_PROCESS, Place
from hlat.model.config import ModelConfig
from hlat.model.init import init_tensor, parameter_shapes
from hlat.parallel.costs import kept
from hlat.train import nxd_checkpoint, state
from hlat.train.describe import _held_text
from hlat.train.memory import persistent_bytes
from hlat.train.step import train_step

ONLY, LOW = "train_only=[layers.1.*]", "precision.compute=bf16"
METHODS = {
    "adamw": ["optim.weight_decay=0.1"],
    "muon": ["optim.name=muon"],
    "sgd": ["optim={name: sgd, lr: 0.1}"],
    "no masters": ["precision.master=none", "precision.rounding=stochastic", "precision.states=bf16"],
    "mezo": ["method={name: mezo, lr: 1e-3}"],
    "mezo_svrg": [
        "method={name: mezo_svrg, lr_anchor: 1e-3, lr_inner: 1e-3, anchor_examples: 16, restore: copy}"
    ],
    "full_batch_zo": ["method={name: full_batch_zo, lr: 1e-3, anchor_examples: 16}"],
}
SHAPE = {"layers": 2, "hidden": 16, "heads": 2, "ffn": 32, "vocab": 257, "max_seq_len": 32}
RECIPE = """
run: {name: tuned, steps: 4, dir: tuned}
init: {from: start}
data: {sources: [{path: text}], tokenizer: bytes, seq_len: 32, micro_batch: 4, global_batch: 4, holdout: 0.1}
optim: {lr: 1e-2}
checkpoint: {every: 1, keep: 2}
compile: false
"""


@pytest.mark.parametrize("method", METHODS)
def test_frozen_weights_are_saved_as_they_came(tiny_run, method: str) -> None:
    run = tiny_run(*METHODS[method], ONLY, LOW)
    for _ in range(3):
        train_step(run)
    saved, shapes = state.tensors(run), parameter_shapes(run.recipe.model)
    moved = set()
    for name, shape in shapes.items():
        first, now = init_tensor(run.recipe.model, name, shape, run.recipe.run.seed), saved[f"model/{name}"]
        if not torch.equal(first.to(now.dtype), now) or (name in run.frozen and first.dtype != now.dtype):
            moved.add(name)
    assert moved and all(name.startswith("layers.1.") for name in moved)
    assert all(held.value.dtype == torch.bfloat16 for held in run.frozen.values())


def test_the_copies_are_counted(tiny_run) -> None:
    low, high = tiny_run(ONLY, LOW), tiny_run(ONLY)
    copies = sum(4 * held.value.numel() for held in low.frozen.values())
    assert f"frozen weights as they came (host memory) {copies / 1e6:,.1f} MB" in _held_text(low)
    assert "as they came" not in _held_text(high) and high.frozen
    before = persistent_bytes(low)
    for held in low.frozen.values():
        held.exact = None
    assert before - persistent_bytes(low) == copies
    assert kept(low.recipe, ONE_PROCESS, Place()).frozen == copies > 0
    assert kept(high.recipe, ONE_PROCESS, Place()).frozen == 0


def test_the_copies_must_fit_too(tiny_run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("hlat.train.weights.check_fits", lambda size, *_, **__: asked.append(size))
    runs = tiny_run(ONLY, LOW), tiny_run(ONLY, "precision.compute=fp32")
    copies = sum(held.exact.nbytes for held in runs[0].frozen.values())
    trained = sum(spec.numel for bucket in runs[0].buckets for spec in bucket.specs)
    frozen = sum(held.value.numel() for held in runs[0].frozen.values())
    assert copies == 4 * frozen > 0
    # bf16: two bytes for each parameter, four for each master; fp32: four for each parameter.
    assert asked[0] - asked[1] == copies + 2 * (frozen + trained) + 4 * trained - 4 * (frozen + trained)


def test_a_checkpoint_with_rounded_weights_continues_as_it_was(tiny_run, tmp_path: Path) -> None:
    """Earlier versions saved frozen weights as they computed with them."""
    old, new = tiny_run(ONLY, LOW), tiny_run(ONLY, LOW)
    train_step(old)
    for held in old.frozen.values():
        held.exact = None
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, state.tensors(old), state.meta(old), tokens=0)
    for held in new.frozen.values():
        held.value.fill_(torch.nan)
    state.restore(new, store.newest())
    assert float(train_step(new)["loss"]) == float(train_step(old)["loss"])
    first, second = state.tensors(old), state.tensors(new)
    assert first.keys() == second.keys()
    assert all(first[name].dtype == second[name].dtype for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("rounded", [False, True])
def test_the_same_in_the_files_of_nxd(tiny_run, monkeypatch: pytest.MonkeyPatch, rounded: bool) -> None:
    """What is restored is what was saved, also by a version that saved what it had rounded."""
    old, new = tiny_run(ONLY, LOW), tiny_run(ONLY, LOW)
    train_step(old)
    for held in old.frozen.values():
        held.exact = None if rounded else held.exact
    contents = copy.deepcopy(nxd_checkpoint._contents(old))
    files = ModuleType("files")
    files.load = lambda folder, tag, loaded: loaded.update(contents)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hlat.backend.nxd.files", files)
    monkeypatch.setattr("hlat.backend.nxd.files", files, raising=False)
    found = SimpleNamespace(path=Path("step-1"), meta=state.meta(old))
    monkeypatch.setattr(nxd_checkpoint, "newest_nxd", lambda folder: found)
    for held in new.frozen.values():
        held.value.fill_(torch.nan)
        held.exact = None if not rounded else held.exact
    nxd_checkpoint.restore(new, Path("."))
    for name, held in old.frozen.items():
        assert (
            torch.equal(new.frozen[name].kept, held.kept) and new.frozen[name].kept.dtype == held.kept.dtype
        )
        assert torch.equal(new.frozen[name].value, held.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_through_a_resume_and_an_export(tmp_path: Path, monkeypatch, capsys, dtype: torch.dtype) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("text").mkdir()
    for i in range(40):
        Path(f"text/{i}.txt").write_text(f"alpha beta gamma {i} delta eps zeta " * 9)
    config = ModelConfig(**SHAPE)
    first = {n: init_tensor(config, n, s, 3).to(dtype) for n, s in parameter_shapes(config).items()}
    tensors = iter([(f"model/{name}", value) for name, value in first.items()])
    write_weights(Path("start"), tensors, {"model": config.model_dump(), "step": 0}, [])
    Path("tuned.yaml").write_text(RECIPE)
    options = ["train_only=['layers.1.*', norm.weight]", LOW]
    assert main(["train", "tuned.yaml", *options, "run.stop_at_step=2"]) == 0
    assert main(["train", "tuned.yaml", *options]) == 0
    assert "rounded" not in capsys.readouterr().out
    to_hf("tuned", "out", dtype="keep")
    for folder in ("tuned", "out"):
        found = open_weights(folder)
        for name, value in first.items():
            now = found.read(f"model/{name}")
            frozen = not name.startswith("layers.1.") and name != "norm.weight"
            assert torch.equal(now.float(), value.float()) == frozen, (folder, name)
            assert now.dtype == (torch.bfloat16 if frozen and dtype == torch.bfloat16 else torch.float32)
