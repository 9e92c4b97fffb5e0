"""Published results of the models that HLAT's paper compares with, for printing beside one's own.

They come from other code, prompts and shots than the harness's where the source says so: a guide, not a
target. Values in percent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

LLAMA2 = "Llama 2, arXiv 2307.09288, table 3"
OPENLLAMA = "OpenLLaMA README, lm-evaluation-harness"
HLAT = "leaderboard entry of HLAT-7B (secondary; shots not stated)"


@dataclass(frozen=True)
class Published:
    """One value. task: name of the harness's task or group it is nearest to."""

    task: str
    metric: str
    model: str
    value: float
    source: str


_AREAS = {  # Llama 2 table 3: (metric in the harness, LLaMA 7B, Llama 2 7B)
    "mmlu": ("acc, 5-shot", 35.1, 45.3),
    "bbh_fewshot": ("exact_match, 3-shot", 30.3, 32.6),
    "hlat-commonsense": ("mean of 7 tasks", 60.8, 63.9),
    "hlat-world-knowledge": ("mean of 2 tasks, 5-shot", 46.2, 48.9),
    "hlat-reading": ("mean of 3 tasks", 58.5, 61.3),
    "hlat-math": ("mean of GSM8K 8-shot and MATH 4-shot", 6.95, 14.6),
    "humaneval": ("mean of HumanEval and MBPP pass@1", 14.1, 16.8),
}
_OPENLLAMA = {  # task: (metric, LLaMA 7B, OpenLLaMA 7B, OpenLLaMA 7B v2)
    "arc_challenge": (("acc", 39, 37, 39), ("acc_norm", 41, 38, 41)),
    "arc_easy": (("acc", 68, 72, 73), ("acc_norm", 52, 68, 70)),
    "boolq": (("acc", 75, 71, 72),),
    "hellaswag": (("acc", 56, 53, 56), ("acc_norm", 73, 72, 75)),
    "openbookqa": (("acc", 29, 30, 30), ("acc_norm", 41, 40, 41)),
    "piqa": (("acc", 78, 76, 79), ("acc_norm", 78, 77, 80)),
    "rte": (("acc", 56, 60, 57),),
    "wic": (("acc", 50, 51, 50),),
    "winogrande": (("acc", 68, 67, 66),),
    "truthfulqa_mc1": (("acc", 21, 23, 23),),
    "truthfulqa_mc2": (("acc", 34, 35, 35),),
    "anli_r1": (("acc", 35, 33, 34),),
    "anli_r2": (("acc", 34, 36, 35),),
    "anli_r3": (("acc", 37, 38, 39),),
}
# Tasks that belong to an area of which no group of that name is evaluated.
_NEAREST = {"boolq": "hlat-reading", "gsm8k": "hlat-math"}


def _published() -> Iterator[Published]:
    yield Published("mmlu", "acc", "HLAT-7B", 41.318, HLAT)
    for task, (metric, llama, llama2) in _AREAS.items():
        yield Published(task, metric, "LLaMA 7B", llama, LLAMA2)
        yield Published(task, metric, "Llama 2 7B", llama2, LLAMA2)
    for task, area in _NEAREST.items():
        metric, llama, llama2 = _AREAS[area]
        yield Published(task, f"area: {metric}", "LLaMA 7B", llama, LLAMA2)
        yield Published(task, f"area: {metric}", "Llama 2 7B", llama2, LLAMA2)
    for task, rows in _OPENLLAMA.items():
        for metric, *values in rows:
            for model, value in zip(("LLaMA 7B", "OpenLLaMA 7B", "OpenLLaMA 7Bv2"), values, strict=True):
                yield Published(task, metric, model, float(value), OPENLLAMA)


PUBLISHED = tuple(_published())
