"""MeZO and MeZO-SVRG on a small decoder that HLAT pretrained, at equal steps and at equal queries.

    python tests/bench/mezo_study.py --out study.json
    python tests/bench/mezo_study.py --out study.json --equal-queries --plot docs/images/mezo_study.svg

The decoder (1 layer of 48, 36,000 parameters, bytes as tokens) first learns installed text of three kinds:
Python, C headers, package descriptions and licences. Then it is finetuned to tell the kind of 32 bytes of
other files by the byte after them: 512 examples, batches of 4, 400 steps, mu 1e-3, constant rates, anchor of
all 512. Each method's rates are tuned on a seed of their own (the lowest held-out loss at the end) and then
run with three others; what is printed is the accuracy on 600 other windows at the end, not the best on the
way. --equal-queries gives MeZO as many examples through the model as MeZO-SVRG, and tunes it for that.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hlat.cli import main as hlat
from hlat.commands.recipe_file import load
from hlat.data import open_data
from hlat.train.evaluate import evaluate
from hlat.train.initial import initial_from, starting_tokenizer
from hlat.train.run import build_run
from hlat.train.step import train_step

PRETRAIN = """
run: {name: mezo-study, steps: 400, seed: 1}
model: {layers: 1, hidden: 48, heads: 4, kv_heads: 4, ffn: 96, vocab: 260, max_seq_len: 64,
    tie_embeddings: true}
data: {tokenizer: bytes, seq_len: 64, micro_batch: 32, global_batch: 32}
precision: {compute: fp32}
optim: {lr: 5.0e-3, betas: [0.9, 0.95]}
schedule: {warmup_steps: 20}
eval: {rows: 256}
checkpoint: {keep: 1}
compile: false
"""
FINETUNE = """
run: {name: mezo-study-kinds, steps: 400}
data:
  examples: {prompt: "{text}#", label_field: kind, labels: {python: P, header: H, text: T}}
  seq_len: 40
  micro_batch: 4
  global_batch: 4
objective: {name: classification, by: words}
precision: {compute: fp32}
schedule: {name: constant}
eval: {rows: 600}
compile: false
"""
PATHS = {"path": "train.jsonl", "eval_path": "held_out.jsonl"}
BATCH, ANCHOR, TUNING_SEED, SEEDS, POINTS = 4, 512, 100, (0, 1, 2), 5
TRAIN, HELD_OUT, WINDOW = 512, 600, 32


def method(name: str, rates: tuple[float, ...]) -> list[str]:
    """The recipe overrides of a method."""
    anchor = f"anchor_examples: {ANCHOR}, anchor_batch: 64"
    if name == "backprop":
        return [f"optim={{name: sgd, lr: {rates[0]}, weight_decay: 0.0}}"]
    if name == "mezo_svrg":
        return [f"method={{name: mezo_svrg, lr_anchor: {rates[0]}, lr_inner: {rates[1]}, {anchor}}}"]
    own = f", {anchor}" if name == "full_batch_zo" else ""
    return [f"method={{name: {name}, lr: {rates[0]}{own}}}"]


GRIDS: dict[str, list[tuple[float, ...]]] = {
    "backprop": [(1e-2,), (3e-2,), (1e-1,)],
    "mezo": [(3e-5,), (1e-4,), (2e-4,), (5e-4,), (1e-3,)],
    "mezo_svrg": [(2e-3, 2e-6), (2e-3, 4e-4), (5e-3, 5e-6), (5e-3, 1e-3), (1e-2, 1e-5)],
    "full_batch_zo": [(2e-3,), (5e-3,), (1e-2,)],
}


def installed() -> dict[str, list[Path]]:
    """Files of each kind, in an order that is always the same."""
    import numpy

    library, site = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    headers = [Path(numpy.get_include()), Path(torch.__file__).parent / "include" / "torch"]
    found = {
        "python": library.glob("*.py"),
        "header": (file for folder in headers for file in folder.rglob("*.h")),
        "text": (file for name in ("METADATA", "LICENSE*") for file in site.glob(f"*.dist-info/**/{name}")),
    }

    def shuffled(file: Path) -> bytes:
        return hashlib.sha256("/".join(file.parts[-2:]).encode()).digest()

    return {kind: sorted(files, key=shuffled) for kind, files in found.items()}


def write_texts(folder: Path) -> None:
    """Files for pretraining, windows of other files for finetuning, and of yet others held out."""
    splits: dict[str, list[dict[str, str]]] = {"train": [], "held_out": []}
    chosen = random.Random(0)
    for kind, files in installed().items():
        texts = [file.read_text(errors="ignore") for file in files if file.is_file()]
        texts = [text for text in texts if text.isascii() and len(text) > 500]
        third = len(texts) // 3
        (folder / "pretrain").mkdir(parents=True, exist_ok=True)
        for number, text in enumerate(texts[:third][:60]):
            (folder / "pretrain" / f"{kind}-{number}.txt").write_text(text[:20_000])
        for split, own in (("train", texts[third : 2 * third]), ("held_out", texts[2 * third :])):
            for _ in range((TRAIN if split == "train" else HELD_OUT) // 3 + 1):
                text = chosen.choice(own)
                at = chosen.randrange(len(text) - WINDOW)
                splits[split].append({"text": text[at : at + WINDOW], "kind": kind})
    for split, records in splits.items():
        chosen.shuffle(records)
        count = TRAIN if split == "train" else HELD_OUT
        lines = "".join(json.dumps(record) + "\n" for record in records[:count])
        (folder / f"{split}.jsonl").write_text(lines)


class Study:
    """Runs of the finetuning task."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = folder / "finetune.yaml"
        if not (folder / "pretrained").exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "pretrain.yaml").write_text(PRETRAIN)
            write_texts(folder)
            sources = f"data.sources=[{{path: {folder / 'pretrain'}}}]"
            hlat(["train", str(folder / "pretrain.yaml"), sources, f"run.dir={folder / 'pretrained'}"])
        self.recipe.write_text(FINETUNE)

    def run(self, name: str, rates: tuple[float, ...], seed: int, steps: int) -> list[dict[str, float]]:
        """Held-out figures along a run, the last one at its end."""
        own = [f"init.from={self.folder / 'pretrained'}", f"run.seed={seed}", f"run.steps={steps}"]
        own += [f"data.examples.{k}={self.folder / v}" for k, v in PATHS.items()]
        recipe = load(self.recipe, [*own, *method(name, rates)])
        data = open_data(recipe, tokenizer=starting_tokenizer(recipe, Path("none")), quiet=True)
        run = build_run(recipe, data, initial=initial_from(recipe)[0])
        found = []
        for step in range(steps + 1):
            if step in set(points(steps)):
                found.append({"step": step, "queries": run.method.queries(recipe, step), **evaluate(run)})
            if step < steps:
                train_step(run)
        return found

    def tuned(self, name: str, steps: int, grid: list[tuple[float, ...]] | None = None) -> dict[str, Any]:
        """The best rates on the tuning seed, and the curves of the others with them."""
        began = time.monotonic()
        ends = {rates: self.run(name, rates, TUNING_SEED, steps)[-1] for rates in grid or GRIDS[name]}
        best = min(ends, key=lambda rates: ends[rates]["loss"] if ends[rates]["loss"] < 9 else 9)  # or nan
        curves = [self.run(name, best, seed, steps) for seed in SEEDS]
        ends_of = [curve[-1] for curve in curves]
        accuracy, loss = (statistics.mean(end[key] for end in ends_of) for key in ("accuracy", "loss"))
        print(
            f"{name:14} {steps:6} steps {ends_of[0]['queries']:8} queries, rates {best}: "
            f"accuracy {accuracy:.1%} ("
            + " ".join(f"{end['accuracy']:.1%}" for end in ends_of)
            + f"; {curves[0][0]['accuracy']:.1%} before), loss {loss:.3f}; {time.monotonic() - began:.0f} s",
            flush=True,
        )
        shown = {str(rates): end for rates, end in ends.items()}
        return {"rates": best, "steps": steps, "tuning": shown, "curves": curves}


def points(steps: int) -> Iterator[int]:
    """Steps at which a run is evaluated."""
    return (round(steps * i / POINTS) for i in range(POINTS + 1))


def plot(table: dict[str, Any], file: Path) -> None:
    """Mean held-out accuracy over steps and over queries."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for name, entry in table.items():
        for axis, panel in zip(("step", "queries"), panels, strict=True):
            if axis == "step" and "equal queries" in name:
                continue
            x = [row[axis] for row in entry["curves"][0]]
            rows = zip(*entry["curves"], strict=True)
            panel.plot(x, [statistics.mean(r["accuracy"] for r in row) for row in rows], label=name)
    panels[0].set(xlabel="step", ylabel="held-out accuracy")
    panels[1].set(xlabel="queries (examples forwarded)")
    panels[1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("study.json"))
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/mezo-study"), help="where the decoder is kept"
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--methods", nargs="+", choices=GRIDS, default=["mezo", "mezo_svrg", "full_batch_zo"])
    parser.add_argument("--equal-queries", action="store_true", help="MeZO with MeZO-SVRG's queries instead")
    parser.add_argument("--plot", type=Path, help="draw the curves of all that --out holds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(args.folder)
    table = json.loads(args.out.read_text()) if args.out.exists() else {}
    if args.equal_queries:
        anchors = -(-args.steps // 2)
        queries = 2 * ANCHOR * anchors + 4 * BATCH * (args.steps - anchors)
        grid: list[tuple[float, ...]] = [(5e-5,), (2e-4,), (5e-4,)]
        table["mezo, equal queries"] = study.tuned("mezo", queries // (2 * BATCH), grid)
    else:
        table.update({name: study.tuned(name, args.steps) for name in args.methods})
    args.out.write_text(json.dumps(table, indent=1))
    if args.plot:
        plot(table, args.plot)


if __name__ == "__main__":
    main()
