"""HLAT: Trainium-first LLM pretraining from one recipe."""

__version__ = "0.1.0"
