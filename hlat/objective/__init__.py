"""Objectives: what is minimised."""

from hlat.objective.causal_lm import CausalLM

__all__ = ["CausalLM"]
