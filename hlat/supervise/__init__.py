"""Keeps a run going on one node: starts the ranks, watches them, says why they ended, starts them again."""
