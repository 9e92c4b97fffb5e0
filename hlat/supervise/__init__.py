"""Operating a run: what starts it, watches it and starts it again."""
