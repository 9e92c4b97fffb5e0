"""Local tasks of every kind for comparing two models of the harness, and what a model makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QUESTIONS = [
    ("The sky on a clear day is", [" blue", " green and has stripes", " a kind of soup"], 0),
    ("Two plus two is ", ["four", "five", "a prime number of elephants"], 0),
    ("Water boils at one hundred degrees. Ice melts at", [" zero", " nine hundred", " the museum"], 0),
    ("def add(a, b):\n    return", [" a + b", " a - b", " None"], 0),
    ("", ["An empty context.", "Another one."], 0),
    ("A dog says", [" woof", " meow", " moo", " nothing at all, as is well known"], 0),
    ("The capital of France is", [" Paris", " Rome"], 0),
    ("Once upon a time, in a land of rolling hills and quiet rivers, there lived a", [" king", " stone"], 0),
]
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "for i in range(10):\n    print(i * i)\n",
    "Ein kurzer Text mit Umlauten: äöü, und Zahlen 3.14159.",
    "x",
]
PROMPTS = [
    "The capital of France is",
    "1, 2, 3, 4,",
    "def fibonacci(n):\n",
    "Question: What is water made of?\nAnswer:",
    "Once upon a time there was a",
]
CLOZE = [
    ("The opposite of hot is", " cold"),
    ("Monday, Tuesday, Wednesday,", " Thursday"),
    ("1, 2, 3,", " 4"),
]
COMMON = {"test_split": "test", "target_delimiter": "", "num_fewshot": 0, "dataset_path": "json"}


def write_tasks(folder: Path) -> list[str]:
    """Task files with their questions; returns the tasks' names."""
    folder.mkdir(parents=True, exist_ok=True)
    acc = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    bits = [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}]
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    generation = {"until": ["\n\n", ".", "?"], "max_gen_toks": 12, "do_sample": False}
    tasks: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
        "local-choice": (
            {
                "output_type": "multiple_choice",
                "doc_to_text": "context",
                "doc_to_choice": "choices",
                "doc_to_target": "answer",
                "metric_list": acc,
            },
            [{"context": c, "choices": choices, "answer": a} for c, choices, a in QUESTIONS],
        ),
        "local-cloze": (
            {
                "output_type": "loglikelihood",
                "doc_to_text": "context",
                "doc_to_target": "target",
                "metric_list": [acc[0]],
            },
            [{"context": c, "target": t} for c, t in CLOZE],
        ),
        "local-bits": (
            {
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": "text",
                "metric_list": bits,
            },
            [{"text": text} for text in TEXTS],
        ),
        "local-generate": (
            {
                "output_type": "generate_until",
                "doc_to_text": "context",
                "doc_to_target": "target",
                "generation_kwargs": generation,
                "metric_list": exact,
            },
            [{"context": prompt, "target": "nothing"} for prompt in PROMPTS],
        ),
    }
    for name, (config, rows) in tasks.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        content = {"task": name, **COMMON, **config, "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / f"{name}.yaml").write_text(json.dumps(content))
    return list(tasks)


def answers(results: dict[str, Any]) -> dict[str, list[Any]]:
    """Every response of every question, in order: (nats, greedy), nats, or text."""
    return {
        task: [
            response[0]
            for sample in sorted(samples, key=lambda s: s["doc_id"])
            for response in sample["resps"]
        ]
        for task, samples in results["samples"].items()
    }


def differences(
    ours: dict[str, Any], theirs: dict[str, Any], exact: dict[str, Any], tolerance: float = 1e-4
) -> list[str]:
    """How two results differ: texts, greedy flags and accuracies at all; log-likelihoods by more than the
    tolerance, unless ours is at least as near to the `exact` one as theirs is.
    """
    found = []
    mine, other, truth = answers(ours), answers(theirs), answers(exact)
    assert mine.keys() == other.keys()
    for task, responses in other.items():
        assert len(mine[task]) == len(responses) > 0
        for number, (a, b, c) in enumerate(zip(mine[task], responses, truth[task], strict=True)):
            nats = [x[0] if isinstance(x, tuple | list) else x for x in (a, b, c)]
            if isinstance(b, str):
                same = a == b
            else:
                near = abs(nats[0] - nats[1]) <= tolerance
                same = near or abs(nats[0] - nats[2]) <= abs(nats[1] - nats[2])
            if isinstance(b, tuple | list):
                same = same and a[1] == b[1]
            if not same:
                found.append(f"{task}[{number}]: {a!r} is not {b!r} (exact: {c!r})")
    for task, values in theirs["results"].items():
        for key, value in values.items():
            exactly = key.partition(",")[0] in ("acc", "acc_norm", "exact_match")
            if exactly and ours["results"][task][key] != value:
                found.append(f"{task} {key}: {ours['results'][task][key]} is not {value}")
    return found
