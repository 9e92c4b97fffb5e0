"""Objectives: what is minimised."""

from hlat.objective.causal_lm import CausalLM
from hlat.objective.classification import Classification

__all__ = ["CausalLM", "Classification"]
