"""Save in one layout, continue in another: nothing is lost, and the numbers go on as they would have.

Four processes run all the cases of this file (see `reshard_ranks.py`), each case in as many of them as its
layout has ranks; the tests look at what they saved and saw.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hlat.checkpoint.hf import to_hf
from hlat.checkpoint.store import Checkpoint, open_checkpoint
from hlat.errors import UserError
from hlat.model.config import ModelConfig
from hlat.model.init import init_tensor, parameter_shapes
from hlat.train import state

PROGRAM = Path(__file__).with_name("reshard_ranks.py")
RANKS, SECONDS = 4, 480
COMMON = ["data.micro_batch=2", "optim.lr=1e-3", "optim.eps=1e-4"]
LAYOUTS = {
    "single": (1, "parallel={}"),
    "dp2": (2, "parallel={dp: 2, zero1: true}"),
    "tp2": (2, "parallel={tp: 2}"),
    "pp2": (2, "parallel={pp: 2}"),
    "dp2tp2": (4, "parallel={dp: 2, tp: 2, sequence: true, zero1: true}"),
    "copies": (4, "parallel={dp: 2, tp: 2}"),
    "tp4": (4, "parallel={tp: 4}"),  # two key/value heads: pairs of ranks hold the same one
}
FIVE = ("single", "dp2", "tp2", "pp2", "dp2tp2")
TIED, FROZEN, LOW = (
    ["model.tie_embeddings=true"],
    ["train_only=[layers.1.*, norm.weight]", "precision.compute=bf16"],
    ["precision={compute: bf16, rounding: stochastic}"],
)


def case(
    layout: str, source: str = "", name: str = "", more: tuple[str, ...] | list[str] = ()
) -> dict[str, Any]:
    world, parallel = LAYOUTS[layout]
    return {"name": name or layout, "world": world, "overrides": [*COMMON, parallel, *more], "from": source}


def chain(
    name: str, layouts: tuple[str, ...], more: tuple[str, ...] | list[str] = ()
) -> list[dict[str, Any]]:
    """Train in the first layout, and continue each one's end in the next."""
    names = [f"{name}-{i}-{layout}" for i, layout in enumerate(layouts, 1)]
    sources = ["", *(f"{name}/after" for name in names)]
    return [
        case(layout, source, name, more)
        for layout, source, name in zip(layouts, sources, names, strict=False)
    ]


CASES = [
    *(case(layout) for layout in FIVE),
    *(case(b, f"{a}/before", f"{a}-to-{b}") for a, b in product(FIVE, FIVE)),
    *chain("tied", ("tp2", "pp2", "single", "dp2tp2"), TIED),
    *chain("tied1", ("single",), TIED),
    *chain("heads", ("tp4", "single", "tp4", "copies")),
    *chain("frozen", ("copies", "pp2", "single", "dp2tp2"), FROZEN),
    *chain("low", ("single", "dp2tp2", "copies", "single"), LOW),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all cases ran."""
    work = tmp_path_factory.mktemp("reshard")
    (work / "cases.json").write_text(json.dumps(CASES))
    command = [sys.executable, str(PROGRAM), str(work / "cases.json"), str(work)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    ranks = [
        subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True, env=environment)
        for rank in range(RANKS)
    ]
    try:
        errors = [rank.communicate(timeout=SECONDS)[1] for rank in ranks]
    except subprocess.TimeoutExpired:
        errors = [path.read_text() for path in sorted(work.glob("*.error"))]
        pytest.fail("\n\n".join(["the ranks did not finish in time", *errors]))
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * RANKS, "\n\n".join(errors)
    return work


def seen(work: Path, name: str) -> dict[str, Any]:
    """What rank 0 of a case saw; all its ranks agree on the numbers."""
    world = next(c["world"] for c in CASES if c["name"] == name)
    errors = [path.read_text() for path in sorted(work.glob(f"{name}.*.error"))]
    assert not errors, "\n\n".join(errors)
    ranks = [json.loads((work / f"{name}.{rank}.json").read_text()) for rank in range(world)]
    for key in ("losses", "held_out"):
        assert all(rank[key] == ranks[0][key] for rank in ranks), f"the ranks differ in {key}"
    return {**ranks[0], "staged": [rank["staged"] for rank in ranks]}


def saved(work: Path, name: str, when: str) -> Checkpoint:
    return open_checkpoint(work / name / when)


def same_bits(a: Checkpoint, b: Checkpoint) -> None:
    """Every tensor of the state, down to the last bit (a NaN equals itself)."""
    assert a.names() == b.names() and a.step == b.step
    assert {"model/embed.weight", "optim/step", "run/updates", "guard/history"} <= set(a.names())
    for name in a.names():
        x, y = a.read(name), b.read(name)
        assert x.dtype == y.dtype and torch.isfinite(x).all(), name
        assert torch.equal(x, y), name


def close(found: list[float], wanted: list[float]) -> None:
    assert len(found) == len(wanted)
    for x, y in zip(found, wanted, strict=True):
        assert x == pytest.approx(y, abs=2e-6, rel=1e-6)


@pytest.mark.parametrize(("a", "b"), list(product(FIVE, FIVE)))
def test_saved_in_a_continued_in_b(work: Path, a: str, b: str) -> None:
    went_on, resumed = seen(work, a), seen(work, f"{a}-to-{b}")
    same_bits(saved(work, a, "before"), saved(work, f"{a}-to-{b}", "before"))
    assert saved(work, f"{a}-to-{b}", "before").meta["layout"] == saved(work, b, "before").meta["layout"]
    close(resumed["losses"], went_on["losses"])
    assert resumed["held_out"]["loss"] == pytest.approx(went_on["held_out"]["loss"], rel=1e-6)
    assert resumed["held_out"]["held_out_tokens"] == went_on["held_out"]["held_out_tokens"] > 0
    change = [text for key, text in resumed["banner"][1:] if key == "layout" and text.startswith("saved as")]
    if a == b:
        assert resumed["losses"] == went_on["losses"] and resumed["held_out"] == went_on["held_out"]
        same_bits(saved(work, a, "after"), saved(work, f"{a}-to-{b}", "after"))
        assert not change
    else:
        assert len(change) == 1 and change[0].endswith(str(saved(work, b, "before").meta["layout"]))


@pytest.mark.parametrize("name", ["tied", "heads", "frozen", "low"])
def test_a_chain_of_layouts_loses_nothing(work: Path, name: str) -> None:
    links = [c["name"] for c in CASES if c["name"].startswith(f"{name}-")]
    for before, after in zip(links, links[1:], strict=False):
        seen(work, before), seen(work, after)
        same_bits(saved(work, before, "after"), saved(work, after, "before"))


def test_tied_embeddings_go_through_every_layout(work: Path) -> None:
    single, first = seen(work, "tied1-1-single"), seen(work, "tied-1-tp2")
    close(first["losses"], single["losses"])
    names = saved(work, "tied-2-pp2", "before").names()
    assert "model/embed.weight" in names and "model/head.weight" not in names
    assert saved(work, "tied-4-dp2tp2", "after").step == 10


def test_frozen_parameters_stay_and_are_saved_once(work: Path) -> None:
    """bf16 computes with the frozen ones; saved is what they came as."""
    first, last = saved(work, "frozen-1-copies", "before"), saved(work, "frozen-4-dp2tp2", "after")
    trained = {name for name in first.names() if not torch.equal(first.read(name), last.read(name))}
    parameters = {name for name in trained if name.startswith("model/")}
    assert parameters and all(n.startswith(("model/layers.1.", "model/norm.")) for n in parameters)
    assert "optim/exp_avg/embed.weight" not in first.names()
    config, seed = ModelConfig(**last.meta["model"]), last.meta["recipe"]["run"]["seed"]
    for name, shape in parameter_shapes(config).items():
        if f"model/{name}" not in parameters:
            assert torch.equal(last.read(f"model/{name}"), init_tensor(config, name, shape, seed)), name


def test_each_element_is_copied_and_written_by_one_rank(work: Path) -> None:
    total = seen(work, "single")["staged"][0]
    shared = 4 * (2 * 128 + 2) + 8 + 4  # guard, run/updates, optim/step: alike everywhere
    for layout in ("dp2", "tp2", "pp2", "dp2tp2"):
        staged = seen(work, layout)["staged"]
        assert sum(staged) - shared * (len(staged) - 1) == total, layout
    staged = seen(work, "heads-4-copies")["staged"]  # two replicas hold the same and share the work
    assert sum(staged) - shared * (len(staged) - 1) == total
    assert max(staged) < 1.3 * min(staged)


def test_state_that_does_not_follow_the_parameters_is_refused(tiny_run) -> None:
    run = tiny_run()
    run.optimizer.state[run.buckets[0].master]["rows"] = torch.zeros(3)
    with pytest.raises(UserError, match=r"optim.name: .*'optim/rows' has shape \[3\]"):
        state.tensors(run)


def test_the_banner_counts_the_whole_model(work: Path) -> None:
    texts = {layout: dict(seen(work, layout)["banner"][1:]) for layout in FIVE}
    for layout in FIVE:
        assert texts[layout]["model"] == texts["single"]["model"]
        assert texts[layout]["optimizer"] == texts["single"]["optimizer"]
    assert "layout" not in texts["single"]
    assert texts["dp2tp2"]["layout"].startswith("dp 2 x pp 1 x tp 2, sequence, zero1; rank 0 of 4 holds 12,")


class Watched:
    """A source of weights that counts the bytes of what it has read and is still in use."""

    def __init__(self, source: Checkpoint) -> None:
        self.source, self.held, self.peak = source, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def read(self, name: str) -> Tensor:
        tensor = self.source.read(name)
        self.held += tensor.nbytes
        self.peak = max(self.peak, self.held)
        weakref.finalize(tensor, self._release, tensor.nbytes)
        return tensor

    def _release(self, size: int) -> None:
        self.held -= size


def exported(folder: Path) -> dict[str, bytes]:
    """The bytes of each file."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
def test_the_export_does_not_depend_on_the_layout(work: Path, tmp_path: Path, dtype: str) -> None:
    seen(work, "dp2tp2-to-single")
    many, one = saved(work, "dp2tp2", "before"), saved(work, "dp2tp2-to-single", "before")
    assert len(list(many.path.glob("data-*"))) == 4 and len(list(one.path.glob("data-*"))) == 1
    watched = Watched(many)
    to_hf(watched, tmp_path / "many", dtype)
    to_hf(one, tmp_path / "one", dtype)
    files = exported(tmp_path / "one")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= files.keys()
    assert exported(tmp_path / "many") == files
    for layout in ("dp2", "tp2", "pp2"):
        seen(work, f"dp2tp2-to-{layout}")
        to_hf(saved(work, f"dp2tp2-to-{layout}", "before"), tmp_path / layout, dtype)
        assert exported(tmp_path / layout) == files, layout
    largest = max(many.read(name).nbytes for name in many.names() if name.startswith("model/"))
    assert watched.peak <= largest < 0.15 * sum(many.read(n).nbytes for n in many.names() if n[0] == "m")
