"""Keeps a run going: starts the ranks, watches them, says why they ended, starts them again."""
