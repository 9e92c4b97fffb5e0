"""Starting a group of ranks that works through many cases, and what came of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

PROGRAM = Path(__file__).with_name("layout_ranks.py")
SECONDS_A_CASE = 60
MOST_RANKS = 4
ECHOES = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe")

BASE = (
    "model.layers=4",
    "model.vocab=96",
    "data.document_mask=true",
    "optim={name: adamw, lr: 1e-3, eps: 1e-8, clip_norm: 0.5}",
)
WORDS: dict[str, tuple[str, ...]] = {
    # layouts
    **{f"{axis}{n}": (f"parallel.{axis}={n}",) for axis in ("dp", "tp", "pp") for n in (2, 4)},
    "zero1": ("parallel.zero1=true",),
    "sequence": ("parallel.sequence=true",),
    "gpipe": ("parallel.schedule=gpipe",),
    "interleaved": ("parallel.schedule=interleaved", "parallel.stages=2"),
    "cut3": ("parallel.cuts=[layers.3]",),
    "selective": ("parallel.recompute=selective",),
    "full": ("parallel.recompute=full",),
    **{f"accumulate{n}": () for n in (1, 2, 4)},
    # what is trained, the same in one process
    "kv1": ("model.kv_heads=1",),
    "kv4": ("model.kv_heads=4",),
    "tied": ("model.tie_embeddings=true",),
    "odd": ("model.vocab=97",),
    "unmasked": ("data.document_mask=false",),
    "unclipped": ("optim.clip_norm=null",),
    "sgd": ("optim={name: sgd, lr: 0.1, weight_decay: 0.1, clip_norm: 0.5}",),
    "eps": ("optim.eps=1e-4",),
    "bf16": ("precision.compute=bf16",),
    "fp32": ("precision.compute=fp32",),
}


def complete(case: dict[str, Any]) -> dict[str, Any]:
    """A case with the recipe overrides of its layout's words, such as "dp2-tp2-sequence".

    Its `rows` are the global batch. A pipeline gets 4 micro-batches a rank unless a word says otherwise.
    """
    words, rows = case["layout"].split("-"), case.get("rows", 8)
    dp = int(next((word[2] for word in words if word.startswith("dp")), 1))
    parts = next((int(word[-1]) for word in words if word.startswith("accumulate")), 0)
    parts = parts or (4 if any(word.startswith("pp") for word in words) else 1)
    batch = (f"data.global_batch={rows}", f"data.micro_batch={rows // (dp * parts)}")
    own = [text for word in words for text in WORDS[word]]
    base = () if "recipe" in case else BASE
    return {**case, "overrides": [*base, *own, *case.get("extra", ()), *batch]}


@dataclass
class Outcome:
    """A case, and what its ranks left behind: a JSON object and a file of tensors each."""

    case: dict[str, Any]
    ranks: list[dict[str, Any]]
    files: list[Path]
    trouble: str = ""

    def check(self) -> Outcome:
        """Itself; fails the test with the tracebacks if a rank did not finish the case."""
        if self.trouble:
            pytest.fail(self.trouble, pytrace=False)
        return self

    def assemble(self, kind: str) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Whole parameters from the pieces of one kind, by name, and what is wrong with the pieces: elements
        that no rank has, copies that are not bitwise the same.
        """
        wholes: dict[str, torch.Tensor] = {}
        held: dict[str, torch.Tensor] = {}
        wrong = []
        for rank, (result, file) in enumerate(zip(self.ranks, self.files, strict=True)):
            tensors = load_file(file)
            for place in (place for place in result["places"] if place["kind"] == kind):
                name, flat = place["name"], tensors[place["key"]]
                if name not in wholes:
                    wholes[name] = torch.zeros(place["shape"], dtype=flat.dtype)
                    held[name] = torch.zeros(place["shape"], dtype=torch.bool)
                index = torch.arange(wholes[name].numel()).view(place["shape"])
                for dim, (start, size) in enumerate(zip(place["offset"], place["size"], strict=True)):
                    index = index.narrow(dim, start, size)
                index = index.reshape(-1)[place["skip"] : place["skip"] + flat.numel()]
                whole, known = wholes[name].view(-1), held[name].view(-1)
                again = known[index]
                if not torch.equal(whole[index][again], flat[again]):
                    wrong.append(f"rank {rank} has another copy of {name}")
                whole[index], known[index] = flat, True
        wrong += [f"no rank has all of {name}" for name, known in held.items() if not known.all()]
        return wholes, wrong


def run_group(world: int, cases: Sequence[dict[str, Any]], folder: Path) -> dict[str, Outcome]:
    """Start `world` ranks, let them work through the cases, end them when time is up, and collect."""
    folder.mkdir(parents=True)
    table = folder / "cases.json"
    cases = [complete(case) for case in cases]
    table.write_text(json.dumps(cases))
    cuda = torch.cuda.device_count() >= MOST_RANKS  # all sizes of groups on the same kind of device
    ranks = []
    for rank in range(world):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(world)}
        if not cuda:
            env["CUDA_VISIBLE_DEVICES"] = ""
        with open(folder / f"rank-{rank}.log", "w") as log:
            command = [sys.executable, str(PROGRAM), str(table), str(folder)]
            ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    deadline = time.monotonic() + 120 + SECONDS_A_CASE * len(cases)
    try:
        while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
            if any(process.poll() for process in ranks):  # one died: the others would wait for it
                deadline = min(deadline, time.monotonic() + 10)
            time.sleep(0.1)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return {case["name"]: _outcome(case, world, folder) for case in cases}


def _outcome(case: dict[str, Any], world: int, folder: Path) -> Outcome:
    name = case["name"]
    files = [folder / f"{name}.{rank}.json" for rank in range(world)]
    if all(file.exists() for file in files):
        results = [json.loads(file.read_text()) for file in files]
        return Outcome(case, results, [file.with_suffix(".safetensors") for file in files])
    texts = []
    for rank, file in enumerate(files):
        error = file.with_suffix(".error")
        if error.exists():
            texts.append((rank, error.read_text()))
        elif not file.exists():
            log = (folder / f"rank-{rank}.log").read_text()
            texts.append((rank, f"no result; end of its output:\n{log[-2000:]}"))
    # A rank that lost its neighbour says so; the neighbour says why.
    texts.sort(key=lambda item: any(echo in item[1] for echo in ECHOES))
    return Outcome(case, [], [], f"case {name}\n" + "\n".join(f"rank {rank}: {text}" for rank, text in texts))


@pytest.fixture(scope="module")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Outcome]]:
    """A function (world, cases) -> outcomes by name, each with its own process group."""

    def run(world: int, cases: Sequence[dict[str, Any]]) -> dict[str, Outcome]:
        return run_group(world, cases, tmp_path_factory.mktemp(f"world{world}") / "ranks")

    return run
