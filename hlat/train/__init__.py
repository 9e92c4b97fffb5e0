"""Training: building a run, its loop, one step."""
