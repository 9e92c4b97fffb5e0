"""Backends: where a run computes. Version branches and device specifics live here alone."""
