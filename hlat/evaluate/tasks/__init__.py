"""HLAT's own tasks, in the files of the evaluation harness: `lm_eval --include_path` takes this folder."""
