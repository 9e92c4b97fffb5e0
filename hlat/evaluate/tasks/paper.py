"""Functions that `hlat-paper.yaml` names."""

from __future__ import annotations

from typing import Any


def pass_at_k(references: list[str], predictions: list[list[str]], k: list[int]) -> dict[str, float]:
    """Unbiased pass@k (Chen et al. 2021, arXiv 2107.03374, section 2.1) of the programs a model wrote for one
    problem. It runs them: the harness asks for leave before.
    """
    import evaluate

    score: Any = evaluate.load("code_eval")
    passed: dict[str, float] = score.compute(references=references, predictions=predictions, k=k)[0]
    return passed
